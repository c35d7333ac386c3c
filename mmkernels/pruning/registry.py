"""Pruners by name."""

import dataclasses
from typing import Any

from mmkernels.errors import ConfigError, nearest
from mmkernels.pruning.diverse import DivPrune, HiPrune, VisPruner
from mmkernels.pruning.in_decoder import FastV, PyramidDrop
from mmkernels.pruning.merged import PruMerge, PruMergePlus, VisionZip
from mmkernels.pruning.pruner import TokenPruner
from mmkernels.pruning.scored import VTCCLS, FasterVLM, LeastCLS, RandomPruner, UniformGrid
from mmkernels.pruning.sparsevlm import SparseVLM, SparseVLMPlus
from mmkernels.pruning.tome import ToMe, ToMeAfter

_CLASSES: dict[str, type[TokenPruner]] = {
    kind.name: kind
    for kind in (
        VTCCLS,
        FasterVLM,
        VisionZip,
        VisPruner,
        PruMerge,
        PruMergePlus,
        DivPrune,
        HiPrune,
        ToMe,
        ToMeAfter,
        FastV,
        SparseVLM,
        SparseVLMPlus,
        PyramidDrop,
        RandomPruner,
        UniformGrid,
        LeastCLS,
    )
}


def pruners() -> tuple[str, ...]:
    """The names `get_pruner` knows."""
    return tuple(_CLASSES)


def pruner_class(name: str) -> type[TokenPruner]:
    """The class behind a name: its stage, its options, its documentation."""
    if name not in _CLASSES:
        raise ConfigError(f"get_pruner: name must be that of a pruner; got {name!r}. {nearest(str(name), _CLASSES)}")
    return _CLASSES[name]


def get_pruner(name: str, **options: Any) -> TokenPruner:
    """Make a pruner of visual tokens.

    Args:
        name: one of `mmkernels.pruning.pruners()`.
        **options: of its class; most want exactly one of num_keep, keep_ratio and (if they score) keep_mass.

    Returns:
        pruner: a TokenPruner, to give to `mmkernels.prune`.

    Raises:
        ConfigError: an unknown name or option, or a value out of range.
        DtypeError: a value of the wrong type.

    Example:
        >>> import mmkernels
        >>> mmkernels.get_pruner("vtc_cls", num_keep=64)
        get_pruner('vtc_cls', num_keep=64)
    """
    kind = pruner_class(name)
    known = [f.name for f in dataclasses.fields(kind)]
    for option in options:
        if option not in known:
            raise ConfigError(f"get_pruner: {name} must get options it has; got {option!r}. {nearest(option, known)}")
    return kind(**options)
