"""Test inputs of cls_attention_scores and prune_tokens."""

from collections.abc import Callable
from typing import Any

import torch

from mmkernels.testing.cases import Case, register_cases

Args = dict[str, Any]
Build = Callable[[torch.Generator], Args]


def score_inputs(
    generator: torch.Generator, batch: int, seqlen: int, heads: int, headdim: int, *, rows: int = 1, kv_heads: int = 0
) -> Args:
    """Q and k of cls_attention_scores in float64, of size one, so that softmax rows are far from uniform."""

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    return {"q": draw(batch, rows, heads, headdim), "k": draw(batch, seqlen, kv_heads or heads, headdim)}


def prune_inputs(generator: torch.Generator, batch: int, seqlen: int, dim: int) -> Args:
    """Features and scores of prune_tokens in float64; scores are apart by more than any finite difference."""
    features = torch.randn(batch, seqlen, dim, generator=generator, dtype=torch.float64)
    ranks = (
        torch.stack([torch.randperm(seqlen, generator=generator) for _ in range(batch)])
        if batch
        else torch.empty(0, seqlen)
    )
    return {"features": features, "scores": (ranks.double() + 1) / max(seqlen, 1)}


def _scores(*size: int, options: Args | None = None, **more: int) -> Build:
    return lambda generator: score_inputs(generator, *size, **more) | (options or {})


def _with_lse(generator: torch.Generator) -> Args:
    made = score_inputs(generator, 2, 6, 2, 5, rows=2)
    logits = torch.einsum("brhd,bnhd->bhrn", made["q"], made["k"]) * 5**-0.5
    return made | {"lse": torch.logsumexp(logits, -1)}


def _views(generator: torch.Generator) -> Args:
    # One row of a fused projection, keys with the heads before the tokens.
    fused = torch.randn(2, 7, 3, 2, 6, generator=generator, dtype=torch.float64)
    keys = torch.randn(2, 2, 7, 6, generator=generator, dtype=torch.float64)
    return {"q": fused[:, :1, 0], "k": keys.transpose(1, 2)}


def _accumulated(generator: torch.Generator) -> Args:
    made = score_inputs(generator, 2, 9, 4, 8)
    return made | {"weight": 0.5, "accumulate": torch.rand(2, 8, generator=generator, dtype=torch.float64)}


register_cases(
    *(
        Case("cls_attention_scores", name, build, small=small, summands=summands)
        for name, build, small, summands in (
            ("one-head", _scores(1, 4, 1, 3), True, 3),
            ("no-prefix", _scores(2, 5, 2, 4, rows=2, options={"num_prefix": 0, "weight": 0.25}), True, 4),
            ("shared-keys", _scores(2, 5, 4, 3, kv_heads=2, options={"num_prefix": 2, "scale": 0.7}), True, 3),
            ("lse", _with_lse, True, 5),
            ("views", _views, True, 6),
            ("odd", _scores(2, 71, 3, 37), False, 37),
            ("clip", _scores(1, 197, 4, 64), False, 64),
            ("all-prefix", _scores(2, 3, 2, 4, options={"num_prefix": 3}), False, 0),
            ("empty-batch", _scores(0, 5, 2, 4), False, 0),
        )
    ),
    Case("cls_attention_scores", "accumulate", _accumulated, small=True, mutates=("accumulate",), summands=8),
)


def _prune(*size: int, more: Callable[[torch.Generator], Args] | None = None, **options: Any) -> Build:
    return lambda generator: prune_inputs(generator, *size) | options | (more(generator) if more else {})


def _ties(generator: torch.Generator) -> Args:
    made = prune_inputs(generator, 3, 40, 5)
    scores = torch.randint(-2, 3, (3, 40), generator=generator).double()
    zeros = scores == 0
    scores[zeros & (zeros.cumsum(-1) % 2 == 1)] = -0.0  # every other one
    # Half of the zeros of the first sample are kept, of the -1 of the second and of the -2 of the third.
    least = torch.tensor([0.0, -1.0, -2.0])[:, None]
    counts = (scores > least).sum(-1) + (scores == least).sum(-1) // 2
    return made | {"scores": scores, "num_keep": counts.tolist()}


def _masked(batch: int, seqlen: int) -> Callable[[torch.Generator], Args]:
    def build(generator: torch.Generator) -> Args:
        mask = torch.rand(batch, seqlen, generator=generator) < 0.6
        return {"mask": mask, "position_ids": torch.randint(0, 99, (batch, seqlen), generator=generator)}

    return build


def _strided(generator: torch.Generator) -> Args:
    made = prune_inputs(generator, 2, 6, 8)
    return {"features": made["features"][:, :, 1:6], "scores": made["scores"], "num_keep": 3}


register_cases(
    *(
        Case("prune_tokens", name, build, small=small)
        for name, build, small in (
            ("one", _prune(1, 4, 3, num_keep=1), True),
            ("plain", _prune(2, 6, 3, num_keep=4), True),
            ("ratio-packed", _prune(2, 5, 3, keep_ratio=0.5, packed=True), True),
            ("masked", _prune(3, 6, 2, num_keep=4, more=_masked(3, 6)), True),
            ("ratio-masked", _prune(3, 7, 2, keep_ratio=0.5, more=_masked(3, 7)), True),
            ("views", _strided, True),
            ("everything", _prune(2, 5, 4, num_keep=5), True),
            ("packed-masked", _prune(3, 9, 4, num_keep=4, packed=True, more=_masked(3, 9)), False),
            ("per-sample", _prune(3, 11, 4, num_keep=[2, 11, 5]), False),
            ("per-sample-packed", _prune(3, 11, 4, num_keep=[2, 11, 5], packed=True), False),
            ("mass", _prune(3, 33, 4, keep_mass=0.6), False),
            ("mass-packed", _prune(3, 33, 4, keep_mass=0.3, packed=True, more=_masked(3, 33)), False),
            ("ties", _ties, False),
            ("clip", _prune(2, 576, 40, num_keep=64), False),
            ("empty-batch", _prune(0, 5, 4, num_keep=2), False),
            ("no-channels", _prune(2, 5, 0, num_keep=2), False),
        )
    )
)


