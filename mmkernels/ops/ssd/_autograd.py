"""Fake kernels and gradients of the library ops behind ssd_scan, the same for native and Triton kernels."""

from typing import Any

import torch
from torch import Tensor

from mmkernels._gradients import second_order

_TENSORS = 11  # leading arguments of the op, of which the first 9 are differentiable
_DIFFERENTIABLE = 9


def register(inference: Any, fwd: Any, bwd: Any) -> None:
    """Tell torch what the three ops (csrc/registration.cpp) return, and how they are differentiated, twice.

    Args:
        inference: (y, final_states); final_states is empty unless asked for.
        fwd: the same, with gradients.
        bwd: gradients of x, dt, A, B, C, D, z, dt_bias, initial_states; empty for what was not given.
    """
    torch.library.register_fake(inference)(_fake)
    torch.library.register_fake(fwd)(_fake)
    torch.library.register_fake(bwd)(_bwd_fake)

    def _fwd_backward(ctx: Any, grad_y: Tensor | None, grad_final: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors, options = ctx.saved_tensors, ctx.options
        if not ctx.final:
            grad_final = None
        if grad_y is None and grad_final is None:
            return (None,) * (_TENSORS + len(options) + 1)
        grad_y = torch.zeros_like(tensors[0]) if grad_y is None else grad_y
        grads = bwd(grad_y, grad_final, *tensors, *options)
        given = [None if t is None else g for g, t in zip(grads, tensors[:_DIFFERENTIABLE], strict=True)]
        return (*given, *(None,) * (_TENSORS - _DIFFERENTIABLE + len(options) + 1))

    torch.library.register_autograd(fwd, _fwd_backward, setup_context=_fwd_setup)
    torch.library.register_autograd(bwd, _bwd_backward, setup_context=_bwd_setup)


def _work(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _fake(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Any,
    z: Any,
    dt_bias: Any,
    initial_states: Any,
    seq_idx: Any,
    cu_seqlens: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = (rows, x.shape[2], x.shape[3], B.shape[3]) if rest[-1] else (0,)
    return x.new_empty(x.shape), x.new_empty(final, dtype=_work(x))


def _bwd_fake(grad_y: Tensor, grad_final: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    """Shapes and dtypes of the inputs, dense; empty for an input that was not given."""
    x, work = args[0], _work(args[0])
    lacking = [work] * 5 + [work, x.dtype, work, work]
    return tuple(
        x.new_empty((0,) if t is None else t.shape, dtype=dtype if t is None else t.dtype)
        for t, dtype in zip(args[:_DIFFERENTIABLE], lacking, strict=True)
    )


def _fwd_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:_TENSORS])
    *ctx.options, ctx.final = inputs[_TENSORS:]
    if not ctx.final:
        ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _bwd_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[: _TENSORS + 2])
    ctx.options = inputs[_TENSORS + 2 :]
    ctx.set_materialize_grads(False)


def _bwd_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    from mmkernels.ops.ssd import api

    grad_y, grad_final, *tensors = ctx.saved_tensors
    softplus, low, high, chunk_size, reverse = ctx.options
    inputs, (seq_idx, cu_seqlens) = tensors[:_DIFFERENTIABLE], tensors[_DIFFERENTIABLE:]

    def recomputed(
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
        initial_states: Tensor | None,
    ) -> tuple[Tensor, ...]:
        y, final = api.ssd_scan(
            x,
            dt,
            A,
            B,
            C,
            D=D,
            z=z,
            dt_bias=dt_bias,
            dt_softplus=softplus,
            dt_limit=(low, high),
            initial_states=initial_states,
            seq_idx=seq_idx,
            cu_seqlens=cu_seqlens,
            chunk_size=chunk_size or None,
            reverse=reverse,
            return_final_states=True,
            backend="torch",
        )
        return y, final

    (of_grad_y, of_grad_final), of_inputs = second_order(recomputed, inputs, [grad_y, grad_final], cotangents)
    rest = (None,) * (_TENSORS - _DIFFERENTIABLE + len(ctx.options))
    return (of_grad_y, of_grad_final, *of_inputs, *rest)
