"""Backend "torch" of gated_rms_norm: the formula on whole tensors; a compiler fuses it into one pass."""

import torch
import torch.nn.functional as F
from torch import Tensor


def gated_rms_norm(
    x: Tensor,
    weight: Tensor,
    z: Tensor | None,
    bias: Tensor | None,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
) -> Tensor:
    """See mmkernels.gated_rms_norm."""
    acc = torch.promote_types(x.dtype, torch.float32)
    v = x.to(acc)
    gate = None if z is None else F.silu(z.to(acc))
    if gate is not None and not norm_before_gate:
        v = v * gate
    groups = x.shape[-1] // group_size
    grouped = v.unflatten(-1, (groups, group_size))
    grouped = grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + eps)
    shape = (groups, group_size) if weight.shape[0] == x.shape[-1] else (group_size,)
    grouped = grouped * weight.to(acc).reshape(shape)
    if bias is not None:
        grouped = grouped + bias.to(acc).reshape(shape)
    v = grouped.flatten(-2)
    if gate is not None and norm_before_gate:
        v = v * gate
    return v.to(x.dtype)
