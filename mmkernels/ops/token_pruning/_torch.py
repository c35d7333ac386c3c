"""Backend "torch" of token pruning: rows as products, choices as stable sorts."""

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


ROWS = 128  # of the map at once


def attention_column_scores(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    scale: float,
    num_prefix: int,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    causal: bool,
) -> Tensor:
    """See mmkernels.attention_column_scores."""
    acc = torch.promote_types(q.dtype, torch.float32)
    batch, rows, heads, _ = q.shape
    seqlen = k.shape[1]
    if query_mask is not None:  # what masked tokens hold must not reach a gradient, not even as 0 * NaN
        q = q.masked_fill(~query_mask[..., None, None], 0)
    if key_mask is not None:
        k = k.masked_fill(~key_mask[..., None, None], 0)
    queries = rearrange(q.to(acc), "b r (g m) d -> b g m r d", g=k.shape[2])
    keys = rearrange(k.to(acc), "b n g d -> b g 1 d n")
    shift = None if lse is None else rearrange(lse.to(acc), "b (g m) r -> b g m r 1", g=k.shape[2])
    column = torch.arange(seqlen, device=k.device)
    total = q.new_zeros((batch, seqlen), dtype=acc)
    if rows == 0:
        total = total + (q.sum() + k[:0].sum()).to(acc)  # 0, with a gradient: of zeros
    for first in range(0, rows, ROWS):
        row = torch.arange(first, min(first + ROWS, rows), device=q.device)
        sees = column <= row[:, None] + (seqlen - rows) if causal else column >= row[:, None] * 0
        sees = sees[None] if key_mask is None else sees & key_mask[:, None, :]
        counts = sees.any(-1)[:, None, None, :, None]
        visible = sees[:, None, None]
        logits = (scale * (queries[..., first : first + ROWS, :] @ keys)).masked_fill(~visible, float("-inf"))
        if shift is None:
            p = torch.softmax(logits.masked_fill(~counts, 0), dim=-1)
        else:
            p = torch.exp(logits - shift[..., first : first + ROWS, :].masked_fill(~counts, 0))
        p = p.masked_fill(~counts, 0)
        if query_mask is not None:
            p = p.masked_fill(~query_mask[:, None, None, first : first + ROWS, None], 0)
        total = total + p.sum(dim=(1, 2, 3))
    chosen = rows if query_mask is None else query_mask.sum(-1, keepdim=True).clamp(min=1)
    return total[:, num_prefix:] / (heads * max(chosen, 1) if isinstance(chosen, int) else heads * chosen)


def bipartite_soft_matching(metric: Tensor, r: int, protect: int, order: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See mmkernels.bipartite_soft_matching."""
    batch, tokens, _ = metric.shape
    device = metric.device
    place = torch.arange(tokens, device=device)
    whole = place.expand(batch, tokens)
    acc = torch.promote_types(metric.dtype, torch.float32)
    if r == 0:
        keep = torch.cat([place[::2], place[1::2]]).expand(batch, tokens) if order == "sets" else whole
        assignment = keep.argsort(-1)
        return keep.contiguous(), assignment, whole[:, :0].contiguous(), metric.new_empty((batch, 0), dtype=acc)
    unit = torch.nn.functional.normalize(metric.to(acc), dim=-1, eps=1e-12)
    # Protected tokens are in neither set: places 2 i of `even` and 2 i + 1 of `odd` begin behind them.
    evens, odds = (protect + 1) // 2, protect // 2
    cosine = unit[:, 2 * evens :: 2] @ unit[:, 2 * odds + 1 :: 2].mT
    with torch.no_grad():
        best, link = cosine.max(-1)  # the first of equal ones
        # adding 0 makes -0 a 0, which some sorts tell apart
        chosen = (best + 0.0).sort(dim=-1, descending=True, stable=True).indices[:, :r]
        target = link.gather(1, chosen)
    similarity = cosine[torch.arange(batch, device=device)[:, None], chosen, target]
    source, target = 2 * (chosen + evens), 2 * (target + odds) + 1
    key = whole + tokens * (whole % 2) if order == "sets" else whole
    keep = key.scatter_add(1, source, torch.full_like(source, 2 * tokens)).argsort(-1)[:, : tokens - r]
    slot = torch.zeros_like(whole).scatter(1, keep, place[: tokens - r].expand(batch, -1))
    return keep, slot.scatter(1, source, slot.gather(1, target)), source, similarity


def merge_tokens(
    x: Tensor, keep_indices: Tensor, assignment: Tensor, source: Tensor, sizes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See mmkernels.merge_tokens."""
    acc = torch.promote_types(x.dtype, torch.float32)
    batch, tokens, dim = x.shape
    weight = x.new_ones((batch, tokens), dtype=acc) if sizes is None else sizes.to(acc)
    slot = assignment.gather(1, source)
    given = weight.gather(1, source)
    totals = weight.gather(1, keep_indices).scatter_add(1, slot, given)
    rows, width = x.flatten(0, 1), keep_indices.shape[1]
    first = torch.arange(batch, device=x.device)[:, None]
    kept = rows.index_select(0, (keep_indices + tokens * first).flatten())
    if source.shape[1] == 0:
        return kept.view(batch, width, dim), totals
    # Only rows that something is merged into are computed: the others are copied as they are.  What goes to the same
    # slot is added up at the first of them, so that all of them write the same.
    target = kept.index_select(0, (slot + width * first).flatten()).to(acc)
    share = (given / totals.gather(1, slot)).reshape(-1, 1)
    change = share * (rows.index_select(0, (source + tokens * first).flatten()).to(acc) - target)
    own = (torch.arange(source.shape[1], device=x.device) + source.shape[1] * first).flatten()
    shared = ((slot[:, :, None] == slot[:, None]).to(torch.int8).argmax(-1) + source.shape[1] * first).flatten()
    change = torch.zeros_like(change).index_add(0, shared, change).index_select(0, shared)
    value = (target + change).to(x.dtype)
    value = torch.where((own == shared)[:, None], value, value.detach())  # a gradient once, though several write
    kept.index_put_(((slot + width * first).flatten(),), value)
    return kept.view(batch, width, dim), totals
