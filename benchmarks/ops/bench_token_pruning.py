"""Token pruning at the shapes of CLIP ViT-L/14-336: scores against softmax rows and whole maps, choice against topk.

The peers of prune_tokens are what people write: topk, sort, and one of torch's two gathers.  The whole map is what
an encoder with `output_attentions=True` makes of ready q and k, one layer of it.
"""

import pytest
import torch

from mmkernels import (
    attention_column_scores,
    bipartite_soft_matching,
    cls_attention_scores,
    merge_tokens,
    prune_tokens,
)

TOKENS, HEADS, HEADDIM, DIM = 576, 16, 64, 1024


def topk_gather(features, scores, keep):
    """The kept rows by torch.gather."""
    kept = scores.topk(keep, dim=-1).indices.sort(dim=-1).values
    return features.gather(1, kept[..., None].expand(-1, -1, features.shape[-1]))


def topk_index_select(features, scores, keep):
    """The kept rows by index_select, which copies whole rows."""
    kept = scores.topk(keep, dim=-1).indices.sort(dim=-1).values
    rows = kept + torch.arange(0, scores.numel(), scores.shape[1])[:, None]
    return features.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, kept.shape)


def ours(features, scores, keep):
    """prune_tokens on the native backend."""
    return prune_tokens(features, scores, num_keep=keep, backend="native").tokens


def ours_torch(features, scores, keep):
    """prune_tokens on the torch backend."""
    return prune_tokens(features, scores, num_keep=keep, backend="torch").tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("who", [ours, ours_torch, topk_gather, topk_index_select], ids=lambda f: f.__name__)
@pytest.mark.parametrize("keep", [64, 192])
@pytest.mark.parametrize("batch", [1, 16])
def bench_prune(benchmark, batch, keep, who, dtype):
    torch.manual_seed(0)
    features = torch.randn(batch, TOKENS, DIM).to(dtype)
    scores = torch.randn(batch, TOKENS).softmax(-1)  # no ties, so that everybody must agree
    benchmark.group = f"prune_tokens batch {batch} keep {keep} {dtype}"
    with torch.no_grad():
        assert torch.equal(who(features, scores, keep), topk_gather(features, scores, keep))
        benchmark(who, features, scores, keep)


def row(q, k):
    """The one softmax row, in torch."""
    logits = torch.einsum("bhd,bnhd->bhn", q[:, 0].float(), k.float()) * HEADDIM**-0.5
    return logits.softmax(-1)[..., 1:].mean(1)


def whole_map(q, k):
    """Eager attention's map of one layer, then the row of it."""
    logits = (q.transpose(1, 2) * HEADDIM**-0.5) @ k.permute(0, 2, 3, 1)
    return logits.softmax(-1, dtype=torch.float32)[:, :, 0, 1:].mean(1)


def ours_row(q, k):
    """cls_attention_scores on the native backend."""
    return cls_attention_scores(q[:, :1], k, backend="native")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("who", [ours_row, row, whole_map], ids=lambda f: f.__name__)
@pytest.mark.parametrize("batch", [1, 8])
def bench_scores(benchmark, batch, who, dtype):
    torch.manual_seed(0)
    q, k = (torch.randn(batch, TOKENS + 1, HEADS, HEADDIM).to(dtype) for _ in range(2))
    benchmark.group = f"cls_attention_scores batch {batch} {dtype}"
    with torch.no_grad():
        # A peer that makes its products in bfloat16 rounds logits of size 4 to 1/64.
        rough = {"rtol": 0.05, "atol": 1e-4} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-6}
        torch.testing.assert_close(who(q, k), row(q, k), **rough)
        benchmark(who, q, k)


def column_of_map(q, k):
    """The mean over rows and heads of the whole map, in torch."""
    logits = (q.transpose(1, 2) * HEADDIM**-0.5) @ k.permute(0, 2, 3, 1)
    return logits.softmax(-1, dtype=torch.float32).mean((1, 2))[:, 1:]


def ours_column(q, k):
    """attention_column_scores on the native backend."""
    return attention_column_scores(q, k, backend="native")


def ours_column_torch(q, k):
    """attention_column_scores on the torch backend: 128 rows at a time."""
    return attention_column_scores(q, k, backend="torch")


