"""Pruning of visual tokens: the problems of CLIP ViT-L/14-336, and how torch does it.

The choice of 1/9 of the patches with the gather of their features; one row of attention; the mean of its columns.
"""

from typing import Any

import torch
from torch import Tensor

import mmkernels
from mmkernels.bench.peers.ours import _require
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


def ours(problem: Problem, *, backend: str = "native") -> Prepared:
    """`mmkernels.prune_tokens`."""
    _require(backend, "prune_tokens")
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
    _require(backend, "cls_attention_scores")
    q, k = problem.args["q"], problem.args["k"]
    return Prepared(lambda: mmkernels.cls_attention_scores(q[:, :1], k, backend=backend))


def ours_column(problem: Problem, *, backend: str = "native") -> Prepared:
    """`mmkernels.attention_column_scores`."""
    _require(backend, "attention_column_scores")
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
