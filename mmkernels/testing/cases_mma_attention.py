"""Test inputs of mma_attention: every kind of mask, head layout and row that keeps nothing."""

from collections.abc import Callable
from typing import Any

import torch

from mmkernels.ops.mma_attention.mask import MMAMask, mma_mask
from mmkernels.testing.cases import Case, register_cases

Args = dict[str, Any]
Build = Callable[[torch.Generator], Args]


def attention_inputs(
    generator: torch.Generator,
    batch: int,
    qlen: int,
    nheads: int,
    nkvheads: int,
    headdim: int,
    klen: int | None = None,
    *,
    mask: MMAMask | None = None,
    weigh: bool = False,
    **rest: Any,
) -> Args:
    """Keyword arguments of mma_attention in float64; `weigh` makes mass_weights, some of them 0."""
    klen = qlen if klen is None else klen

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    made: Args = {
        "q": normal(batch, qlen, nheads, headdim),
        "k": normal(batch, klen, nkvheads, headdim),
        "v": normal(batch, klen, nkvheads, headdim),
        "mask": mask,
    }
    if weigh:
        made["mass_weights"] = normal(batch, qlen).clamp(min=0)
    return {**made, **rest}


def _build(*sizes: int, **options: Any) -> Build:
    return lambda generator: attention_inputs(generator, *sizes, **options)


def _transposed(generator: torch.Generator) -> Args:
    # As a transformers decoder passes them: heads before tokens in memory, keys as a slice of a longer cache.
    made = attention_inputs(generator, 2, 5, 4, 2, 3, 7)
    made["q"] = made["q"].transpose(1, 2).contiguous().transpose(1, 2)
    cache = torch.randn(2, 2, 2, 11, 3, generator=generator, dtype=torch.float64)
    made["k"], made["v"] = cache[0, :, :, :7].transpose(1, 2), cache[1, :, :, :7].transpose(1, 2)
    return made


def _custom(qlen: int, klen: int, rows: list[list[tuple[int, int]]], rects: list[tuple[int, ...]]) -> MMAMask:
    ends = torch.tensor(rows, dtype=torch.int32)
    listed = torch.tensor(rects, dtype=torch.int32).reshape(-1, 5)
    return MMAMask(ends[..., 0].contiguous(), ends[..., 1].contiguous(), listed, klen)


def _bounds(*offsets: int) -> torch.Tensor:
    return torch.tensor(offsets, dtype=torch.int32)


def _valid(*rows: tuple[int, int, int]) -> torch.Tensor:
    # (left padding, tokens, right padding) of each batch row
    return torch.stack([torch.tensor([0] * a + [1] * n + [0] * z) for a, n, z in rows])


_EXTRAS: Args = {"return_lse": True, "weigh": True}
_AKI = [(0, 1, 3, 3, 6), (1, 2, 5, 5, 7)]
_TURNS = [(0, 1, 3, 3, 4), (0, 1, 3, 5, 6), (0, 4, 5, 5, 6), (1, 0, 2, 2, 4), (1, 5, 6, 6, 7)]
# Rectangles that overlap each other, the intervals and the edges; intervals with holes, past the end, turned around.
_ODD = _custom(
    5,
    6,
    [[(0, 2), (4, 1), (3, 9), (2, 2), (0, 6)], [(5, 6), (0, 0), (1, 3), (2, 4), (0, 1)]],
    [(0, 0, 2, 1, 4), (0, 1, 4, 2, 5), (0, 3, 3, 0, 6), (1, 1, 2, 5, 6), (1, 2, 9, 0, 2)],
)
# Dead, partial and full tiles at once for tiles of 16 rows and 32 keys; of the rectangles one fills a tile, one all
# rows of a tile but the first, one all keys of a tile but the first ones.
_RECTS: list[tuple[int, ...]] = [(0, 0, 16, 32, 64), (0, 17, 32, 32, 70), (0, 32, 40, 50, 66)]
_TILES = _custom(40, 70, [[(0, 10 + i) for i in range(40)]], _RECTS)
_LONG = [(0, 20, 164, 164, 205), (1, 3, 100, 100, 130), (1, 140, 170, 170, 171)]
_IMAGES = [(0, 10, 90, 10, 90), (0, 120, 190, 120, 190), (1, 0, 150, 0, 150)]

