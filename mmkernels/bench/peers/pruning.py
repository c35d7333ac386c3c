"""Pruning of visual tokens: the problems of CLIP ViT-L/14-336, and how torch does it.

The choice of 1/9 of the patches with the gather of their features; one row of attention; the mean of its columns; the
match of like tokens and their merge, as in one layer of ToMe.
"""

from typing import Any

import torch
from torch import Tensor

import mmkernels
from mmkernels.bench.peers.ours import require_ready
from mmkernels.bench.problems import Prepared, Problem
from mmkernels.bench.shapes import Cell

_BYTES = {"float32": 4, "bfloat16": 2}


def prune_problem(cell: Cell) -> Problem:
    """Features and scores; a ninth of the tokens stays (64 of 576)."""
    s, generator = cell.sizes, torch.Generator().manual_seed(0)
    features = torch.randn(s.batch, cell.seqlen, s.d_inner, generator=generator).to(getattr(torch, cell.dtype))
    scores = torch.randn(s.batch, cell.seqlen, generator=generator).softmax(-1)  # no ties: everybody must agree
    return Problem(cell, {"features": features, "scores": scores, "num_keep": cell.seqlen // 9})


def prune_truth(args: dict[str, Any]) -> Tensor:
    """The definition."""
    return mmkernels.prune_tokens(**args, backend="reference").tokens


def prune_bytes(cell: Cell) -> float:
    """Bytes the gather must move: kept rows in and out."""
    return 2.0 * cell.sizes.batch * (cell.seqlen // 9) * cell.sizes.d_inner * _BYTES[cell.dtype]


def merge_problem(cell: Cell) -> Problem:
    """Tokens with [CLS], what makes them alike (keys, mean over heads), and how many tokens each already stands for."""
    s, generator = cell.sizes, torch.Generator().manual_seed(0)
    dtype, size = getattr(torch, cell.dtype), (s.batch, cell.seqlen + 1)
    args = {
        "metric": torch.randn(*size, s.headdim, generator=generator).to(dtype),
        "x": torch.randn(*size, s.d_inner, generator=generator).to(dtype),
        "sizes": 1 + torch.rand(*size, generator=generator),
    }
    return Problem(cell, {**args, "r": cell.seqlen // 25})  # 23 of 576 in each of 24 layers leave 25 tokens


def merge_truth(args: dict[str, Any]) -> Tensor:
    """The definition."""
    return _merge(args, "reference")


def merge_bytes(cell: Cell) -> float:
    """Bytes a merge must move: tokens in, those that are left out."""
    s = cell.sizes
    return s.batch * (2.0 * cell.seqlen + 2 - cell.seqlen // 25) * s.d_inner * _BYTES[cell.dtype]


def _merge(args: dict[str, Any], backend: str) -> Tensor:
    plan = mmkernels.bipartite_soft_matching(args["metric"], args["r"], protect=1, order="sets", backend=backend)
    return mmkernels.merge_tokens(args["x"], plan, sizes=args["sizes"], backend=backend)[0]


def ours_merge(problem: Problem, *, backend: str = "native") -> Prepared:
    """`mmkernels.bipartite_soft_matching` and `mmkernels.merge_tokens`."""
    for op in ("bipartite_soft_matching", "merge_tokens"):
        require_ready(backend, op)
    return Prepared(lambda: _merge(problem.args, backend))


def torch_merge(problem: Problem) -> Prepared:
    """ToMe as usually written: a product, argsort, gathers and scatter_reduce over whole halves."""
    a, r = problem.args, problem.args["r"]

    def halves(x: Tensor, left: Tensor, merged: Tensor, target: Tensor) -> Tensor:
        even, odd, wide = x[:, ::2], x[:, 1::2], (-1, -1, x.shape[-1])
        odd = odd.scatter_reduce(1, target.expand(wide), even.gather(1, merged.expand(wide)), reduce="sum")
        return torch.cat([even.gather(1, left.expand(wide)), odd], 1)

    def run() -> Tensor:
        unit = a["metric"] / a["metric"].norm(dim=-1, keepdim=True)
        scores = unit[:, ::2] @ unit[:, 1::2].transpose(-1, -2)
        scores[:, 0] = -torch.inf  # [CLS] stays
        best, link = scores.max(-1)
        order = best.argsort(-1, descending=True)[..., None]
        left, merged = order[:, r:].sort(1).values, order[:, :r]
        places = (left, merged, link[..., None].gather(1, merged))
        weight = a["sizes"][..., None]
        return halves(a["x"] * weight, *places) / halves(weight, *places)

    return Prepared(run)


def ours(problem: Problem, *, backend: str = "native") -> Prepared:
    """`mmkernels.prune_tokens`."""
    require_ready(backend, "prune_tokens")
    args = problem.args
    return Prepared(lambda: mmkernels.prune_tokens(**args, backend=backend).tokens)


def topk_gather(problem: Problem) -> Prepared:
    """topk, sort, and `torch.gather` of the rows."""
    features, scores, count = problem.args.values()

    def run() -> Tensor:
        kept = scores.topk(count, dim=-1).indices.sort(dim=-1).values
        return features.gather(1, kept[..., None].expand(-1, -1, features.shape[-1]))

    return Prepared(run)


def topk_index_select(problem: Problem) -> Prepared:
    """topk, sort, and `index_select`, which copies whole rows."""
    features, scores, count = problem.args.values()
    flat, first = features.flatten(0, 1), torch.arange(0, scores.numel(), scores.shape[1])[:, None]

    def run() -> Tensor:
        kept = scores.topk(count, dim=-1).indices.sort(dim=-1).values
        return flat.index_select(0, (kept + first).flatten())

    return Prepared(run, lambda out: out.view(len(scores), count, -1))


def scores_problem(cell: Cell) -> Problem:
    """Queries and keys of [CLS] and the patches."""
    s, generator = cell.sizes, torch.Generator().manual_seed(0)
    size = (s.batch, cell.seqlen + 1, s.nheads, s.headdim)
    q, k = (torch.randn(size, generator=generator).to(getattr(torch, cell.dtype)) for _ in range(2))
    return Problem(cell, {"q": q, "k": k})


def row_truth(args: dict[str, Any]) -> Tensor:
    """The formula in float64: the row of [CLS]."""
    return mmkernels.cls_attention_scores(args["q"][:, :1], args["k"], backend="reference")


def column_truth(args: dict[str, Any]) -> Tensor:
    """The formula in float64: the mean of every column."""
    return _map(args["q"], args["k"]).mean((1, 2))[:, 1:]


def row_bytes(cell: Cell) -> float:
    """Bytes a row of scores must read: every key."""
    return float(cell.sizes.batch * (cell.seqlen + 1) * cell.sizes.d_inner * _BYTES[cell.dtype])


def column_flops(cell: Cell) -> float:
    """Useful floating-point operations of all rows: 2 headdim for every pair and head."""
    return 2.0 * cell.sizes.batch * cell.sizes.d_inner * (cell.seqlen + 1) ** 2


def ours_row(problem: Problem, *, backend: str = "native") -> Prepared:
    """`mmkernels.cls_attention_scores`."""
    require_ready(backend, "cls_attention_scores")
    q, k = problem.args["q"], problem.args["k"]
    return Prepared(lambda: mmkernels.cls_attention_scores(q[:, :1], k, backend=backend))


def ours_column(problem: Problem, *, backend: str = "native") -> Prepared:
    """`mmkernels.attention_column_scores`."""
    require_ready(backend, "attention_column_scores")
    args = problem.args
    return Prepared(lambda: mmkernels.attention_column_scores(**args, backend=backend))


def torch_row(problem: Problem) -> Prepared:
    """One softmax row in torch."""
    q, k = problem.args["q"], problem.args["k"]

    def run() -> Tensor:
        logits = torch.einsum("bhd,bnhd->bhn", q[:, 0].float(), k.float()) * q.shape[-1] ** -0.5
        return logits.softmax(-1)[..., 1:].mean(1)

    return Prepared(run)


def map_row(problem: Problem) -> Prepared:
    """The whole map of eager attention, then one row of it: `output_attentions=True`."""
    q, k = problem.args["q"], problem.args["k"]
    return Prepared(lambda: _map(q, k)[:, :, 0, 1:].mean(1))


def map_column(problem: Problem) -> Prepared:
    """The whole map of eager attention, then the mean of its columns."""
    q, k = problem.args["q"], problem.args["k"]
    return Prepared(lambda: _map(q, k).mean((1, 2))[:, 1:])


def _map(q: Tensor, k: Tensor) -> Tensor:
    logits = (q.transpose(1, 2) * q.shape[-1] ** -0.5) @ k.permute(0, 2, 3, 1)
    return logits.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))
