"""Backend "native" of the ops of this folder: the C++ scan and convolution once for each direction, and the merge.

Kernels read x, B, C and dt where an order says, in their own dtype and through their strides: a tensor that all
directions share is expanded over them, not copied.  Gradients of what is expanded are added by autograd.
"""

from typing import Any

import torch
from torch import Tensor

from mmkernels import _native
from mmkernels._gradients import wants_gradient
from mmkernels.ops.scan2d import _autograd
from mmkernels.ops.scan2d.directions import convolve_then_scan, each
from mmkernels.ops.scan2d.orders import Scan, orders_of

_native.require()
_library = torch.ops.mmkernels
_autograd.register_scan(
    _library.ssd_scan_2d.default, _library.ssd_scan_2d_fwd.default, _library.ssd_scan_2d_bwd.default
)
_autograd.register_fused(_library.conv_ssd_scan_2d.default)
_autograd.register_convolution(
    _library.causal_conv1d_2d.default, _library.causal_conv1d_2d_fwd.default, _library.causal_conv1d_2d_bwd.default
)
_autograd.register_merge(
    _library.merged_gated_rms_norm.default,
    _library.merged_gated_rms_norm_fwd.default,
    _library.merged_gated_rms_norm_bwd.default,
)


def ssd_scan_2d(
    *,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    scans: tuple[Scan, ...],
    height: int,
    width: int,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    chunk_size: int | None,
) -> Tensor:
    """See mmkernels.ssd_scan_2d."""
    work, count = torch.promote_types(x.dtype, torch.float32), len(scans)
    orders = orders_of(scans, height, width)
    x, dt, B, C = each(x, count, 4), each(dt.to(work), count, 3), each(B, count, 4), each(C, count, 4)
    A = A.to(work)
    D, dt_bias = (None if t is None else t.to(work) for t in (D, dt_bias))
    op = _library.ssd_scan_2d_fwd if wants_gradient(x, dt, A, B, C, D, dt_bias) else _library.ssd_scan_2d
    low, high = float(dt_limit[0]), float(dt_limit[1])
    y: Tensor = op.default(x, dt, A, B, C, D, dt_bias, orders, dt_softplus, low, high, chunk_size or 0)
    return y


def causal_conv1d_2d(
    *,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scans: tuple[Scan, ...],
    height: int,
    width: int,
    activation: str | None,
) -> Tensor:
    """See mmkernels.causal_conv1d_2d."""
    op = _library.causal_conv1d_2d_fwd if wants_gradient(x, weight, bias) else _library.causal_conv1d_2d
    orders = orders_of(scans, height, width)
    y: Tensor = op.default(each(x, len(scans), 3), weight, bias, orders, activation == "silu")
    return y


def conv_ssd_scan_2d(**args: Any) -> Tensor:
    """See mmkernels.conv_ssd_scan_2d."""
    tracked = ("xBC", "dt", "conv_weight", "A", "conv_bias", "D", "dt_bias")
    if wants_gradient(*(args[name] for name in tracked)):
        return convolve_then_scan(causal_conv1d_2d, ssd_scan_2d, **args)
    return _convolved_as_read(**args)


def _convolved_as_read(
    *,
    xBC: Tensor,
    dt: Tensor,
    conv_weight: Tensor,
    A: Tensor,
    headdim: int,
    ngroups: int,
    conv_bias: Tensor | None,
    activation: str | None,
    D: Tensor | None,
    dt_bias: Tensor | None,
    scans: tuple[Scan, ...],
    height: int,
    width: int,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    chunk_size: int | None,
) -> Tensor:
    """One op, which has no gradients: the scan convolves x as it packs it."""
    work, count = torch.promote_types(xBC.dtype, torch.float32), len(scans)
    dt, A = dt.to(work), A.to(work)
    D, dt_bias = (None if t is None else t.to(work) for t in (D, dt_bias))
    y: Tensor = _library.conv_ssd_scan_2d.default(
        each(xBC, count, 3),
        each(dt, count, 3),
        conv_weight,
        conv_bias,
        A,
        D,
        dt_bias,
        orders_of(scans, height, width),
        headdim,
        ngroups,
        activation == "silu",
        dt_softplus,
        float(dt_limit[0]),
        float(dt_limit[1]),
        chunk_size or 0,
    )
    return y


def merged_gated_rms_norm(
    *, y: Tensor, weight: Tensor, z: Tensor | None, eps: float, group_size: int, reduction: str
) -> Tensor:
    """See mmkernels.merged_gated_rms_norm."""
    if z is not None and z.dtype != y.dtype:
        # The kernels read y and z in one dtype: the one that holds both exactly.
        common = torch.promote_types(y.dtype, z.dtype)
        wide = merged_gated_rms_norm(
            y=y.to(common), weight=weight, z=z.to(common), eps=eps, group_size=group_size, reduction=reduction
        )
        return wide.to(y.dtype)
    mean = reduction == "mean"
    if wants_gradient(y, weight, z):
        out: Tensor = _library.merged_gated_rms_norm_fwd.default(y, weight, z, eps, group_size, mean)[0]
    else:
        out = _library.merged_gated_rms_norm.default(y, weight, z, eps, group_size, mean)
    return out
