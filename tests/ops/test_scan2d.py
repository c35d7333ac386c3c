"""Scans of a grid: orders, crossing, symmetries between directions, bad input."""

import pytest
import torch

import mmkernels
from mmkernels import ConfigError, DtypeError, ShapeError
from mmkernels.testing.cases_scan2d import conv_2d_inputs, norm_inputs, ssd_2d_inputs

KINDS = ("raster", "column", "snake_row", "snake_col", "diagonal", "anti_diagonal", "hilbert", "window:3")
SCANS = (*KINDS, *(f"{kind}_rev" for kind in KINDS))
GRIDS = [(1, 1), (1, 7), (6, 1), (2, 3), (4, 5), (5, 4), (7, 7), (8, 8), (27, 27), (12, 31)]
CROSS = ("raster", "column", "raster_rev", "column_rev")
READY = [name for name in ("native", "torch") if mmkernels.backends()["ssd_scan_2d"].get(name) == "ready"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def cells_apart(order, width):
    """Steps of a path: (the larger, the sum) of its moves along rows and columns."""
    i, j = order // width, order % width
    di, dj = i.diff().abs(), j.diff().abs()
    return torch.maximum(di, dj), di + dj


# ---- orders ----


@pytest.mark.parametrize("scan", SCANS)
def test_a_permutation_and_its_inverse(scan):
    for grid in GRIDS:
        order, inverse = mmkernels.scan_permutation(scan, *grid)
        everything = torch.arange(grid[0] * grid[1])
        assert order.dtype == inverse.dtype == torch.int64
        assert torch.equal(order.sort().values, everything), grid
        assert torch.equal(order[inverse], everything), grid
        assert torch.equal(inverse[order], everything), grid


def test_the_orders_of_a_small_grid():
    # row 0: 0 1 2, row 1: 3 4 5
    wanted = {
        "raster": [0, 1, 2, 3, 4, 5],
        "raster_rev": [5, 4, 3, 2, 1, 0],
        "column": [0, 3, 1, 4, 2, 5],
        "column_rev": [5, 2, 4, 1, 3, 0],
        "snake_row": [0, 1, 2, 5, 4, 3],
        "snake_col": [0, 3, 4, 1, 2, 5],
        "diagonal": [0, 1, 3, 2, 4, 5],
        "anti_diagonal": [2, 1, 5, 0, 4, 3],
        "window:2": [0, 1, 3, 4, 2, 5],
    }
    for scan, order in wanted.items():
        assert mmkernels.scan_permutation(scan, 2, 3)[0].tolist() == order, scan
    assert mmkernels.scan_permutation("window", 2, 3, window=2)[0].tolist() == wanted["window:2"]


def test_hilbert_neighbours_are_neighbours():
    """No step is longer than to the next cell; one is diagonal exactly where no path between the two corners can do
    without: the longer side is odd, the shorter even."""
    for grid in ((h, w) for h in range(1, 15) for w in range(1, 15)):
        far, steps = cells_apart(mmkernels.scan_permutation("hilbert", *grid)[0], grid[1])
        longer, shorter = max(grid), min(grid)
        assert (far <= 1).all(), grid
        assert (steps > 1).sum() == (1 if longer % 2 == 1 and shorter % 2 == 0 and shorter > 2 else 0), grid


@pytest.mark.parametrize("scan", ["snake_row", "snake_col"])
def test_snakes_never_jump(scan):
    for grid in GRIDS:
        assert (cells_apart(mmkernels.scan_permutation(scan, *grid)[0], grid[1])[1] == 1).all()


def test_a_permutation_is_the_callers_own():
    mmkernels.scan_permutation("column", 3, 4)[0].zero_()
    assert mmkernels.scan_permutation("column", 3, 4)[0].tolist()[:3] == [0, 4, 8]


# ---- crossing ----


@pytest.mark.parametrize("grid", [(4, 5), (1, 6)], ids=str)
def test_scan_then_merge_is_the_identity(grid):
    x = torch.randn(2, grid[0] * grid[1], 3, generator=generator(), dtype=torch.float64)
    ys = mmkernels.cross_scan(x, SCANS, *grid)
    assert torch.equal(ys[:, 3], x[:, mmkernels.scan_permutation(SCANS[3], *grid)[0]])
    torch.testing.assert_close(mmkernels.cross_merge(ys, SCANS, *grid, "mean"), x)
    torch.testing.assert_close(mmkernels.cross_merge(ys, SCANS, *grid), x * len(SCANS))


def test_merging_is_the_transpose_of_scanning():
    x = torch.randn(1, 12, 2, generator=generator(), dtype=torch.float64, requires_grad=True)
    ys = torch.randn(1, 4, 12, 2, generator=generator(1), dtype=torch.float64, requires_grad=True)
    (back,) = torch.autograd.grad(mmkernels.cross_scan(x, CROSS, 3, 4), x, ys.detach())
    torch.testing.assert_close(back, mmkernels.cross_merge(ys, CROSS, 3, 4).detach())
    assert torch.autograd.gradcheck(lambda t: mmkernels.cross_merge(t, CROSS, 3, 4, "mean"), (ys,))


# ---- symmetries of the scans ----


@pytest.mark.parametrize("backend", READY)
def test_a_column_scan_is_the_raster_scan_of_the_transposed_grid(backend):
    height, width = 7, 11
    args = ssd_2d_inputs(generator(), 2, (height, width), 2, 16, 1, 8, ("column", "column_rev"))

    def turned(t):
        return t.unflatten(1, (height, width)).transpose(1, 2).flatten(1, 2)

    y = mmkernels.ssd_scan_2d(**args, backend=backend)
    across = {name: turned(args[name]) for name in ("x", "dt", "B", "C")}
    other = {"scans": ("raster", "raster_rev"), "height": width, "width": height}
    expected = mmkernels.ssd_scan_2d(**{**args, **across, **other}, backend=backend)
    torch.testing.assert_close(y[:, 0], expected[:, 0].unflatten(1, (width, height)).transpose(1, 2).flatten(1, 2))
    torch.testing.assert_close(y[:, 1], expected[:, 1].unflatten(1, (width, height)).transpose(1, 2).flatten(1, 2))


@pytest.mark.parametrize("backend", READY)
@pytest.mark.parametrize("kind", ["raster", "column", "hilbert"])
def test_backwards_is_flip_scan_flip(kind, backend):
    args = ssd_2d_inputs(generator(), 1, (9, 10), 2, 8, 2, 8, (kind, f"{kind}_rev"))
    for name in ("A", "D", "dt_bias"):
        args[name] = args[name][1:].expand(2, -1)
    ahead, back = mmkernels.ssd_scan_2d(**args, backend=backend).unbind(1)
    # Turning the grid by 180 degrees reverses the order of a raster, and of the columns; a Hilbert curve has no such
    # symmetry, so its tokens are reversed along the path itself.
    order = mmkernels.scan_permutation(kind, 9, 10)[0]
    mirror = torch.empty_like(order)
    mirror[order] = order.flip(0)
    for name in ("x", "dt", "B", "C"):
        args[name] = args[name][:, mirror]
    again = mmkernels.ssd_scan_2d(**args, backend=backend)[:, 0]
    torch.testing.assert_close(back, again[:, mirror])
    assert not torch.allclose(back, ahead)


@pytest.mark.parametrize("backend", READY)
def test_one_raster_scan_is_the_plain_scan(backend):
    args = ssd_2d_inputs(generator(), 2, (9, 9), 4, 16, 2, 16, ("raster",))
    plain = {k: v[0] if k in ("A", "D", "dt_bias") else v for k, v in args.items()}
    for name in ("scans", "height", "width"):
        del plain[name]
    torch.testing.assert_close(
        mmkernels.ssd_scan_2d(**args, backend=backend)[:, 0], mmkernels.ssd_scan(**plain, backend=backend)
    )
    args = conv_2d_inputs(generator(), 2, (9, 9), 24, 4, ("raster",), activation="silu")
    torch.testing.assert_close(
        mmkernels.causal_conv1d_2d(**args, backend=backend)[:, 0],
        mmkernels.causal_conv1d(args["x"], args["weight"][0], args["bias"][0], activation="silu", backend=backend),
    )


@pytest.mark.parametrize("backend", READY)
def test_directions_do_not_see_each_other(backend):
    args = ssd_2d_inputs(generator(), 1, (5, 6), 2, 8, 1, 8, CROSS, own="x dt B C")
    y = mmkernels.ssd_scan_2d(**args, backend=backend)
    args["x"] = args["x"].clone()
    args["x"][:, 2] = torch.nan
    again = mmkernels.ssd_scan_2d(**args, backend=backend)
    assert torch.equal(again[:, [0, 1, 3]], y[:, [0, 1, 3]])
    assert again[:, 2].isnan().all()


@pytest.mark.parametrize("backend", READY)
def test_the_merge_is_that_of_separate_norms(backend):
    args = norm_inputs(generator(), 2, 4, 9, 48, group_size=16)
    apart = torch.stack(
        [
            mmkernels.gated_rms_norm(args["y"][:, k], args["weight"], z=args["z"], group_size=16, backend=backend)
            for k in range(4)
        ]
    )
    torch.testing.assert_close(mmkernels.merged_gated_rms_norm(**args, backend=backend), apart.mean(0))
    torch.testing.assert_close(mmkernels.merged_gated_rms_norm(**args, reduction="sum", backend=backend), apart.sum(0))


# ---- bad input ----


def bad_scans():
    good = ssd_2d_inputs(generator(), 2, (2, 3), 2, 4, 1, 4, CROSS)
    yield {**good, "scans": ("raster", "colum", "raster", "raster")}, ConfigError, "colum.*Did you mean 'column'"
    yield {**good, "scans": "raster"}, ConfigError, "sequence of at least one scan"
    yield {**good, "scans": ()}, ConfigError, "at least one scan"
    yield {**good, "scans": (1, 2, 3, 4)}, DtypeError, "must be a string; got 1"
    yield {**good, "scans": ("window",) * 4}, ConfigError, "window.*side"
    yield {**good, "scans": ("raster:3",) * 4}, ConfigError, "side 3"
    yield {**good, "scans": CROSS[:3]}, ShapeError, r"A must have shape \(scans=3, nheads=2\); got \(4, 2\)"
    yield {**good, "height": 3}, ShapeError, r"number of tokens, 6; got 3 \* 3 = 9"
    yield {**good, "height": -2, "width": -3}, ShapeError, "height must be an integer >= 0; got -2"
    yield {**good, "height": 2.0}, ShapeError, "height must be an integer"
    yield {**good, "dt_bias": good["dt_bias"][0]}, ShapeError, "dt_bias must have shape"
    yield {**good, "B": good["B"][:, None]}, ShapeError, "B must have shape .*scans=4"
    yield {**good, "C": good["C"].float()}, DtypeError, "C must have the dtype of x"
    yield {**good, "dt_limit": (2.0, 1.0)}, ShapeError, "dt_limit"
    yield {**good, "dt_limit": 3}, DtypeError, "dt_limit must be a pair"
    yield {**good, "chunk_size": 0}, ShapeError, "chunk_size must be at least 1"


@pytest.mark.parametrize(("args", "error", "message"), list(bad_scans()))
def test_bad_scans(args, error, message):
    with pytest.raises(error, match=message) as caught:
        mmkernels.ssd_scan_2d(**args)
    assert str(caught.value).startswith("ssd_scan_2d: ")


def test_bad_convolutions_norms_and_crossings():
    conv = conv_2d_inputs(generator(), 2, (2, 3), 4, 3, CROSS)
    with pytest.raises(ShapeError, match="causal_conv1d_2d: weight must have shape"):
        mmkernels.causal_conv1d_2d(**{**conv, "weight": conv["weight"][0]})
    with pytest.raises(ShapeError, match="at least one tap"):
        mmkernels.causal_conv1d_2d(**{**conv, "weight": conv["weight"][..., :0]})
    with pytest.raises(ConfigError, match="activation must be None or 'silu'; got 'gelu'"):
        mmkernels.causal_conv1d_2d(**{**conv, "activation": "gelu"})
    norm = norm_inputs(generator(), 2, 3, 4, 6)
    with pytest.raises(ShapeError, match="merged_gated_rms_norm: y must have shape"):
        mmkernels.merged_gated_rms_norm(**{**norm, "y": norm["y"][:, 0]})
    with pytest.raises(ShapeError, match="at least one direction"):
        mmkernels.merged_gated_rms_norm(**{**norm, "y": norm["y"][:, :0]})
    with pytest.raises(ShapeError, match="group_size must divide dim"):
        mmkernels.merged_gated_rms_norm(**{**norm, "group_size": 4})
    with pytest.raises(ConfigError, match="reduction must be 'mean' or 'sum'; got 'max'"):
        mmkernels.merged_gated_rms_norm(**norm, reduction="max")
    with pytest.raises(ConfigError, match="cross_merge: reduction"):
        mmkernels.cross_merge(norm["y"], CROSS[:3], 2, 2, "max")
    with pytest.raises(ShapeError, match="ys must have shape"):
        mmkernels.cross_merge(norm["y"], CROSS, 2, 2)
    with pytest.raises(ShapeError, match="cross_scan: height"):
        mmkernels.cross_scan(norm["z"], CROSS, 3, 2)
    with pytest.raises(ConfigError, match="only it; got 'column' with side 3"):
        mmkernels.scan_permutation("column", 2, 2, window=3)
