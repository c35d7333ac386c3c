"""Fake kernels and gradients of the library ops behind mma_attention, the same for native and Triton kernels."""

from typing import Any

import torch
from torch import Tensor

from mmkernels._gradients import second_order


def register(inference: Any, fwd: Any, bwd: Any) -> None:
    """Tell torch what the three ops (csrc/registration.cpp) return, and how the last two are differentiated.

    Args:
        inference: (out, lse, mass); mass is empty without weights.
        fwd: the same.
        bwd: gradients of q, k and v.
    """
    torch.library.register_fake(inference)(_fake)
    torch.library.register_fake(fwd)(_fake)
    torch.library.register_fake(bwd)(_bwd_fake)

    def _fwd_backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if grad_out is None and grad_lse is None:
            return (None,) * 8
        return (*bwd(grad_out, grad_lse, *ctx.saved_tensors, ctx.scale), *(None,) * 5)

    torch.library.register_autograd(fwd, _fwd_backward, setup_context=_fwd_setup)
    torch.library.register_autograd(bwd, _bwd_backward, setup_context=_bwd_setup)


def _fake(
    q: Tensor, k: Tensor, v: Tensor, row_start: Tensor, row_end: Tensor, rects: Tensor, weights: Any, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, qlen, nheads, _ = q.shape
    mass = (0,) if weights is None else (batch, nheads, k.shape[1])
    return q.new_empty(q.shape), q.new_empty((batch, nheads, qlen), dtype=work), q.new_empty(mass, dtype=work)


def _bwd_fake(grad_out: Any, grad_lse: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _fwd_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    out, lse, mass = output
    ctx.save_for_backward(*inputs[:6], out, lse)
    ctx.scale = inputs[7]
    ctx.mark_non_differentiable(mass)
    ctx.set_materialize_grads(False)


def _bwd_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.scale = inputs[10]
    ctx.set_materialize_grads(False)


def _bwd_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    from mmkernels.ops.mma_attention import _torch

    grad_out, grad_lse, q, k, v, *mask = ctx.saved_tensors

    def recomputed(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        # Not the public function: its eager path looks at the mask's values, which a tracer does not have.
        return _torch._plain(q, k, v, tuple(mask), ctx.scale)

    # out and lse, which the kernel reads, are functions of q, k and v: their part is in the gradients of those.
    of_grads, of_inputs = second_order(recomputed, (q, k, v), (grad_out, grad_lse), cotangents)
    return (*of_grads, *of_inputs, *(None,) * 6)
