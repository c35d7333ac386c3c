"""The connectors that are compared: what stands between the patches and the language model; nothing else differs.

ML-Mamba, arXiv 2407.19832, section 3.2.3 and tables 6 and 7.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Arm:
    """One connector.

    Args:
        key: name in results.json and on the command line.
        label: name in tables and pictures.
        variant, scan: of `mmkernels.layers.Mamba2ScanConnector`.
        colour: in the pictures.
    """

    key: str
    label: str
    variant: str
    scan: str
    colour: str


ARMS = (
    Arm("mlp", "MLP", "mlp", "bidirectional", "#d08770"),
    Arm("basic", "Basic: scan (BSM)", "msc_basic", "bidirectional", "#8f6fb0"),
    Arm("advanced", "Advanced: scan (BSM), SwiGLU", "msc_advanced", "bidirectional", "#1b9e77"),
    Arm("cross", "Advanced, cross scan (CSM)", "msc_advanced", "cross", "#2b6cb0"),
    Arm("raster", "Advanced, raster scan only", "msc_advanced", "raster", "#b8860b"),
)
