"""Backend "torch" of token pruning: the rows as one product, the choice as two stable sorts."""

import torch
from einops import rearrange
from torch import Tensor

from mmkernels.ops.token_pruning.budget import ranked


def cls_attention_scores(
    q: Tensor, k: Tensor, lse: Tensor | None, scale: float, num_prefix: int, weight: float
) -> Tensor:
    """See mmkernels.cls_attention_scores."""
    acc = torch.promote_types(q.dtype, torch.float32)
    # heads that share keys are further rows of the same product
    queries = rearrange(q.to(acc), "b r (g m) d -> b g (m r) d", g=k.shape[2])
    logits = scale * (queries @ rearrange(k.to(acc), "b n g d -> b g d n"))
    if lse is None:
        p = torch.softmax(logits, dim=-1)
    else:
        p = torch.exp(logits - rearrange(lse.to(acc), "b (g m) r -> b g (m r) 1", g=k.shape[2]))
    return weight * p[..., num_prefix:].mean(dim=(1, 2))


def prune_tokens(
    features: Tensor,
    scores: Tensor,
    mask: Tensor | None,
    position_ids: Tensor | None,
    counts: Tensor | None,
    width: int,
    total: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See mmkernels.prune_tokens."""
    batch, seqlen = scores.shape
    slots = torch.arange(width, device=scores.device)
    if counts is None:
        counts = torch.full((batch,), width, dtype=torch.int64, device=scores.device)
    # Past its count a sample's slots hold the index `seqlen`, which sorts behind all others and marks padding.
    kept = ranked(scores.detach(), mask)[:, :width].masked_fill(slots >= counts[:, None], seqlen).sort(-1).values
    cu_seqlens = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)
    if total is None:
        samples = torch.arange(batch, device=scores.device)[:, None].expand(batch, width)
        places = slots.expand(batch, width)
    else:
        at = torch.arange(total, device=scores.device)
        samples = torch.searchsorted(cu_seqlens, at.to(torch.int32), right=True) - 1
        places = at - cu_seqlens[samples]
        kept = kept[samples, places]
    real = kept < seqlen
    index = kept.clamp(max=seqlen - 1)
    tokens = features[samples, index].masked_fill(~real[..., None], 0)
    positions = (places if position_ids is None else position_ids[samples, index]).masked_fill(~real, 0)
    return tokens, kept.masked_fill(~real, -1), positions, real, cu_seqlens
