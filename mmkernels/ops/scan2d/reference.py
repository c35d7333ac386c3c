"""The oracles: write the grid out as K sequences, run the one-dimensional oracle on each, put the results back.

Reverse scans are permutations like any other here, so that nothing is shared with the reverse mode of the kernels.
"""

from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.causal_conv1d import reference as conv_reference
from mmkernels.ops.gated_rms_norm import reference as norm_reference
from mmkernels.ops.scan2d.directions import WHOLE, by_orders, convolve_then_scan, own, row
from mmkernels.ops.scan2d.orders import Scan, order_of
from mmkernels.ops.ssd import reference as ssd_reference


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
    """`mmkernels.ssd_scan_2d`, direction by direction."""

    def direction(k: int, order: Tensor) -> Any:
        return ssd_reference.ssd_scan(
            x=own(x, k, 4).index_select(1, order),
            dt=own(dt, k, 3).index_select(1, order),
            A=A[k],
            B=own(B, k, 4).index_select(1, order),
            C=own(C, k, 4).index_select(1, order),
            D=row(D, k),
            z=None,
            dt_bias=row(dt_bias, k),
            dt_softplus=dt_softplus,
            dt_limit=dt_limit,
            chunk_size=None,
            reverse=False,
            **WHOLE,
        )

    return by_orders([order_of(scan, height, width, x.device) for scan in scans], direction)


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
    """`mmkernels.causal_conv1d_2d`, direction by direction."""

    def direction(k: int, order: Tensor) -> Any:
        read = own(x, k, 3).index_select(1, order)
        return conv_reference.causal_conv1d(
            x=read, weight=weight[k], bias=row(bias, k), activation=activation, reverse=False, **WHOLE
        )

    return by_orders([order_of(scan, height, width, x.device) for scan in scans], direction)


def conv_ssd_scan_2d(**args: Any) -> Tensor:
    """`mmkernels.conv_ssd_scan_2d`: one part after the other."""
    return convolve_then_scan(causal_conv1d_2d, ssd_scan_2d, **args)


def merged_gated_rms_norm(
    *, y: Tensor, weight: Tensor, z: Tensor | None, eps: float, group_size: int, reduction: str
) -> Tensor:
    """`mmkernels.merged_gated_rms_norm`: K gated norms, added up."""
    work = torch.promote_types(y.dtype, torch.float32)
    total = torch.zeros_like(y[:, 0], dtype=work)
    for k in range(y.shape[1]):
        total = total + norm_reference.gated_rms_norm(
            x=y[:, k].to(work), weight=weight, z=z, bias=None, eps=eps, group_size=group_size, norm_before_gate=False
        )
    return (total / y.shape[1] if reduction == "mean" else total).to(y.dtype)
