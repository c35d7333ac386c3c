"""State-space mixers as nn.Modules: they take sizes, not configurations, and their states go in and come out."""

from mmkernels.layers.grouped_mamba2 import GroupedMamba2Mixer
from mmkernels.layers.mamba2 import Mamba2Block, Mamba2Mixer
from mmkernels.layers.multi_directional import MultiDirectionalMamba2
from mmkernels.layers.norm import GatedRMSNorm
from mmkernels.layers.placement import Placement, place_for_decode
from mmkernels.layers.scan_connector import Mamba2ScanConnector
from mmkernels.layers.vision_scans import SS2DMamba2, VimMamba2

__all__ = [
    "GatedRMSNorm",
    "GroupedMamba2Mixer",
    "Mamba2Block",
    "Mamba2Mixer",
    "Mamba2ScanConnector",
    "MultiDirectionalMamba2",
    "Placement",
    "SS2DMamba2",
    "VimMamba2",
    "place_for_decode",
]
