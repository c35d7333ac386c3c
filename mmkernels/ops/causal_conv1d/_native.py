"""Backend "native" of causal_conv1d and its update: csrc/cpu/causal_conv1d*.cpp; fakes and gradients: _autograd.py."""

import torch
from torch import Tensor

from mmkernels import _native
from mmkernels._gradients import wants_gradient
from mmkernels.ops.causal_conv1d import _autograd

_native.require()
_inference = torch.ops.mmkernels.causal_conv1d.default
_fwd = torch.ops.mmkernels.causal_conv1d_fwd.default
_bwd = torch.ops.mmkernels.causal_conv1d_bwd.default
_update = torch.ops.mmkernels.causal_conv1d_update.default
update_op = _update._op  # without Python's frame around it
_autograd.register(_inference, _fwd, _bwd, _update)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    return_final_states: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """See mmkernels.causal_conv1d."""
    if initial_states is not None and initial_states.dtype != x.dtype:
        initial_states = initial_states.to(x.dtype)  # states are raw inputs; autograd converts the gradient back
    op = _fwd if wants_gradient(x, weight, bias, initial_states) else _inference
    silu = activation == "silu"
    y, final = op(x, weight, bias, initial_states, seq_idx, cu_seqlens, silu, reverse, return_final_states)
    return (y, final) if return_final_states else y


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    state_indices: Tensor | None,
) -> Tensor:
    """See mmkernels.causal_conv1d_update."""
    silu = activation == "silu"
    if (x.dtype == torch.float64) == (conv_state.dtype == torch.float64):
        return _update(x, conv_state, weight, bias, silu, state_indices)
    # Everything in float64, which holds either dtype exactly: an untouched slot is the same after the round trip.
    wide = conv_state.double()
    y = _update(x.double(), wide, weight, bias, silu, state_indices).to(x.dtype)
    if wide is not conv_state:
        conv_state.copy_(wide)
    return y