# Their features are in aki with tiles, padded-lse, image-block, window, documents, cache, decode and headdim-96.
_HEAVY = (
    *("aki-long", "aki-padded", "images", "window-long", "documents-long"),
    *("chunk", "decode-long", "headdim-64", "headdim-72"),
)

register_cases(
    *(
        Case("mma_attention", name, build, small=True, summands=14)
        for name, build in (
            ("causal", _build(2, 5, 2, 2, 3)),
            ("causal-lse", _build(1, 6, 2, 1, 4, **_EXTRAS)),
            ("cache", _build(2, 2, 4, 2, 3, 6, **_EXTRAS)),
            ("full", _build(1, 3, 2, 2, 3, 5, mask=MMAMask.full(3, 5), **_EXTRAS)),
            ("window", _build(1, 7, 2, 2, 3, mask=MMAMask.sliding_window(7, 3), scale=0.7)),
            ("documents", _build(1, 7, 2, 2, 3, mask=MMAMask.documents(_bounds(0, 1, 1, 5, 7), 7), **_EXTRAS)),
            ("aki", _build(2, 7, 4, 2, 3, mask=mma_mask(7, spans=_AKI, batch=2), **_EXTRAS)),
            ("turns", _build(2, 7, 2, 2, 3, mask=mma_mask(7, spans=_TURNS, batch=2))),
            ("image-block", _build(1, 6, 2, 2, 3, mask=mma_mask(6, spans=[(0, 1, 4, 1, 4)]), **_EXTRAS)),
            ("padded", _build(2, 6, 2, 2, 3, mask=mma_mask(6, attention_mask=_valid((2, 4, 0), (0, 5, 1))))),
            ("nothing", _build(1, 3, 2, 2, 3, mask=_custom(3, 3, [[(1, 1)] * 3], []))),
            ("odd", _build(2, 5, 6, 2, 3, 6, mask=_ODD)),
            ("transposed", _transposed),
        )
    ),
    *(
        Case("mma_attention", name, build, summands=tokens, heavy=name in _HEAVY)
        for name, tokens, build in (
            ("tiles", 80, _build(1, 40, 2, 1, 5, 70, mask=_TILES, **_EXTRAS)),
            ("empty-qlen", 0, _build(2, 0, 2, 2, 3, 4, **_EXTRAS)),
            ("empty-klen", 0, _build(2, 3, 2, 2, 3, 0, mask=MMAMask.full(3, 0, batch=2), **_EXTRAS)),
            ("empty-batch", 0, _build(0, 3, 2, 2, 3)),
            (
                "padded-lse",
                14,
                _build(2, 6, 2, 2, 3, mask=mma_mask(6, attention_mask=_valid((2, 4, 0), (0, 5, 1))), **_EXTRAS),
            ),
            ("odd-lse", 14, _build(2, 5, 6, 2, 3, 6, mask=_ODD, **_EXTRAS)),
            ("aki-long", 230, _build(2, 230, 4, 2, 24, mask=mma_mask(230, spans=_LONG, batch=2), **_EXTRAS)),
            (
                "aki-padded",
                230,
                _build(
                    2,
                    230,
                    2,
                    1,
                    17,
                    mask=mma_mask(230, spans=_LONG, attention_mask=_valid((7, 223, 0), (0, 180, 50))),
                    **_EXTRAS,
                ),
            ),
            ("images", 200, _build(2, 200, 2, 2, 96, mask=mma_mask(200, spans=_IMAGES, batch=2), **_EXTRAS)),
            ("window-long", 300, _build(1, 300, 3, 1, 33, mask=MMAMask.sliding_window(300, 65))),
            (
                "documents-long",
                300,
                _build(1, 300, 4, 4, 16, mask=MMAMask.documents(_bounds(0, 129, 260, 260, 290), 300)),
            ),
            ("chunk", 300, _build(1, 60, 4, 2, 80, 300, mask=mma_mask(60, 300, spans=[(0, 250, 260, 260, 290)]))),
            ("decode", 140, _build(1, 1, 4, 2, 8, 140, **_EXTRAS)),
            ("decode-long", 400, _build(3, 1, 8, 2, 128, 400, **_EXTRAS)),
            ("headdim-64", 140, _build(1, 140, 2, 1, 64)),
            ("headdim-72", 140, _build(1, 140, 2, 2, 72)),
            ("headdim-96", 40, _build(1, 40, 2, 2, 96)),
        )
    ),
)
