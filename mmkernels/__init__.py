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
    "mmkernels.ops.causal_conv1d.api": ("causal_conv1d", "causal_conv1d_update"),
    "mmkernels.ops.decode_linear.api": ("decode_linear",),
    "mmkernels.ops.gated_rms_norm.api": ("gated_rms_norm",),
    "mmkernels.ops.mma_attention.api": ("mma_attention",),
    "mmkernels.ops.mma_attention.mask": ("MMAMask", "mma_mask"),
    "mmkernels.ops.mma_attention.spans": ("build_mutual_spans", "check_no_label_leak"),
    "mmkernels.ops.mamba2_step.api": ("mamba2_step",),
    "mmkernels.ops.scan2d.api": ("causal_conv1d_2d", "conv_ssd_scan_2d", "ssd_scan_2d"),
    "mmkernels.ops.scan2d.crossing": ("cross_merge", "cross_scan"),
    "mmkernels.ops.scan2d.merge": ("merged_gated_rms_norm",),
    "mmkernels.ops.scan2d.orders": ("scan_permutation",),
    "mmkernels.ops.ssd.api": ("ssd_scan", "ssd_update"),
    "mmkernels.ops.token_pruning.api": ("PrunedTokens", "cls_attention_scores", "prune_tokens"),
    "mmkernels.ops.token_pruning.merging": ("MergePlan", "bipartite_soft_matching", "merge_tokens"),
    "mmkernels.ops.token_pruning.received": ("attention_column_scores",),
    "mmkernels.pruning.registry": ("get_pruner",),
    "mmkernels.interop.prune": ("prune",),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}
_SUBMODULES = ("data", "distill", "interop", "layers", "models", "ops", "pruning", "testing")

__all__ = ["__version__", *_HOME, *_SUBMODULES]

if TYPE_CHECKING:
    from mmkernels._dispatch import backends as backends
    from mmkernels._dispatch import explain as explain
    from mmkernels._dispatch import use_backend as use_backend
    from mmkernels.errors import BackendError as BackendError
    from mmkernels.errors import CheckpointError as CheckpointError
    from mmkernels.errors import ConfigError as ConfigError
    from mmkernels.errors import DataError as DataError
    from mmkernels.errors import DeviceError as DeviceError
    from mmkernels.errors import DtypeError as DtypeError
    from mmkernels.errors import MMKernelsError as MMKernelsError
    from mmkernels.errors import ShapeError as ShapeError
    from mmkernels.interop.prune import prune as prune
    from mmkernels.ops.causal_conv1d.api import causal_conv1d as causal_conv1d
    from mmkernels.ops.causal_conv1d.api import causal_conv1d_update as causal_conv1d_update
    from mmkernels.ops.decode_linear.api import decode_linear as decode_linear
    from mmkernels.ops.gated_rms_norm.api import gated_rms_norm as gated_rms_norm
    from mmkernels.ops.mamba2_step.api import mamba2_step as mamba2_step
    from mmkernels.ops.mma_attention.api import mma_attention as mma_attention
    from mmkernels.ops.mma_attention.mask import MMAMask as MMAMask
    from mmkernels.ops.mma_attention.mask import mma_mask as mma_mask
    from mmkernels.ops.mma_attention.spans import build_mutual_spans as build_mutual_spans
    from mmkernels.ops.mma_attention.spans import check_no_label_leak as check_no_label_leak
    from mmkernels.ops.scan2d.api import causal_conv1d_2d as causal_conv1d_2d
    from mmkernels.ops.scan2d.api import conv_ssd_scan_2d as conv_ssd_scan_2d
    from mmkernels.ops.scan2d.api import ssd_scan_2d as ssd_scan_2d
    from mmkernels.ops.scan2d.crossing import cross_merge as cross_merge
    from mmkernels.ops.scan2d.crossing import cross_scan as cross_scan
    from mmkernels.ops.scan2d.merge import merged_gated_rms_norm as merged_gated_rms_norm
    from mmkernels.ops.scan2d.orders import scan_permutation as scan_permutation
    from mmkernels.ops.ssd.api import ssd_scan as ssd_scan
    from mmkernels.ops.ssd.api import ssd_update as ssd_update
    from mmkernels.ops.token_pruning.api import PrunedTokens as PrunedTokens
    from mmkernels.ops.token_pruning.api import cls_attention_scores as cls_attention_scores
    from mmkernels.ops.token_pruning.api import prune_tokens as prune_tokens
    from mmkernels.ops.token_pruning.merging import MergePlan as MergePlan
    from mmkernels.ops.token_pruning.merging import bipartite_soft_matching as bipartite_soft_matching
    from mmkernels.ops.token_pruning.merging import merge_tokens as merge_tokens
    from mmkernels.ops.token_pruning.received import attention_column_scores as attention_column_scores
    from mmkernels.pruning.registry import get_pruner as get_pruner


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