@pytest.mark.parametrize("who", [ours_column, ours_column_torch, column_of_map], ids=lambda f: f.__name__)
@pytest.mark.parametrize("batch", [1, 4])
def bench_columns(benchmark, batch, who):
    torch.manual_seed(0)
    q, k = (torch.randn(batch, TOKENS + 1, HEADS, HEADDIM) for _ in range(2))
    benchmark.group = f"attention_column_scores batch {batch}"
    with torch.no_grad():
        torch.testing.assert_close(who(q, k), column_of_map(q, k), rtol=1e-4, atol=1e-6)
        benchmark(who, q, k)


def tome_torch(metric, x, sizes, r):
    """ToMe's merge as usually written: a product, argsort, gathers and scatter_reduce over whole halves."""
    metric = metric / metric.norm(dim=-1, keepdim=True)
    scores = metric[:, ::2] @ metric[:, 1::2].transpose(-1, -2)
    scores[:, 0] = -torch.inf
    best, link = scores.max(-1)
    order = best.argsort(-1, descending=True)[..., None]
    left, merged = order[:, r:].sort(1).values, order[:, :r]
    target = link[..., None].gather(1, merged)

    def apply(x):
        even, odd = x[:, ::2], x[:, 1::2]
        wide = (-1, -1, x.shape[-1])
        odd = odd.scatter_reduce(1, target.expand(wide), even.gather(1, merged.expand(wide)), reduce="sum")
        return torch.cat([even.gather(1, left.expand(wide)), odd], 1)

    total = apply(sizes[..., None])
    return apply(x * sizes[..., None]) / total


def ours_tome(metric, x, sizes, r, backend="native"):
    """bipartite_soft_matching and merge_tokens on the native backend."""
    plan = bipartite_soft_matching(metric, r, protect=1, order="sets", backend=backend)
    return merge_tokens(x, plan, sizes=sizes, backend=backend)[0]


def ours_tome_torch(metric, x, sizes, r):
    """The same on the torch backend."""
    return ours_tome(metric, x, sizes, r, "torch")


@pytest.mark.parametrize("who", [ours_tome, ours_tome_torch, tome_torch], ids=lambda f: f.__name__)
@pytest.mark.parametrize("r", [23, 288])
@pytest.mark.parametrize("batch", [1, 8])
def bench_merge(benchmark, batch, r, who):
    torch.manual_seed(0)
    metric, x = torch.randn(batch, TOKENS + 1, HEADDIM), torch.randn(batch, TOKENS + 1, DIM)
    sizes = 1 + torch.rand(batch, TOKENS + 1)
    benchmark.group = f"bipartite matching and merge of {r}, batch {batch}"
    with torch.no_grad():
        torch.testing.assert_close(who(metric, x, sizes, r), tome_torch(metric, x, sizes, r), rtol=1e-4, atol=1e-5)
        benchmark(who, metric, x, sizes, r)


def best_links(metric, r):
    """The matching alone, as usually written: the whole half-by-half matrix, its row maxima, argsort."""
    unit = metric / metric.norm(dim=-1, keepdim=True)
    best, link = (unit[:, ::2] @ unit[:, 1::2].mT).max(-1)
    source = best.argsort(-1, descending=True)[:, :r]
    return 2 * source, 2 * link.gather(1, source) + 1


def ours_links(metric, r, backend="native"):
    """bipartite_soft_matching on the native backend."""
    plan = bipartite_soft_matching(metric, r, backend=backend)
    return plan.source, plan.keep_indices.gather(1, plan.assignment.gather(1, plan.source))


def ours_links_torch(metric, r):
    """The same on the torch backend."""
    return ours_links(metric, r, "torch")


@pytest.mark.parametrize("who", [ours_links, ours_links_torch, best_links], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("tokens", "dim"), [(577, 64), (2880, 64), (576, 1024)])
def bench_matching(benchmark, tokens, dim, who):
    torch.manual_seed(0)
    metric, r = torch.randn(1, tokens, dim), tokens // 4
    benchmark.group = f"bipartite matching of {tokens} tokens with {dim} channels"
    with torch.no_grad():
        same = [(a == b).float().mean() for a, b in zip(who(metric, r), best_links(metric, r), strict=True)]
        assert min(same) > 0.99  # neighbours of nearly equal cosine may change places
        benchmark(who, metric, r)
