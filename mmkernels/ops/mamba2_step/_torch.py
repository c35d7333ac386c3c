"""Backend "torch" of mamba2_step: the torch backends of its parts, one after the other."""

import torch
from torch import Tensor

from mmkernels.ops.causal_conv1d._torch import causal_conv1d_update
from mmkernels.ops.decode_linear._torch import decode_linear
from mmkernels.ops.gated_rms_norm._torch import gated_rms_norm
from mmkernels.ops.ssd._torch_update import ssd_update


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
    u, total = hidden, None
    if norm_weight is not None:
        total = hidden if residual is None else residual + hidden
        if residual_in_fp32:
            total = total.to(torch.promote_types(total.dtype, torch.float32))
        u = gated_rms_norm(total, norm_weight, None, None, eps, total.shape[-1], False).to(in_weight.dtype)
    heads, headdim, dstate = ssm_state.shape[1:]
    inner, taps = heads * headdim, conv_weight.reshape(conv_weight.shape[0], conv_weight.shape[-1])
    bc = taps.shape[0] - inner
    z, xBC, dt = decode_linear(u, in_weight, in_bias).split([inner, taps.shape[0], heads], dim=-1)
    xBC = causal_conv1d_update(
        x=xBC, conv_state=conv_state, weight=taps, bias=conv_bias, activation="silu", state_indices=None
    )
    x, B, C = xBC.split([inner, bc // 2, bc // 2], dim=-1)
    work = torch.promote_types(A_log.dtype, torch.float32)
    y = ssd_update(
        state=ssm_state,
        x=x.unflatten(-1, (heads, headdim)),
        dt=dt,
        A=-torch.exp(A_log.to(work)),
        B=B.unflatten(-1, (bc // (2 * dstate), dstate)),
        C=C.unflatten(-1, (bc // (2 * dstate), dstate)),
        D=D,
        z=z.unflatten(-1, (heads, headdim)) if gate_weight is None else None,
        dt_bias=dt_bias,
        dt_softplus=True,
        dt_limit=dt_limit,
        state_indices=None,
    ).flatten(-2)
    if gate_weight is not None:
        group = inner // (bc // (2 * dstate))
        y = gated_rms_norm(y, gate_weight, z, None, gate_eps, group, norm_before_gate)
    return decode_linear(y, out_weight, out_bias), total
