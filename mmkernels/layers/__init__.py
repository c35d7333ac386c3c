"""State-space mixers as nn.Modules: they take sizes, not configurations, and their states go in and come out."""

from mmkernels.layers.grouped_mamba2 import GroupedMamba2Mixer
from mmkernels.layers.mamba2 import Mamba2Block, Mamba2Mixer
from mmkernels.layers.norm import GatedRMSNorm
from mmkernels.layers.placement import Placement, place_for_decode

__all__ = ["GatedRMSNorm", "GroupedMamba2Mixer", "Mamba2Block", "Mamba2Mixer", "Placement", "place_for_decode"]
