"""Test inputs of ssd_scan_2d, causal_conv1d_2d and merged_gated_rms_norm."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from mmkernels.testing.cases import Case, register_cases

Args = dict[str, Any]
Build = Callable[[torch.Generator], Args]

BOTH_WAYS = ("raster", "raster_rev")
CROSS = ("raster", "column", "raster_rev", "column_rev")


def ssd_2d_inputs(
    generator: torch.Generator,
    batch: int,
    grid: tuple[int, int],
    heads: int,
    headdim: int,
    groups: int,
    dstate: int,
    scans: Sequence[str],
    *,
    own: str = "",
    D: str = "head",
    **rest: Any,
) -> Args:
    """Keyword arguments of ssd_scan_2d in float64; `own` names the inputs that each direction has for itself."""
    length, count = grid[0] * grid[1], len(scans)

    def draw(name: str, *size: int) -> torch.Tensor:
        lead = (batch, count) if name in own.split() else (batch,)
        return torch.randn(*lead, length, *size, generator=generator, dtype=torch.float64)

    def parameter(*size: int) -> torch.Tensor:
        return torch.randn(count, *size, generator=generator, dtype=torch.float64)

    return {
        "x": draw("x", heads, headdim),
        "dt": draw("dt", heads),
        "A": -torch.exp(parameter(heads)),
        "B": draw("B", groups, dstate) / dstate**0.5,
        "C": draw("C", groups, dstate),
        "D": {"head": parameter(heads), "channel": parameter(heads, headdim), "": None}[D],
        "dt_bias": parameter(heads),
        "dt_softplus": True,
        "scans": tuple(scans),
        "height": grid[0],
        "width": grid[1],
        **rest,
    }


def _ssd(*sizes: Any, **rest: Any) -> Build:
    return lambda generator: ssd_2d_inputs(generator, *sizes, **rest)


def _ssd_views(generator: torch.Generator) -> Args:
    # As the layer passes them: x, B and C are slices of the convolution's output, dt of the projection.
    made = ssd_2d_inputs(generator, 2, (2, 3), 2, 4, 1, 3, CROSS)
    wide = torch.randn(2, 4, 6, 8 + 3 + 3, generator=generator, dtype=torch.float64)
    rows = torch.randn(2, 6, 9, generator=generator, dtype=torch.float64)
    made["x"] = wide[..., :8].unflatten(-1, (2, 4))
    made["B"], made["C"] = wide[..., None, 8:11], wide[..., None, 11:]
    return {**made, "dt": rows[..., 7:]}


def conv_2d_inputs(
    generator: torch.Generator,
    batch: int,
    grid: tuple[int, int],
    dim: int,
    taps: int,
    scans: Sequence[str],
    *,
    own: bool = False,
    bias: bool = True,
    **rest: Any,
) -> Args:
    """Keyword arguments of causal_conv1d_2d in float64; `own`: each direction has its own x."""
    count = len(scans)
    lead = (batch, count) if own else (batch,)
    return {
        "x": torch.randn(*lead, grid[0] * grid[1], dim, generator=generator, dtype=torch.float64),
        "weight": torch.randn(count, dim, taps, generator=generator, dtype=torch.float64) / taps**0.5,
        "bias": torch.randn(count, dim, generator=generator, dtype=torch.float64) if bias else None,
        "scans": tuple(scans),
        "height": grid[0],
        "width": grid[1],
        **rest,
    }


def _conv(*sizes: Any, **rest: Any) -> Build:
    return lambda generator: conv_2d_inputs(generator, *sizes, **rest)


def _conv_views(generator: torch.Generator) -> Args:
    made = conv_2d_inputs(generator, 2, (3, 2), 6, 4, CROSS, activation="silu")
    wide = torch.randn(2, 6, 11, generator=generator, dtype=torch.float64)
    return {**made, "x": wide[..., 3:9]}


def conv_ssd_2d_inputs(
    generator: torch.Generator,
    batch: int,
    grid: tuple[int, int],
    heads: int,
    headdim: int,
    groups: int,
    dstate: int,
    scans: Sequence[str],
    *,
    own: str = "",
    taps: int = 4,
    bias: bool = True,
    **rest: Any,
) -> Args:
    """Keyword arguments of conv_ssd_scan_2d in float64."""
    made = ssd_2d_inputs(generator, batch, grid, heads, headdim, groups, dstate, scans, own=own, **rest)
    dim = heads * headdim + 2 * groups * dstate
    filters = conv_2d_inputs(generator, batch, grid, dim, taps, scans, own="xBC" in own, bias=bias)
    for name in ("x", "B", "C"):
        del made[name]
    return {
        **made,
        "xBC": filters["x"],
        "conv_weight": filters["weight"],
        "conv_bias": filters["bias"],
        "headdim": headdim,
        "ngroups": groups,
    }


def _conv_ssd(*sizes: Any, **rest: Any) -> Build:
    return lambda generator: conv_ssd_2d_inputs(generator, *sizes, **rest)


def _conv_ssd_views(generator: torch.Generator) -> Args:
    made = conv_ssd_2d_inputs(generator, 2, (3, 2), 2, 3, 1, 4, CROSS)
    wide = torch.randn(2, 6, 2 + 14 + 3, generator=generator, dtype=torch.float64)
    return {**made, "xBC": wide[..., 2:16], "dt": wide[..., 17:]}


def norm_inputs(
    generator: torch.Generator, batch: int, count: int, length: int, dim: int, *, gate: bool = True, **rest: Any
) -> Args:
    """Keyword arguments of merged_gated_rms_norm in float64."""
    group = rest.get("group_size") or dim
    return {
        "y": torch.randn(batch, count, length, dim, generator=generator, dtype=torch.float64),
        "weight": torch.randn(dim if rest.pop("wide", False) else group, generator=generator, dtype=torch.float64),
        "z": torch.randn(batch, length, dim, generator=generator, dtype=torch.float64) if gate else None,
        **rest,
    }


def _norm(*sizes: int, **rest: Any) -> Build:
    return lambda generator: norm_inputs(generator, *sizes, **rest)


def _norm_views(generator: torch.Generator) -> Args:
    made = norm_inputs(generator, 2, 3, 4, 5)
    wide = torch.randn(2, 4, 9, generator=generator, dtype=torch.float64)
    y = torch.randn(2, 4, 3, 5, generator=generator, dtype=torch.float64)
    return {**made, "z": wide[..., 2:7], "y": y.transpose(1, 2)}


register_cases(
    *(
        Case("ssd_scan_2d", name, build, small=small, heavy=name in ("chunks", "odd-grid"))
        for name, build, small in (
            ("tiny", _ssd(1, (2, 1), 1, 3, 1, 2, ("raster_rev",)), True),
            ("both-ways", _ssd(2, (2, 3), 2, 3, 1, 4, BOTH_WAYS), True),
            ("cross-own", _ssd(1, (3, 2), 2, 3, 2, 4, CROSS, own="x dt B C", D="channel"), True),
            ("own-keys", _ssd(2, (2, 2), 2, 3, 1, 2, ("column", "hilbert_rev"), own="B C", D=""), True),
            ("paths", _ssd(1, (3, 4), 1, 2, 1, 3, ("snake_col", "diagonal", "window:2", "anti_diagonal_rev")), False),
            ("limits", _ssd(1, (1, 5), 2, 2, 1, 2, BOTH_WAYS, dt_limit=(0.1, 0.8)), True),
            ("views", _ssd_views, True),
            ("cut", _ssd(1, (2, 3), 1, 2, 1, 2, ("column_rev", "hilbert"), own="x", chunk_size=2), False),
            ("chunks", _ssd(2, (9, 16), 4, 16, 2, 8, CROSS, own="x B C", chunk_size=32), False),
            ("odd-grid", _ssd(1, (13, 11), 3, 20, 1, 17, (*CROSS, "hilbert", "snake_row")), False),
            ("empty-seqlen", _ssd(2, (0, 3), 2, 4, 1, 2, BOTH_WAYS), False),
            ("empty-batch", _ssd(0, (2, 3), 2, 4, 1, 2, CROSS), False),
        )
    ),
    *(
        Case("causal_conv1d_2d", name, build, small=small, heavy=name == "pieces")
        for name, build, small in (
            ("tiny", _conv(1, (1, 3), 1, 2, ("raster_rev",), activation="silu"), True),
            ("both-ways", _conv(2, (2, 3), 3, 4, BOTH_WAYS, activation="silu"), True),
            ("cross-own", _conv(1, (3, 2), 3, 3, CROSS, own=True, bias=False), True),
            ("paths", _conv(1, (3, 3), 2, 4, ("hilbert", "snake_row_rev", "window:2", "diagonal")), True),
            ("width1", _conv(2, (1, 4), 3, 1, ("column", "raster_rev"), activation="silu"), True),
            ("wide-short", _conv(1, (1, 2), 3, 5, BOTH_WAYS), True),
            ("views", _conv_views, True),
            ("pieces", _conv(2, (9, 15), 40, 4, CROSS, activation="silu"), False),
            ("empty-seqlen", _conv(2, (3, 0), 4, 4, BOTH_WAYS), False),
            ("empty-batch", _conv(0, (2, 3), 4, 4, CROSS), False),
        )
    ),
    *(
        Case(
            "conv_ssd_scan_2d",
            name,
            build,
            small=small,
            summands={"chunks": 2 * 135, "tiny": 2 * 2 * 3}.get(name, 0),  # tokens; all products of a rate
            heavy=name in ("chunks", "views"),
        )
        for name, build, small in (
            ("tiny", _conv_ssd(1, (1, 3), 1, 2, 1, 2, ("raster_rev",), taps=2), True),
            ("views", _conv_ssd_views, False),
            ("own", _conv_ssd(1, (2, 3), 2, 3, 2, 2, BOTH_WAYS, own="xBC dt", taps=3, bias=False, D="channel"), True),
            ("linear", _conv_ssd(1, (3, 3), 2, 2, 1, 3, ("hilbert",), activation=None, D=""), False),
            ("wide-short", _conv_ssd(1, (1, 2), 2, 5, 1, 2, BOTH_WAYS, taps=5), False),
            ("chunks", _conv_ssd(2, (9, 15), 4, 20, 2, 8, (*CROSS, "window:4")), False),
            ("empty-seqlen", _conv_ssd(2, (0, 3), 2, 4, 1, 2, BOTH_WAYS), False),
            ("empty-batch", _conv_ssd(0, (2, 3), 2, 4, 1, 2, CROSS), False),
        )
    ),
    *(
        Case("merged_gated_rms_norm", name, build, small=small)
        for name, build, small in (
            ("mean", _norm(2, 2, 3, 6), True),
            ("sum-groups", _norm(2, 3, 3, 6, group_size=3, reduction="sum"), True),
            ("groups-wide", _norm(1, 4, 2, 8, group_size=2, wide=True, eps=1e-3), True),
            ("ungated", _norm(2, 1, 3, 5, gate=False), True),
            ("views", _norm_views, True),
            ("mixer", _norm(2, 4, 12, 320), False),
            ("empty-seqlen", _norm(2, 2, 0, 4), False),
            ("empty-batch", _norm(0, 2, 3, 4), False),
        )
    ),
)
