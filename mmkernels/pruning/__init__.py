"""Pruners of visual tokens: one interface for the family.  They take tensors, not models; see `mmkernels.prune`."""

from mmkernels.pruning.diverse import DivPrune, HiPrune, VisPruner
from mmkernels.pruning.in_decoder import FastV, PyramidDrop
from mmkernels.pruning.merged import PruMerge, PruMergePlus, VisionZip
from mmkernels.pruning.pruner import (
    DecoderPruner,
    DecoderStep,
    Encoder,
    Extras,
    Pruned,
    RowAttention,
    Tap,
    TokenPruner,
    VisionInputs,
)
from mmkernels.pruning.registry import get_pruner, pruner_class, pruners
from mmkernels.pruning.scored import VTCCLS, FasterVLM, LeastCLS, RandomPruner, ScorePruner, UniformGrid
from mmkernels.pruning.sparsevlm import SparseVLM, SparseVLMPlus
from mmkernels.pruning.tome import ToMe, ToMeAfter

__all__ = [
    "DecoderPruner",
    "DecoderStep",
    "DivPrune",
    "Encoder",
    "Extras",
    "FastV",
    "FasterVLM",
    "HiPrune",
    "LeastCLS",
    "PruMerge",
    "PruMergePlus",
    "Pruned",
    "PyramidDrop",
    "RandomPruner",
    "RowAttention",
    "ScorePruner",
    "SparseVLM",
    "SparseVLMPlus",
    "Tap",
    "ToMe",
    "ToMeAfter",
    "TokenPruner",
    "UniformGrid",
    "VTCCLS",
    "VisPruner",
    "VisionInputs",
    "VisionZip",
    "get_pruner",
    "pruner_class",
    "pruners",
]
