"""The oracles of token pruning: softmax row by softmax row, sample by sample, pair by pair.

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
    seqlen, group = k.shape[1], heads // max(k.shape[2], 1)
    samples = []
    nothing = (q[:0].sum() + k[:0].sum()).to(acc)  # 0, with a gradient: of zeros, where there is nothing to add up
    for b in range(batch):
        chosen = [r for r in range(rows) if query_mask is None or bool(query_mask[b, r])]
        total = torch.zeros(seqlen, dtype=acc, device=q.device) + nothing
        for r in chosen:
            sees = range(min(seqlen, max(0, r + seqlen - rows + 1)) if causal else seqlen)
            keys = torch.tensor([i for i in sees if key_mask is None or bool(key_mask[b, i])], dtype=torch.int64)
            if len(keys) == 0:
                continue
            keys = keys.to(q.device)
            for h in range(heads):
                logits = scale * (k[b, keys, h // group].to(acc) @ q[b, r, h].to(acc))
                shift = torch.logsumexp(logits, 0) if lse is None else lse[b, h, r].to(acc)
                total = total.index_add(0, keys, torch.exp(logits - shift))
        samples.append(total[num_prefix:] / (heads * max(len(chosen), 1)))
    return torch.stack(samples) if samples else k.new_zeros((0, seqlen - num_prefix), dtype=acc) + nothing


def bipartite_soft_matching(metric: Tensor, r: int, protect: int, order: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See mmkernels.bipartite_soft_matching."""
    batch, tokens, _ = metric.shape
    acc = torch.promote_types(metric.dtype, torch.float32)
    keeps, assignments, sources, similarities = [], [], [], []
    for b in range(batch):
        unit = [m / m.norm().clamp(min=1e-12) for m in metric[b].to(acc)]
        links = []
        for i in range(0, tokens, 2):
            others = [(i, j) for j in range(protect + 1 - protect % 2, tokens, 2)]
            if i >= protect and others:
                cosines = [(unit[i] @ unit[j], j) for _, j in others]
                best = max(cosines, key=lambda pair: (pair[0].item(), -pair[1]))
                links.append((best[0], i, best[1]))
        links.sort(key=lambda link: (-link[0].item(), link[1]))
        into = {i: j for _, i, j in links[:r]}
        left = [i for i in range(tokens) if i not in into]
        if order == "sets":
            left = [i for i in left if i % 2 == 0] + [i for i in left if i % 2 == 1]
        keeps.append(left)
        assignments.append([left.index(into.get(i, i)) for i in range(tokens)])
        sources.append([i for _, i, _ in links[:r]])
        similarities.append(torch.stack([c for c, _, _ in links[:r]]) if r else metric.new_zeros(0, dtype=acc))

    def integers(values: list[list[int]], width: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=metric.device).reshape(batch, width)

    similarity = torch.stack(similarities) if batch else metric.new_zeros((0, r), dtype=acc) + metric.sum().to(acc)
    return integers(keeps, tokens - r), integers(assignments, tokens), integers(sources, r), similarity


def merge_tokens(
    x: Tensor, keep_indices: Tensor, assignment: Tensor, source: Tensor, sizes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See mmkernels.merge_tokens."""
    acc = torch.promote_types(x.dtype, torch.float32)
    batch, tokens, dim = x.shape
    width = keep_indices.shape[1]
    weight = x.new_ones((batch, tokens), dtype=acc) if sizes is None else sizes.to(acc)
    merged, totals = [], []
    for b in range(batch):
        for slot in range(width):
            members = [i for i in range(tokens) if int(assignment[b, i]) == slot]
            total = weight[b, members].sum()
            merged.append((weight[b, members, None] / total * x[b, members].to(acc)).sum(0))
            totals.append(total)
    if not merged:
        return x[:, :width], weight[:, :width]
    return torch.stack(merged).reshape(batch, width, dim).to(x.dtype), torch.stack(totals).reshape(batch, width)
