"""Fake kernels and gradients of the library ops behind attention_column_scores, native and Triton."""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor


def register(scores: Any, scores_fwd: Any) -> None:
    """Tell torch what both ops (csrc/registration.cpp) return, and how that for training is differentiated."""
    for op in (scores, scores_fwd):
        torch.library.register_fake(op)(_fake)
    torch.library.register_autograd(scores_fwd, _backward, setup_context=_setup)


def _fake(
    q: Tensor, k: Tensor, lse: Any, scale: float, num_prefix: int, query_mask: Any, key_mask: Any, causal: bool
) -> Tensor:
    return q.new_empty((k.shape[0], k.shape[1] - num_prefix), dtype=torch.promote_types(q.dtype, torch.float32))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, lse, ctx.scale, ctx.num_prefix, query_mask, key_mask, ctx.causal = inputs
    ctx.save_for_backward(q, k, lse, query_mask, key_mask)


def _visible(q: Tensor, k: Tensor, key_mask: Tensor | None, causal: bool) -> Tensor:
    """Which keys each row sees: (batch or 1, 1, 1, rows, seqlen)."""
    rows, seqlen = q.shape[1], k.shape[1]
    sees = torch.ones(rows, seqlen, dtype=torch.bool, device=q.device)
    sees = (sees.tril(seqlen - rows) if causal else sees)[None]
    return (sees if key_mask is None else sees & key_mask[:, None])[:, None, None]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # Plain products of torch, differentiable again: who trains on scores has memory for the map.
    q, k, lse, query_mask, key_mask = ctx.saved_tensors
    acc, groups, heads, rows = grad.dtype, k.shape[2], q.shape[2], q.shape[1]
    sees = _visible(q, k, key_mask, ctx.causal)
    counts = torch.full((q.shape[0],), rows, device=q.device) if query_mask is None else query_mask.sum(-1)
    share = 1 / (heads * counts.clamp(min=1).to(acc))[:, None].expand(-1, rows)
    if query_mask is not None:
        q, share = q.masked_fill(~query_mask[..., None, None], 0), share * query_mask
    if key_mask is not None:
        k = k.masked_fill(~key_mask[..., None, None], 0)
    live = sees.any(-1, keepdim=True)
    queries = rearrange(q.to(acc), "b r (g m) d -> b g m r d", g=groups)
    keys = rearrange(k.to(acc), "b n g d -> b g 1 n d")
    logits = (ctx.scale * (queries @ keys.mT)).masked_fill(~sees, float("-inf"))
    grad_p = share[:, None, None, :, None] * torch.nn.functional.pad(grad, (ctx.num_prefix, 0))[:, None, None, None]
    grad_lse = None
    if lse is None:
        p = torch.softmax(logits.masked_fill(~live, 0), dim=-1).masked_fill(~live, 0)
        grad_logits = p * (grad_p - (p * grad_p).sum(-1, keepdim=True))
    else:
        shift = rearrange(lse.to(acc), "b (g m) r -> b g m r 1", g=groups)
        p = torch.exp(logits - shift.masked_fill(~live, 0)).masked_fill(~sees, 0)
        grad_logits = p * grad_p
        grad_lse = -rearrange(grad_logits.sum(-1), "b g m r -> b (g m) r").to(lse.dtype)
    grad_q = rearrange(ctx.scale * (grad_logits @ keys), "b g m r d -> b r (g m) d").to(q.dtype)
    grad_k = rearrange(ctx.scale * (grad_logits.mT @ queries).sum(2), "b g n d -> b n g d").to(k.dtype)
    return grad_q, grad_k, grad_lse, None, None, None, None, None
