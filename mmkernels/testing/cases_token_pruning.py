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
    signs = torch.where(torch.rand(3, 40, generator=generator) < 0.5, -1.0, 1.0).double()  # of zeros, too
    return made | {"scores": torch.randint(-1, 2, (3, 40), generator=generator) * signs, "num_keep": 17}


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
