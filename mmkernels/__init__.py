"""Kernels, layers and reference models that make multimodal LLMs cheap: linear-time mixing in place of attention.

Importing this package imports torch and nothing else heavy; every public name is resolved on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from mmkernels._version import __version__

_PUBLIC = {
    "mmkernels._dispatch": ("backends", "explain", "use_backend"),
    "mmkernels.errors": (
        "MMKernelsError",
        "ShapeError",
        "DtypeError",
        "DeviceError",
        "BackendError",
        "ConfigError",
        "CheckpointError",
        "DataError",
    ),
    "mmkernels.ops": ("causal_conv1d", "causal_conv1d_update", "gated_rms_norm", "ssd_scan", "ssd_update"),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}
_SUBMODULES = ("data", "distill", "interop", "layers", "models", "ops", "testing")

__all__ = ["__version__", *_HOME, *_SUBMODULES]

if TYPE_CHECKING:
    from mmkernels._dispatch import backends, explain, use_backend
    from mmkernels.errors import (
        BackendError,
        CheckpointError,
        ConfigError,
        DataError,
        DeviceError,
        DtypeError,
        MMKernelsError,
        ShapeError,
    )
    from mmkernels.ops import causal_conv1d, causal_conv1d_update, gated_rms_norm, ssd_scan, ssd_update


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    elif name in _SUBMODULES:
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