def _columns(*size: int, masked: str = "", **options: Any) -> Build:
    """Columns of attention; `masked` names what has a mask: q, k or both."""
    kv_heads, rows = options.pop("kv_heads", 0), options.pop("rows", None)

    def build(generator: torch.Generator) -> Args:
        made = score_inputs(generator, *size, rows=size[1] if rows is None else rows, kv_heads=kv_heads)
        for name, of in (("query_mask", "q"), ("key_mask", "k")):
            if of in masked:
                mask = torch.rand(made[of].shape[:2], generator=generator) < 0.6
                mask[:1] = True  # and a sample of which nothing counts
                mask[1:2] = False
                made[name] = mask
        return made | options

    return build


def _columns_with_lse(generator: torch.Generator) -> Args:
    made = score_inputs(generator, 2, 6, 2, 5, rows=4)
    logits = torch.einsum("brhd,bnhd->bhrn", made["q"], made["k"]) * 5**-0.5
    hidden = torch.ones(4, 6, dtype=torch.bool).triu(3)
    return made | {"lse": torch.logsumexp(logits.masked_fill(hidden, -torch.inf), -1), "causal": True}


register_cases(
    *(
        Case("attention_column_scores", name, build, small=small, summands=summands, heavy=heavy)
        for name, build, small, summands, heavy in (
            ("one-head", _columns(1, 4, 1, 3), True, 16, False),
            ("shared-keys", _columns(2, 5, 4, 3, kv_heads=2, num_prefix=2, scale=0.7), True, 20, False),
            ("masked", _columns(3, 6, 2, 4, masked="qk", num_prefix=0), True, 24, False),
            ("causal", _columns(2, 6, 2, 4, masked="q", rows=4, causal=True, num_prefix=0), True, 16, False),
            ("causal-more-rows", _columns(2, 3, 2, 4, rows=5, causal=True), True, 20, False),
            ("lse", _columns_with_lse, True, 20, False),
            ("odd", _columns(2, 71, 3, 37, masked="k"), False, 213, False),
            ("few-rows", _columns(3, 45, 4, 8, masked="q", rows=33, kv_heads=1, causal=True), False, 132, False),
            ("blocks", _columns(1, 300, 2, 16), False, 600, True),
            ("no-rows", _columns(2, 5, 2, 4, rows=0), False, 0, False),
            ("all-prefix", _columns(2, 3, 2, 4, num_prefix=3), False, 0, False),
            ("empty-batch", _columns(0, 5, 2, 4), False, 0, False),
        )
    )
)


def _matching(batch: int, tokens: int, dim: int, r: int, **options: Any) -> Build:
    return lambda generator: (
        {
            "metric": torch.randn(batch, tokens, dim, generator=generator, dtype=torch.float64),
            "r": r,
        }
        | options
    )


def _alike(generator: torch.Generator) -> Args:
    """Signed unit vectors of few directions: cosines are -1, 0 and 1, exactly and often, in any dtype and any order."""
    axis = torch.randint(0, 5, (2, 150), generator=generator)
    sign = torch.randint(0, 2, (2, 150, 1), generator=generator) * 2.0 - 1.0
    return {"metric": sign * torch.nn.functional.one_hot(axis, 5).double(), "r": 60}


def _merging(batch: int, tokens: int, dim: int, r: int, *, sizes: bool = True, **options: Any) -> Build:
    def build(generator: torch.Generator) -> Args:
        from mmkernels.ops.token_pruning.merging import bipartite_soft_matching

        made = _matching(batch, tokens, 4, r, **options)(generator)
        plan = bipartite_soft_matching(**made, backend="reference")
        x = torch.randn(batch, tokens, dim, generator=generator, dtype=torch.float64)
        weight = torch.rand(batch, tokens, generator=generator, dtype=torch.float64) + 0.5
        return {"x": x, "plan": plan} | ({"sizes": weight} if sizes else {})

    return build


register_cases(
    *(
        Case("bipartite_soft_matching", name, build, small=small, summands=8)
        for name, build, small in (
            ("two", _matching(1, 2, 3, 1), True),
            ("plain", _matching(2, 6, 4, 2), True),
            ("protected", _matching(2, 7, 3, 2, protect=2, order="sets"), True),
            ("half", _matching(3, 9, 4, 4, protect=1), False),
            ("nothing", _matching(2, 5, 4, 0), False),
            ("nothing-sets", _matching(2, 5, 4, 0, order="sets"), False),
            ("odd", _matching(2, 71, 37, 30, protect=1), False),
            ("ties", _alike, False),
            ("empty-batch", _matching(0, 6, 4, 2), False),
        )
    ),
    *(
        Case("merge_tokens", name, build, small=small, summands=8)
        for name, build, small in (
            ("two", _merging(1, 2, 3, 1), True),
            ("plain", _merging(2, 8, 3, 3), True),
            ("one-each", _merging(2, 7, 3, 3, sizes=False, protect=1), True),
            ("sets", _merging(2, 9, 2, 3, order="sets"), True),
            ("nothing", _merging(2, 5, 4, 0), False),
            ("many", _merging(2, 70, 33, 35), False),
            ("empty-batch", _merging(0, 6, 4, 2), False),
            ("no-channels", _merging(2, 6, 0, 2), False),
        )
    ),
)
