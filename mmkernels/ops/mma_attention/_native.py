"""Backend "native" of mma_attention: csrc/cpu/mma_attention_*.cpp; here their fake kernels and gradients.

The kernels read q, k and v in their own dtype through their strides (a last dimension that is not dense is copied
first) and compute in float32 (float64 for float64).
"""

from typing import Any

import torch
from torch import Tensor

from mmkernels import _native
from mmkernels._gradients import second_order, wants_gradient

_native.require()
_inference = torch.ops.mmkernels.mma_attention.default
_fwd = torch.ops.mmkernels.mma_attention_fwd.default
_bwd = torch.ops.mmkernels.mma_attention_bwd.default


def mma_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_start: Tensor,
    row_end: Tensor,
    rects: Tensor,
    scale: float,
    mass_weights: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See mmkernels.mma_attention."""
    op = _fwd if wants_gradient(q, k, v) else _inference
    weights = None if mass_weights is None else mass_weights.detach()
    out, lse, mass = op(q, k, v, row_start, row_end, rects, weights, scale)
    return out, lse if return_lse else None, mass if mass_weights is not None else None


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


def _fwd_backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad_out is None and grad_lse is None:
        return (None,) * 8
    return (*_bwd(grad_out, grad_lse, *ctx.saved_tensors, ctx.scale), *(None,) * 5)


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


torch.library.register_fake(_inference)(_fake)
torch.library.register_fake(_fwd)(_fake)
torch.library.register_fake(_bwd)(_bwd_fake)
torch.library.register_autograd(_fwd, _fwd_backward, setup_context=_fwd_setup)
torch.library.register_autograd(_bwd, _bwd_backward, setup_context=_bwd_setup)
