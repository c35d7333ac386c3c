"""State-space mixers as nn.Modules: they take sizes, not configurations, and their states go in and come out."""

from mmkernels.layers.grouped_mamba2 import GroupedMamba2Mixer
from mmkernels.layers.mamba2 import Mamba2Block, Mamba2Mixer
from mmkernels.layers.multi_directional import MultiDirectionalMamba2
from mmkernels.layers.norm import GatedRMSNorm
from mmkernels.layers.placement import Placement, place_for_decode
from mmkernels.layers.scan_connector import Mamba2ScanConnector

__all__ = [
    "GatedRMSNorm",
    "GroupedMamba2Mixer",
    "Mamba2Block",
    "Mamba2Mixer",
    "Mamba2ScanConnector",
    "MultiDirectionalMamba2",
    "Placement",
    "place_for_decode",
]
