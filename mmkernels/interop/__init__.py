"""Seams to other libraries, one file each.  Nothing here is imported by `import mmkernels`."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmkernels.interop.mamba2_models import run_on_mmkernels as run_on_mmkernels
    from mmkernels.interop.mma import make_modality_mutual as make_modality_mutual
    from mmkernels.interop.prune import prune as prune

_HOME = {"make_modality_mutual": "mma", "prune": "prune", "run_on_mmkernels": "mamba2_models"}

__all__ = ["make_modality_mutual", "prune", "run_on_mmkernels"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
