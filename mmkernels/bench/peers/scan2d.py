"""A grid read in several directions, between a mixer's two projections: convolutions, scans, gate, norm, mean.

`args` hold what the projection gives, (batch, tokens, z | x B C | dt), the parameters, one row of each for every
direction but of the norm's weight, and where: scans, height, width.
"""

import dataclasses
import functools
import math
from typing import Any

import torch
from torch import Tensor

import mmkernels
from mmkernels.bench.peers import transformers_cpu
from mmkernels.bench.peers.ours import require_ready
from mmkernels.bench.problems import Prepared, Problem, mixer_problem, tracked
from mmkernels.bench.shapes import Cell, scan_flops

Args = dict[str, Any]
SCANS = {"bidirectional": ("raster", "raster_rev"), "cross": ("raster", "column", "raster_rev", "column_rev")}
_OWN = ("conv_weight", "conv_bias", "A_log", "D", "dt_bias")  # of each direction


def grid_problem(cell: Cell, *, scans: tuple[str, ...]) -> Problem:
    """A mixer's problem with parameters for every direction; the grid is the squarest one of that many tokens."""
    args = mixer_problem(dataclasses.replace(cell, backward=False)).args
    generator = torch.Generator().manual_seed(1)
    for name in _OWN:  # directions differ by a tenth: who swaps two of them is wrong
        change = 1 + torch.randn(len(scans), *args[name].shape, generator=generator) / 10
        args[name] = (args[name] * change).to(args[name].dtype)
    height = next(h for h in range(math.isqrt(cell.seqlen), 0, -1) if cell.seqlen % h == 0)
    where = {"scans": scans, "height": height, "width": cell.seqlen // height}
    return Problem(cell, {**tracked(cell, args), **where})


def grid_truth(args: Args) -> Tensor:
    """Every part by its reference."""
    return in_place(args, backend="reference")


def grid_flops(cell: Cell, *, scans: tuple[str, ...]) -> float:
    """Useful floating-point operations: those of each direction's scan."""
    return len(scans) * scan_flops(cell)


def _parts(args: Args, zxbcdt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """z, xBC and dt."""
    nheads = args["A_log"].shape[1]
    return zxbcdt.split([args["norm_weight"].shape[0], args["conv_weight"].shape[1], nheads], dim=-1)


def in_place(args: Args, *, backend: str | None = None) -> Tensor:
    """Read through the orders of the directions: what MultiDirectionalMamba2 does between its projections."""
    z, xBC, dt = _parts(args, args["zxbcdt"])
    y = mmkernels.conv_ssd_scan_2d(
        xBC,
        dt,
        args["conv_weight"],
        -args["A_log"].exp(),
        conv_bias=args["conv_bias"],
        headdim=z.shape[-1] // dt.shape[-1],
        scans=args["scans"],
        height=args["height"],
        width=args["width"],
        D=args["D"],
        dt_bias=args["dt_bias"],
        dt_softplus=True,
        backend=backend,
    )
    return mmkernels.merged_gated_rms_norm(y.flatten(-2), args["norm_weight"], z=z, backend=backend)


def permuted(tokens: Tensor, scan: str, order: Tensor) -> Tensor:
    """A copy in another order, made the fastest way torch has."""
    if scan == "raster":
        return tokens
    return tokens.flip(1) if scan == "raster_rev" else tokens.index_select(1, order)


def merged_copies(args: Args, directions: list[Any]) -> Tensor:
    """The mean of the directions, each given a copy of the tokens in its order and its result put back."""
    merged = None
    for scan, direction in zip(args["scans"], directions, strict=True):
        order, inverse = mmkernels.scan_permutation(scan, args["height"], args["width"])
        out = permuted(direction(permuted(args["zxbcdt"], scan, order)), scan, inverse)
        merged = out if merged is None else merged.add_(out)
    assert merged is not None  # there is at least one scan
    return merged.div_(len(directions))


def own_direction(args: Args, k: int, zxbcdt: Tensor, *, backend: str | None = "native") -> Tensor:
    """Direction k of tokens that lie in its order, on the one-dimensional ops of this package."""
    z, xBC, dt = _parts(args, zxbcdt)
    heads, inner = dt.shape[-1], z.shape[-1]
    xBC = mmkernels.causal_conv1d(xBC, args["conv_weight"][k], args["conv_bias"][k], activation="silu", backend=backend)  # type: ignore[assignment]  # no states were asked for
    keys = (xBC.shape[-1] - inner) // 2
    x, B, C = xBC.split([inner, keys, keys], dim=-1)
    x, A = x.unflatten(-1, (heads, -1)), -args["A_log"][k].exp()
    y: Any = mmkernels.ssd_scan(
        x, dt, A, B[:, :, None], C[:, :, None], D=args["D"][k], dt_bias=args["dt_bias"][k], dt_softplus=True,
        backend=backend,
    )  # fmt: skip
    return mmkernels.gated_rms_norm(y.flatten(-2), args["norm_weight"], z=z, backend=backend)


def with_copies(args: Args, *, backend: str | None = "native") -> Tensor:
    """Flipped and gathered copies through the one-dimensional ops of this package."""
    return merged_copies(
        args, [functools.partial(own_direction, args, k, backend=backend) for k in range(len(args["scans"]))]
    )


def transformers_layers(args: Args, sizes: Any, chunk: int) -> list[Any]:
    """The mixer of transformers for each direction, without its projections."""
    return [
        transformers_cpu.mixer_layer(sizes, {**args, **{name: args[name][k] for name in _OWN}}, chunk)
        for k in range(len(args["scans"]))
    ]


def ours(problem: Problem, *, backend: str = "native") -> Prepared:
    """`mmkernels.conv_ssd_scan_2d` and `mmkernels.merged_gated_rms_norm`."""
    for op in ("conv_ssd_scan_2d", "merged_gated_rms_norm"):
        require_ready(backend, op)
    return Prepared(lambda: in_place(problem.args, backend=backend))


def copies(problem: Problem) -> Prepared:
    """What the one-dimensional ops offer."""
    for op in ("causal_conv1d", "ssd_scan", "gated_rms_norm"):
        require_ready("native", op)
    return Prepared(lambda: with_copies(problem.args))


def on_transformers(problem: Problem, *, chunk: int) -> Prepared:
    """What transformers offers."""
    layers = transformers_layers(problem.args, problem.cell.sizes, chunk)
    return Prepared(lambda: merged_copies(problem.args, layers))
