"""The oracles of cls_attention_scores and prune_tokens: softmax row by softmax row, sample by sample.

s_j = weight mean over rows, heads of softmax_j(scale q . k_j); the k tokens of largest (s, -index) in rising index.
"""

import torch
from torch import Tensor


def cls_attention_scores(
    q: Tensor, k: Tensor, lse: Tensor | None, scale: float, num_prefix: int, weight: float
) -> Tensor:
    """See mmkernels.cls_attention_scores."""
    acc = torch.promote_types(q.dtype, torch.float32)
    _, rows, heads, _ = q.shape
    group = heads // k.shape[2]
    total = torch.zeros(k.shape[0], k.shape[1] - num_prefix, dtype=acc, device=q.device)
    for h in range(heads):
        keys = k[:, :, h // group].to(acc)
        for r in range(rows):
            logits = scale * (q[:, r, h, None].to(acc) * keys).sum(-1)
            if lse is None:
                p = torch.exp(logits - logits.amax(-1, keepdim=True).detach()) if logits.shape[-1] else logits
                p = p / p.sum(-1, keepdim=True)
            else:
                p = torch.exp(logits - lse[:, h, r, None].to(acc))
            total = total + p[:, num_prefix:]
    return weight * total / (rows * heads)


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
    batch, seqlen, _ = features.shape
    device = features.device
    tokens, indices, positions, real = [], [], [], []
    cu_seqlens = [0]
    for b in range(batch):
        # NaN ranks below every number; Python's sort is stable, so equals stay in rising index
        order = [i for i in range(seqlen) if mask is None or bool(mask[b, i])]
        value = scores[b].tolist()
        order.sort(key=lambda i: (value[i] == value[i], value[i] if value[i] == value[i] else 0.0), reverse=True)
        count = width if counts is None else int(counts[b])
        kept = torch.tensor(sorted(order[:count]), dtype=torch.int64, device=device)
        padding = (width if total is None else count) - len(kept)
        places = torch.arange(len(kept), device=device) if position_ids is None else position_ids[b, kept]
        tokens.append(torch.cat([features[b, kept], features.new_zeros(padding, features.shape[2])]))
        indices.append(torch.cat([kept, kept.new_full((padding,), -1)]))
        positions.append(torch.cat([places, places.new_zeros(padding)]))
        real.append(torch.arange(len(kept) + padding, device=device) < len(kept))
        cu_seqlens.append(cu_seqlens[-1] + count)
    lengths = torch.tensor(cu_seqlens, dtype=torch.int32, device=device)
    if batch == 0:
        nothing = features[:, :width] if total is None else features.flatten(0, 1)
        integers = torch.empty(nothing.shape[:-1], dtype=torch.int64, device=device)
        typed = integers if position_ids is None else integers.to(position_ids.dtype)
        return nothing, integers, typed, integers.bool(), lengths
    join = torch.stack if total is None else torch.cat
    return join(tokens), join(indices), join(positions), join(real), lengths
