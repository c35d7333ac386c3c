"""The oracle of gated_rms_norm: the formula, group by group.

y = n(x silu(z)) w + b, or (n(x) w + b) silu(z), with n(v) = v / sqrt(mean(v^2) + eps) over a group.
"""

import torch
from einops import rearrange
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
    """See mmkernels.gated_rms_norm; one group after the other."""
    acc = torch.promote_types(x.dtype, torch.float32)
    groups = rearrange(x.to(acc), "... (g c) -> g ... c", c=group_size)
    gates = None
    if z is not None:
        gates = rearrange(z.to(acc) * torch.sigmoid(z.to(acc)), "... (g c) -> g ... c", c=group_size)
    outs = []
    for i, v in enumerate(groups):
        gate = None if gates is None else gates[i]
        part = slice(0, group_size) if weight.shape[0] == group_size else slice(i * group_size, (i + 1) * group_size)
        if gate is not None and not norm_before_gate:
            v = v * gate
        v = v / torch.sqrt((v**2).sum(-1, keepdim=True) / group_size + eps)
        v = v * weight.to(acc)[part]
        if bias is not None:
            v = v + bias.to(acc)[part]
        if gate is not None and norm_before_gate:
            v = v * gate
        outs.append(v)
    return torch.cat(outs, dim=-1).to(x.dtype)
