"""Scans of a grid in several directions against copies of the tokens in each order: the same kernels otherwise.

pytest benchmarks/ops/bench_scan2d.py
"""

import pytest
import torch

import mmkernels
from mmkernels.layers import MultiDirectionalMamba2

SCANS = {"bidirectional": ("raster", "raster_rev"), "cross": ("raster", "column", "raster_rev", "column_rev")}


def in_place(mixer, projected, grid):
    """Convolution, scan, norm and merge of all directions, reading through the orders."""
    z, xBC, dt = projected.split([mixer.d_inner, mixer.conv_dim, mixer.nheads], dim=-1)
    height, width = grid
    where = {"scans": mixer.scans, "height": height, "width": width}
    xBC = mmkernels.causal_conv1d_2d(xBC, mixer.conv_weight, mixer.conv_bias, activation="silu", **where)
    x, B, C = heads(mixer, xBC)
    A = -mixer.A_log.exp()
    y = mmkernels.ssd_scan_2d(x, dt, A, B, C, D=mixer.D, dt_bias=mixer.dt_bias, dt_softplus=True, **where)
    return mmkernels.merged_gated_rms_norm(y.flatten(-2), mixer.norm.weight, z=z)


def with_copies(mixer, projected, grid):
    """The same by one-dimensional ops: for each direction the projection is copied in its order, the result back."""
    merged = 0.0
    for k, scan in enumerate(mixer.scans):
        order, inverse = mmkernels.scan_permutation(scan, *grid)
        z, xBC, dt = permuted(projected, scan, order).split([mixer.d_inner, mixer.conv_dim, mixer.nheads], dim=-1)
        xBC = mmkernels.causal_conv1d(xBC, mixer.conv_weight[k], mixer.conv_bias[k], activation="silu")
        x, B, C = heads(mixer, xBC)
        A = -mixer.A_log[k].exp()
        y = mmkernels.ssd_scan(x, dt, A, B, C, D=mixer.D[k], dt_bias=mixer.dt_bias[k], dt_softplus=True)
        out = mmkernels.gated_rms_norm(y.flatten(-2), mixer.norm.weight, z=z)
        merged = merged + permuted(out, scan, inverse)
    return merged / len(mixer.scans)


def permuted(tokens, scan, order):
    """A copy in another order, made the fastest way torch has."""
    if scan == "raster":
        return tokens
    return tokens.flip(1) if scan == "raster_rev" else tokens.index_select(1, order)


def heads(mixer, xBC):
    """The x, B and C of a convolved projection."""
    keys = mixer.ngroups * mixer.d_state
    x, B, C = xBC.split([mixer.d_inner, keys, keys], dim=-1)
    groups = (mixer.ngroups, mixer.d_state)
    return x.unflatten(-1, (mixer.nheads, mixer.headdim)), B.unflatten(-1, groups), C.unflatten(-1, groups)


@pytest.mark.parametrize("who", [in_place, with_copies], ids=lambda f: f.__name__)
@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("grid", [(27, 27), (54, 54)], ids=str)
def bench_directions(benchmark, grid, scan, who):
    torch.manual_seed(0)
    mixer = MultiDirectionalMamba2(2560, scans=SCANS[scan])
    projected = torch.randn(1, grid[0] * grid[1], mixer.in_proj.out_features) / 2
    benchmark.group = f"scan2d {grid} {scan}"
    with torch.no_grad():
        torch.testing.assert_close(
            who(mixer, projected, grid), with_copies(mixer, projected, grid), rtol=1e-3, atol=1e-4
        )
        benchmark(who, mixer, projected, grid)
