"""Fake kernels and gradients of the library ops behind cls_attention_scores and prune_tokens, native and Triton."""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor


def register(scores: Any, scores_fwd: Any, prune: Any, prune_fwd: Any) -> None:
    """Tell torch what the four ops (csrc/registration.cpp) return, and how those for training are differentiated."""
    for op in (scores, scores_fwd):
        torch.library.register_fake(op)(_scores_fake)
    for op in (prune, prune_fwd):
        torch.library.register_fake(op)(_prune_fake)
    torch.library.register_autograd(scores_fwd, _scores_backward, setup_context=_scores_setup)
    torch.library.register_autograd(prune_fwd, _prune_backward, setup_context=_prune_setup)


def _scores_fake(q: Tensor, k: Tensor, lse: Any, scale: float, num_prefix: int, weight: float) -> Tensor:
    return q.new_empty((k.shape[0], k.shape[1] - num_prefix), dtype=torch.promote_types(q.dtype, torch.float32))


def _scores_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, lse, *ctx.options = inputs
    ctx.save_for_backward(q, k, lse)


def _scores_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # Plain products of torch, differentiable again: rows are few, and who trains on scores has memory for them.
    q, k, lse = ctx.saved_tensors
    scale, num_prefix, weight = ctx.options
    acc, groups = grad.dtype, k.shape[2]
    queries, keys = (
        rearrange(q.to(acc), "b r (g m) d -> b g (m r) d", g=groups),
        rearrange(k.to(acc), "b n g d -> b g n d"),
    )
    logits = scale * (queries @ keys.mT)
    share = weight / (q.shape[1] * q.shape[2])
    grad_p = (share * torch.nn.functional.pad(grad, (num_prefix, 0)))[:, None, None]
    grad_lse = None
    if lse is None:
        p = torch.softmax(logits, dim=-1)
        grad_logits = p * (grad_p - (p * grad_p).sum(-1, keepdim=True))
    else:
        p = torch.exp(logits - rearrange(lse.to(acc), "b (g m) r -> b g (m r) 1", g=groups))
        grad_logits = p * grad_p
        grad_lse = -rearrange(grad_logits.sum(-1), "b g (m r) -> b (g m) r", r=q.shape[1]).to(lse.dtype)
    grad_q = rearrange(scale * (grad_logits @ keys), "b g (m r) d -> b r (g m) d", r=q.shape[1]).to(q.dtype)
    grad_k = rearrange(scale * (grad_logits.mT @ queries), "b g n d -> b n g d").to(k.dtype)
    return grad_q, grad_k, grad_lse, None, None, None


def _prune_fake(
    features: Tensor, scores: Tensor, mask: Any, position_ids: Tensor | None, counts: Any, width: int, total: int
) -> tuple[Tensor, ...]:
    slots = (features.shape[0], width) if total < 0 else (total,)
    index = features.new_empty(slots, dtype=torch.int64)
    positions = index if position_ids is None else position_ids
    return (
        features.new_empty((*slots, features.shape[2])),
        index,
        features.new_empty(slots, dtype=positions.dtype),
        features.new_empty(slots, dtype=torch.bool),
        features.new_empty((features.shape[0] + 1,), dtype=torch.int32),
    )


def _prune_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    features, *_ = inputs
    _, indices, positions, real, cu_seqlens = output
    ctx.save_for_backward(indices, real, cu_seqlens)
    ctx.mark_non_differentiable(indices, positions, real, cu_seqlens)
    ctx.shape = features.shape


def _prune_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    indices, real, cu_seqlens = ctx.saved_tensors
    batch, seqlen, dim = ctx.shape
    if indices.dim() == 2:
        samples = torch.arange(batch, device=grad.device)[:, None]
    else:
        at = torch.arange(indices.shape[0], device=grad.device, dtype=torch.int32)
        samples = torch.searchsorted(cu_seqlens, at, right=True) - 1
    # Every row is kept once at most, so rows are put, not added: no atomics on a GPU.  Padding has a row of its own.
    rows = (samples * seqlen + indices).masked_fill(~real, batch * seqlen).flatten()
    values = grad.masked_fill(~real[..., None], 0).reshape(rows.shape[0], dim)
    spread = grad.new_zeros(batch * seqlen + 1, dim).index_copy(0, rows, values)[:-1]
    return (spread.view(batch, seqlen, dim), *(None,) * 6)
