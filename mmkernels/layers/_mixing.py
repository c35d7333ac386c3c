"""What the two Mamba-2 mixers share: argument checks, the short convolution and the scan under padding, initial draws.

Padding (attention_mask 0, on the left or on the right) is a token that is not there: the convolution does not see it,
its step size is exactly 0 so that the recurrent state passes unchanged, and the states returned are those after the
last real token.
"""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels._checks import Sizes
from mmkernels.errors import ConfigError, ShapeError
from mmkernels.ops.causal_conv1d.api import causal_conv1d
from mmkernels.ops.ssd.api import ssd_scan


def check_inputs(
    layer: str,
    d_model: int,
    u: Tensor,
    attention_mask: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    conv_state: Tensor | None,
    ssm_state: Tensor | None,
) -> None:
    """Check what the ops cannot: one description of the sequences, both states or none, the width of u."""
    sizes = Sizes(layer)
    sizes.set(d_model=d_model)
    sizes.bind("u", u, "batch seqlen d_model")
    if attention_mask is not None:
        sizes.bind("attention_mask", attention_mask, "batch seqlen", "It has one entry for each token of u.")
    given = {"attention_mask": attention_mask, "seq_idx": seq_idx, "cu_seqlens": cu_seqlens}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise ConfigError(
            f"{layer}: {named[0]} must be the only description of the sequences; got {named[1]} as well. "
            "Mark padding between packed sequences by a negative seq_idx."
        )
    if (conv_state is None) != (ssm_state is None):
        one, other = ("ssm_state", "conv_state") if conv_state is None else ("conv_state", "ssm_state")
        raise ConfigError(
            f"{layer}: {other} must be given together with {one}; got None. Both come from one earlier call."
        )


def require_divides(layer: str, small: str, by: int, large: str, whole: int) -> None:
    """Check a pair of sizes at construction."""
    if by < 1 or whole % by != 0:
        raise ShapeError(
            f"{layer}: {small} must divide {large}; got {small}={by}, {large}={whole}. Change one of them."
        )


def convolve(
    x: Tensor,
    conv: nn.Conv1d,
    *,
    attention_mask: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    conv_state: Tensor | None,
    return_states: bool,
) -> tuple[Tensor, Tensor | None]:
    """silu(causal conv(x)) with the parameters of `conv`, and the state after the last real token if asked for."""
    weight = conv.weight.squeeze(1)
    if attention_mask is None:
        out = causal_conv1d(
            x,
            weight,
            conv.bias,
            activation="silu",
            initial_states=conv_state,
            seq_idx=seq_idx,
            cu_seqlens=cu_seqlens,
            return_final_states=return_states,
        )
        return (out[0], out[1]) if isinstance(out, tuple) else (out, None)

    mask = attention_mask != 0
    x = torch.where(mask[..., None], x, 0)
    if conv_state is None:
        # Zeros on the left are what a fresh sequence starts from, and zeros on the right come too late to be seen.
        y = cast(Tensor, causal_conv1d(x, weight, conv.bias, activation="silu"))
        history = weight.shape[1] - 1
        return y, _last_inputs(x, mask, history) if return_states else None
    # With a state to continue from, the first real token must stand next to it: real tokens first, then back.
    order = torch.argsort(~mask, dim=1, stable=True)
    packed = x.gather(1, order[..., None].expand_as(x))
    y = cast(Tensor, causal_conv1d(packed, weight, conv.bias, activation="silu", initial_states=conv_state))
    y = y.gather(1, torch.argsort(order, dim=1)[..., None].expand_as(y))
    return y, _continued_inputs(packed, mask, conv_state) if return_states else None


def _last_inputs(x: Tensor, mask: Tensor, history: int) -> Tensor:
    # The `history` rows that end with the last real token; x is 0 at padding, and so are rows before the first token.
    batch, seqlen, dim = x.shape
    if seqlen == 0:
        return x.new_zeros(batch, dim, history)
    last = (mask * torch.arange(seqlen, device=x.device)).amax(1, keepdim=True)
    rows = last - history + 1 + torch.arange(history, device=x.device)
    found = x.gather(1, rows.clamp(min=0)[..., None].expand(-1, -1, dim))
    return torch.where((rows >= 0)[..., None], found, 0).transpose(1, 2).contiguous()


def _continued_inputs(packed: Tensor, mask: Tensor, conv_state: Tensor) -> Tensor:
    # Rows count .. count + history of [state | real tokens | padding]: the last `history` before the padding.
    history, dim = conv_state.shape[2], packed.shape[2]
    inputs = torch.cat([conv_state.transpose(1, 2).to(packed.dtype), packed], dim=1)
    rows = mask.sum(1, keepdim=True) + torch.arange(history, device=packed.device)
    return inputs.gather(1, rows[..., None].expand(-1, -1, dim)).transpose(1, 2).contiguous()


def step_size(dt: Tensor, dt_bias: Tensor, dt_limit: tuple[float, float]) -> Tensor:
    """clamp(softplus(dt + dt_bias), *dt_limit) in float32 (float64 for float64)."""
    acc = torch.promote_types(dt.dtype, torch.float32)
    step = F.softplus(dt.to(acc) + dt_bias.to(acc), threshold=20.0)
    return step if dt_limit == (0.0, math.inf) else step.clamp(*dt_limit)


def scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    dt_bias: Tensor | None,
    dt_limit: tuple[float, float],
    D: Tensor | None,
    z: Tensor | None,
    attention_mask: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int | None,
    ssm_state: Tensor | None,
    return_states: bool,
) -> tuple[Tensor, Tensor | None]:
    """ssd_scan in which padding does nothing to the state.  dt_bias None: dt is the final step size already."""
    if attention_mask is not None:
        dt = dt if dt_bias is None else step_size(dt, dt_bias, dt_limit)
        dt, dt_bias, dt_limit = torch.where((attention_mask != 0)[..., None], dt, 0), None, (0.0, math.inf)
    out = ssd_scan(
        x,
        dt,
        A,
        B,
        C,
        D=D,
        z=z,
        dt_bias=dt_bias,
        dt_softplus=dt_bias is not None,
        dt_limit=dt_limit,
        initial_states=ssm_state,
        seq_idx=seq_idx,
        cu_seqlens=cu_seqlens,
        chunk_size=chunk_size,
        return_final_states=return_states,
    )
    return (out[0], out[1]) if isinstance(out, tuple) else (out, None)


def scan_parameter(
    size: int | tuple[int, ...], device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Parameter:
    """A parameter of the recurrence: never below float32, excluded from weight decay (the flag optimizers look for)."""
    dtype = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
    parameter = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
    parameter._no_weight_decay = True  # type: ignore[attr-defined]
    return parameter


@torch.no_grad()
def draw_dt_bias(dt_bias: Tensor, low: float, high: float, floor: float) -> None:
    """Fill dt_bias with inverse softplus(dt), dt log-uniform in [low, high] and at least floor."""
    dt = torch.empty_like(dt_bias).uniform_(math.log(low), math.log(high)).exp_().clamp_(min=floor)
    dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))


@torch.no_grad()
def draw_log_uniform_rate(A_log: Tensor, low: float, high: float) -> None:
    """Fill A_log with log A, A uniform in [low, high]."""
    A_log.copy_(torch.empty_like(A_log).uniform_(low, high).log_())
