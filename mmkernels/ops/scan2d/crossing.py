"""`cross_scan` and `cross_merge`: a grid laid out as several sequences, and several sequences put back on their grid.

For code that runs a sequence model of its own between the two.  The ops of this folder read through the orders instead
and never make these copies.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmkernels._checks import Sizes
from mmkernels.errors import ConfigError
from mmkernels.ops.scan2d.orders import order_of, parse_scans

REDUCTIONS = ("mean", "sum")


def cross_scan(x: Tensor, scans: Sequence[str], height: int, width: int) -> Tensor:
    r"""Copy a grid of tokens once per scan, in the order of that scan.

    $$y_{k}[t] = x[\pi_k(t)]$$

    Args:
        x: (batch, height * width, ...), raster order, any dtype.
        scans: K kinds of `scan_permutation`.
        height: rows of the grid.
        width: columns of the grid.

    Returns:
        (batch, K, height * width, ...).

    Raises:
        ConfigError: an unknown scan.
        ShapeError: the grid has another number of cells than there are tokens.

    Numerics: values are copied.
    Cost: one read and K writes of x.

    Example:
        >>> import torch, mmkernels
        >>> mmkernels.cross_scan(torch.arange(4)[None], ("raster", "column"), 2, 2)
        tensor([[[0, 1, 2, 3],
                 [0, 2, 1, 3]]])

    Source: VMamba, arXiv 2401.10166, section 4.3 (Cross-Scan).
    """
    Sizes("cross_scan").bind("x", x, _layout(x, "batch tokens"))
    parsed = parse_scans("cross_scan", scans, height, width, x.shape[1])
    return torch.stack([x.index_select(1, order_of(scan, height, width, x.device)) for scan in parsed], dim=1)


def cross_merge(ys: Tensor, scans: Sequence[str], height: int, width: int, reduction: str = "sum") -> Tensor:
    r"""Put K sequences back in raster order and add them up: the transpose of `cross_scan`.

    $$x[r] = c \sum_{k} y_k[\pi_k^{-1}(r)], \qquad c = 1 \text{ (sum)}, \; 1 / K \text{ (mean)}$$

    Args:
        ys: (batch, K, height * width, ...) floating, each in the order of its scan.
        scans: K kinds of `scan_permutation`.
        height: rows of the grid.
        width: columns of the grid.
        reduction: "sum" or "mean".

    Returns:
        (batch, height * width, ...) in the dtype of ys.

    Raises:
        ConfigError: an unknown scan or reduction.
        ShapeError: the grid has another number of cells than there are tokens, or ys another K than scans.

    Numerics: added in float32 (float64 for float64), first scan to last: deterministic.
    Cost: one read of ys, K float32 sums of x's size.

    Example:
        >>> import torch, mmkernels
        >>> ys = mmkernels.cross_scan(torch.eye(4)[None], ("raster", "column"), 2, 2)
        >>> torch.equal(mmkernels.cross_merge(ys, ("raster", "column"), 2, 2, "mean")[0], torch.eye(4))
        True

    Source: VMamba, arXiv 2401.10166, section 4.3 (Cross-Merge).
    """
    sizes = Sizes("cross_merge")
    sizes.set(scans=len(scans))
    sizes.bind("ys", ys, _layout(ys, "batch scans tokens"), "It has one sequence for each scan.")
    parsed = parse_scans("cross_merge", scans, height, width, ys.shape[2])
    check_reduction("cross_merge", reduction)
    work = torch.promote_types(ys.dtype, torch.float32)
    total = ys.new_zeros((ys.shape[0], *ys.shape[2:]), dtype=work)
    for k, scan in enumerate(parsed):
        total = total.index_add(1, order_of(scan, height, width, ys.device), ys[:, k].to(work))
    return (total / len(parsed) if reduction == "mean" else total).to(ys.dtype)


def check_reduction(function: str, reduction: str) -> None:
    """It is "mean" or "sum"."""
    if reduction not in REDUCTIONS:
        raise ConfigError(f"{function}: reduction must be 'mean' or 'sum'; got {reduction!r}. Choose one of the two.")


def _layout(x: Tensor, names: str) -> str:
    rest = x.dim() - len(names.split()) if isinstance(x, Tensor) else 0
    return " ".join([names, *(f"axis{i}" for i in range(rest))])
