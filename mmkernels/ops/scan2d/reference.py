"""The oracles: write the grid out as K sequences, run the one-dimensional oracle on each, put the results back.

Reverse scans are permutations like any other here, so that nothing is shared with the reverse mode of the kernels.
"""

import torch
from torch import Tensor

from mmkernels.ops.causal_conv1d import reference as conv_reference
from mmkernels.ops.gated_rms_norm import reference as norm_reference
from mmkernels.ops.scan2d.orders import Scan, heads_and_keys, order_of
from mmkernels.ops.ssd import reference as ssd_reference


def _of(tensor: Tensor, k: int, order: Tensor, shared_dims: int) -> Tensor:
    """What direction k reads of a tensor, in its order."""
    own = tensor if tensor.dim() == shared_dims else tensor[:, k]
    return own.index_select(1, order)


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
    ys = []
    for k, scan in enumerate(scans):
        order = order_of(scan, height, width, x.device)
        y = ssd_reference.ssd_scan(
            x=_of(x, k, order, 4),
            dt=_of(dt, k, order, 3),
            A=A[k],
            B=_of(B, k, order, 4),
            C=_of(C, k, order, 4),
            D=None if D is None else D[k],
            z=None,
            dt_bias=None if dt_bias is None else dt_bias[k],
            dt_softplus=dt_softplus,
            dt_limit=dt_limit,
            initial_states=None,
            seq_idx=None,
            cu_seqlens=None,
            chunk_size=None,
            reverse=False,
            return_final_states=False,
        )
        assert isinstance(y, Tensor)  # no final states were asked for
        ys.append(torch.zeros_like(y).index_copy(1, order, y))
    return torch.stack(ys, dim=1)


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
    ys = []
    for k, scan in enumerate(scans):
        order = order_of(scan, height, width, x.device)
        y = conv_reference.causal_conv1d(
            x=_of(x, k, order, 3),
            weight=weight[k],
            bias=None if bias is None else bias[k],
            activation=activation,
            initial_states=None,
            seq_idx=None,
            cu_seqlens=None,
            reverse=False,
            return_final_states=False,
        )
        assert isinstance(y, Tensor)  # no final states were asked for
        ys.append(torch.zeros_like(y).index_copy(1, order, y))
    return torch.stack(ys, dim=1)


def conv_ssd_scan_2d(
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
    """`mmkernels.conv_ssd_scan_2d`: one part after the other."""
    convolved = causal_conv1d_2d(
        x=xBC,
        weight=conv_weight,
        bias=conv_bias,
        scans=scans,
        height=height,
        width=width,
        activation=activation,
    )
    x, B, C = heads_and_keys(convolved, A.shape[1], headdim, ngroups)
    return ssd_scan_2d(
        x=x,
        dt=dt,
        A=A,
        B=B,
        C=C,
        D=D,
        dt_bias=dt_bias,
        scans=scans,
        height=height,
        width=width,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
        chunk_size=chunk_size,
    )


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
