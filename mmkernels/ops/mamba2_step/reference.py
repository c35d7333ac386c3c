"""The oracle of mamba2_step: the formulas of a Mamba-2 block for one token, one head after the other.

Dao and Gu, "Transformers are SSMs" (2024), section 7.1.  What one part hands to the next is rounded to the dtype of the
weights, as in a chain of layers.
"""

import torch
from torch import Tensor


def mamba2_step(
    *,
    hidden: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    in_weight: Tensor,
    conv_weight: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    D: Tensor,
    out_weight: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    in_bias: Tensor | None,
    conv_bias: Tensor | None,
    gate_weight: Tensor | None,
    out_bias: Tensor | None,
    eps: float,
    gate_eps: float,
    dt_limit: tuple[float, float],
    norm_before_gate: bool,
    residual_in_fp32: bool,
) -> tuple[Tensor, Tensor | None]:
    """See mmkernels.mamba2_step; always (out, residual sum or None)."""
    work = torch.promote_types(hidden.dtype, torch.float32)

    def wide(t: Tensor) -> Tensor:
        return t.to(work)

    def handed_on(t: Tensor) -> Tensor:
        return t.to(in_weight.dtype).to(work)

    def project(t: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = torch.stack([(wide(weight) * row).sum(-1) for row in t]) if t.shape[0] else t.new_zeros(0, weight.shape[0])
        return handed_on(y if bias is None else y + wide(bias))

    u, total = wide(hidden), None
    if norm_weight is not None:
        dtype = hidden.dtype if residual is None else torch.promote_types(hidden.dtype, residual.dtype)
        dtype = torch.promote_types(dtype, torch.float32) if residual_in_fp32 else dtype
        total = (u if residual is None else u + wide(residual)).to(dtype)
        u = wide(total)
        u = handed_on(u / torch.sqrt((u**2).sum(-1, keepdim=True) / u.shape[-1] + eps) * wide(norm_weight))
    heads, headdim, dstate = ssm_state.shape[1:]
    inner, taps = heads * headdim, conv_weight.reshape(conv_weight.shape[0], -1)
    groups, width = (taps.shape[0] - inner) // (2 * dstate), taps.shape[1]
    z, raw, dt = project(u, in_weight, in_bias).split([inner, taps.shape[0], heads], dim=-1)

    window = torch.cat([wide(conv_state), raw[..., None]], dim=-1)
    conv = torch.zeros_like(raw) if conv_bias is None else wide(conv_bias).expand_as(raw)
    for k in range(width):
        conv = conv + wide(taps)[:, k] * window[..., window.shape[-1] - width + k]
    conv_state.copy_(window[..., 1:])
    conv = handed_on(conv * torch.sigmoid(conv))

    step = (dt + wide(dt_bias)).clamp(max=20).exp().log1p().where(dt + wide(dt_bias) <= 20, dt + wide(dt_bias))
    step = step.clamp(*dt_limit)
    ys = []
    for h in range(heads):
        g = h * groups // heads
        x = conv[:, h * headdim : (h + 1) * headdim]
        B = conv[:, inner + g * dstate : inner + (g + 1) * dstate]
        C = conv[:, inner + (groups + g) * dstate : inner + (groups + g + 1) * dstate]
        d = step[:, h, None, None]
        state = torch.exp(-wide(A_log).exp()[h] * d) * wide(ssm_state[:, h]) + d * x[:, :, None] * B[:, None]
        ssm_state[:, h] = state.to(ssm_state.dtype)
        ys.append((state * C[:, None]).sum(-1) + wide(D)[h] * x)
    y, gate = torch.cat(ys, dim=-1), z * torch.sigmoid(z)

    if gate_weight is None:
        y = handed_on(y * gate)
    else:
        v = handed_on(y)
        v = v if norm_before_gate else v * gate
        v = v.unflatten(-1, (groups, inner // groups))
        v = (v / torch.sqrt((v**2).sum(-1, keepdim=True) / v.shape[-1] + gate_eps)).flatten(-2) * wide(gate_weight)
        y = handed_on(v * gate if norm_before_gate else v)
    return project(y, out_weight, out_bias).to(out_weight.dtype), total
