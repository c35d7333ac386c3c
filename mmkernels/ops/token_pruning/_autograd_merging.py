"""Fake kernels and gradients of the library ops behind matching and merging, native and Triton."""

from typing import Any

import torch
from torch import Tensor

from mmkernels._gradients import second_order


def register(match: Any, match_fwd: Any, merge: Any, merge_fwd: Any, merge_bwd: Any) -> None:
    """Tell torch what the five ops (csrc/registration.cpp) return, and how those for training are differentiated."""
    for op in (match, match_fwd):
        torch.library.register_fake(op)(_match_fake)
    for op in (merge, merge_fwd):
        torch.library.register_fake(op)(_merge_fake)
    torch.library.register_fake(merge_bwd)(_merge_bwd_fake)

    def _merge_backward(ctx: Any, grad_tokens: Tensor, grad_totals: Tensor) -> tuple[Tensor | None, ...]:
        x, keep_indices, assignment, source, sizes, totals = ctx.saved_tensors
        grad_x, grad_sizes = merge_bwd(grad_tokens, grad_totals, x, keep_indices, assignment, source, sizes, totals)
        return grad_x, None, None, None, None if sizes is None else grad_sizes

    torch.library.register_autograd(match_fwd, _match_backward, setup_context=_match_setup)
    torch.library.register_autograd(merge_fwd, _merge_backward, setup_context=_merge_setup)
    torch.library.register_autograd(merge_bwd, _merge_bwd_backward, setup_context=_merge_bwd_setup)


def _match_fake(metric: Tensor, r: int, protect: int, sets: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, tokens, _ = metric.shape
    keep, assignment, source = (metric.new_empty((batch, n), dtype=torch.int64) for n in (tokens - r, tokens, r))
    return (
        keep,
        assignment,
        source,
        metric.new_empty((batch, r), dtype=torch.promote_types(metric.dtype, torch.float32)),
    )


def _match_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    keep_indices, assignment, source, _ = output
    ctx.save_for_backward(inputs[0], keep_indices, assignment, source)
    ctx.mark_non_differentiable(keep_indices, assignment, source)


def _match_backward(ctx: Any, _keep: Any, _assignment: Any, _source: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # Plain products of torch, differentiable again, on the rows of the r links only.
    metric, keep_indices, assignment, source = ctx.saved_tensors
    target = keep_indices.gather(1, assignment.gather(1, source))
    rows = [metric.gather(1, i[..., None].expand(-1, -1, metric.shape[2])).to(grad.dtype) for i in (source, target)]
    lengths = [row.norm(dim=-1, keepdim=True) for row in rows]
    # A vector too short to have a direction is divided by a constant.
    u, v = (row / length.clamp(min=1e-12) for row, length in zip(rows, lengths, strict=True))
    along = (u * v).sum(-1, keepdim=True)
    to_source, to_target = (
        grad[..., None] * (other - (along * own).masked_fill(length < 1e-12, 0)) / length.clamp(min=1e-12)
        for own, other, length in ((u, v, lengths[0]), (v, u, lengths[1]))
    )
    # Each source is one token.  Several may go to one odd place, where a product with ones adds them up: in one order
    # on every device, without atomics.
    batch, tokens, dim = metric.shape
    sent = grad.new_zeros((batch, tokens, dim)).scatter(1, source[..., None].expand(-1, -1, dim), to_source)
    goes = (target[:, None] == torch.arange(1, tokens, 2, device=metric.device)[:, None]).to(grad.dtype)
    return sent.slice_scatter(goes @ to_target, 1, 1, None, 2).to(metric.dtype), None, None, None


def _merge_fake(
    x: Tensor, keep_indices: Tensor, assignment: Tensor, source: Tensor, sizes: Any
) -> tuple[Tensor, Tensor]:
    slots = (x.shape[0], keep_indices.shape[1])
    return x.new_empty((*slots, x.shape[2])), x.new_empty(slots, dtype=torch.promote_types(x.dtype, torch.float32))


def _merge_bwd_fake(grad_tokens: Tensor, grad_totals: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    sizes, totals = rest[3], rest[4]
    return x.new_empty(x.shape), totals.new_empty((0,) if sizes is None else x.shape[:2])


def _merge_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _merge_bwd_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.set_materialize_grads(False)


def _merge_bwd_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    from mmkernels.ops.token_pruning import _torch

    grad_tokens, grad_totals, x, keep_indices, assignment, source, sizes = ctx.saved_tensors

    def recomputed(x: Tensor, sizes: Tensor | None) -> tuple[Tensor, ...]:
        merged, totals = _torch.merge_tokens(x, keep_indices, assignment, source, sizes)
        return (merged,) if sizes is None else (merged, totals)  # without sizes the totals depend on nothing

    seeds = [grad_tokens] if sizes is None else [grad_tokens, grad_totals]
    of_grads, (of_x, of_sizes) = second_order(recomputed, (x, sizes), seeds, cotangents)
    # The totals, which the kernel reads, are a function of sizes: their part is in that gradient.
    return (*of_grads, *[None] * (2 - len(seeds)), of_x, None, None, None, of_sizes, None)
