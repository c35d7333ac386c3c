"""Fake kernels and gradients of the library ops behind causal_conv1d, the same for native and Triton kernels."""

from typing import Any

import torch
from torch import Tensor

from mmkernels._checks import same_device
from mmkernels._gradients import second_order

_TENSORS = 6  # leading arguments of the op, of which the first 4 are differentiable
_DIFFERENTIABLE = 4


def register(inference: Any, fwd: Any, bwd: Any, update: Any) -> None:
    """Tell torch what the four ops (csrc/registration.cpp) return, and how the first three are differentiated, twice.

    Args:
        inference: (y, final_states).
        fwd: the same.
        bwd: gradients of x, weight, bias, initial_states; empty where there is none.
        update: y; it has no gradient.
    """
    torch.library.register_fake(inference)(_fake)
    torch.library.register_fake(fwd)(_fake)
    torch.library.register_fake(bwd)(_bwd_fake)
    torch.library.register_fake(update)(_update_fake)

    def _fwd_backward(ctx: Any, grad_y: Tensor | None, grad_final: Tensor | None) -> tuple[Tensor | None, ...]:
        lacking = (None,) * (_TENSORS - _DIFFERENTIABLE + 3)
        tensors = ctx.saved_tensors
        grad_final = grad_final if ctx.final else None
        if grad_y is None and grad_final is None:
            return (None,) * _DIFFERENTIABLE + lacking
        x, _, bias, initial_states = tensors[:_DIFFERENTIABLE]
        grad_y = torch.zeros_like(x) if grad_y is None else grad_y
        parameters = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        of_x, of_weight, of_bias, of_initial = bwd(grad_y, grad_final, *tensors, ctx.silu, ctx.reverse, parameters)
        return (
            of_x,
            of_weight if parameters else None,
            of_bias if parameters and bias is not None else None,
            None if initial_states is None else of_initial,
            *lacking,
        )

    torch.library.register_autograd(fwd, _fwd_backward, setup_context=_fwd_setup)
    torch.library.register_autograd(bwd, _bwd_backward, setup_context=_bwd_setup)


def _fake(
    x: Tensor, weight: Tensor, bias: Any, initial_states: Any, seq_idx: Any, cu_seqlens: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = (rows, x.shape[2], weight.shape[1] - 1) if rest[-1] else (0,)
    return x.new_empty(x.shape), x.new_empty(final)


def _bwd_fake(
    grad_y: Tensor,
    grad_final: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_states: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(grad_x, grad_weight, grad_bias, grad_initial_states); empty where there is none."""
    parameters = rest[-1]
    grad_weight = weight.new_empty(weight.shape if parameters else (0,))
    kept_bias = bias if parameters else None
    grad_bias = (weight if bias is None else bias).new_empty((0,) if kept_bias is None else kept_bias.shape)
    return (
        x.new_empty(x.shape),
        grad_weight,
        grad_bias,
        x.new_empty((0,) if initial_states is None else initial_states.shape),
    )


def _update_fake(x: Tensor, conv_state: Tensor, weight: Tensor, *others: Any) -> Tensor:
    # A direct call with some tensors on "meta" arrives here, unchecked.
    optional = zip(("bias", "state_indices"), (o for o in others if not isinstance(o, bool)), strict=False)
    same_device("causal_conv1d_update", x=x, conv_state=conv_state, weight=weight, **dict(optional))
    return x.new_empty(x.shape)


def _fwd_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:_TENSORS])
    ctx.silu, ctx.reverse, ctx.final = inputs[_TENSORS:]
    if not ctx.final:
        ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _bwd_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[: _TENSORS + 2])
    ctx.silu, ctx.reverse, _ = inputs[_TENSORS + 2 :]
    ctx.set_materialize_grads(False)


def _bwd_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    from mmkernels.ops.causal_conv1d import api

    grad_y, grad_final, *tensors = ctx.saved_tensors
    inputs, (seq_idx, cu_seqlens) = tensors[:_DIFFERENTIABLE], tensors[_DIFFERENTIABLE:]

    def recomputed(
        x: Tensor, weight: Tensor, bias: Tensor | None, initial_states: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        y, final = api.causal_conv1d(
            x,
            weight,
            bias,
            activation="silu" if ctx.silu else None,
            initial_states=initial_states,
            seq_idx=seq_idx,
            cu_seqlens=cu_seqlens,
            reverse=ctx.reverse,
            return_final_states=True,
            backend="torch",
        )
        return y, final

    (of_grad_y, of_grad_final), of_inputs = second_order(recomputed, inputs, [grad_y, grad_final], cotangents)
    return (of_grad_y, of_grad_final, *of_inputs, *(None,) * (_TENSORS - _DIFFERENTIABLE + 3))
