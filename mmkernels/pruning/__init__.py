"""Pruners of visual tokens: one interface for the family.  They take tensors, not models; see `mmkernels.prune`."""

from mmkernels.pruning.in_decoder import FastV, PyramidDrop
from mmkernels.pruning.pruner import (
    DecoderPruner,
    DecoderStep,
    Encoder,
    Extras,
    Pruned,
    Tap,
    TokenPruner,
    VisionInputs,
)
from mmkernels.pruning.registry import get_pruner, pruner_class, pruners
from mmkernels.pruning.scored import VTCCLS, FasterVLM, LeastCLS, RandomPruner, ScorePruner, UniformGrid

__all__ = [
    "DecoderPruner",
    "DecoderStep",
    "Encoder",
    "Extras",
    "FastV",
    "FasterVLM",
    "LeastCLS",
    "Pruned",
    "PyramidDrop",
    "RandomPruner",
    "ScorePruner",
    "Tap",
    "TokenPruner",
    "UniformGrid",
    "VTCCLS",
    "VisionInputs",
    "get_pruner",
    "pruner_class",
    "pruners",
]
