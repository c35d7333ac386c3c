"""Orders in which a grid of tokens is scanned: permutations of its raster indices, computed once a grid.

Step t of a scan reads cell pi(t) = row * width + column.  Any kind with "_rev" appended is walked backwards.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from mmkernels.errors import ConfigError, DtypeError, ShapeError, nearest

KINDS = ("raster", "column", "snake_row", "snake_col", "diagonal", "anti_diagonal", "hilbert", "window")


class Scan(NamedTuple):
    """One direction: the path, the side of its windows if it has any, and whether it is walked backwards."""

    kind: str
    window: int
    reverse: bool

    def __str__(self) -> str:
        return self.kind + (f":{self.window}" if self.kind == "window" else "") + ("_rev" if self.reverse else "")


def parse_scan(function: str, scan: str, window: int | None = None) -> Scan:
    """Read "column_rev" or "window:7"; `window` is another way to give the side of windows."""
    if not isinstance(scan, str):
        raise DtypeError(f"{function}: a scan must be a string; got {scan!r}. One of {', '.join(KINDS)}, or kind_rev.")
    name, reverse = scan.removesuffix("_rev"), scan.endswith("_rev")
    kind, _, given = name.partition(":")
    if kind not in KINDS or (given and not given.isdigit()):
        raise ConfigError(
            f"{function}: scan must be one of {', '.join(KINDS)}, each also with _rev; got {scan!r}. "
            f"{nearest(kind, KINDS)}"
        )
    side = int(given) if given else (window or 0)
    if (kind == "window") != (side > 0):
        raise ConfigError(
            f"{function}: scan 'window' must have a side, and only it; got {scan!r} with side {side}. "
            'Write "window:7", or give scan_permutation window=7.'
        )
    return Scan(kind, side, reverse)


def parse_scans(function: str, scans: Sequence[str], height: int, width: int, length: int) -> tuple[Scan, ...]:
    """The directions of a call, after checking that the grid has as many cells as there are tokens."""
    if isinstance(scans, str) or len(scans) == 0:
        raise ConfigError(
            f"{function}: scans must be a sequence of at least one scan; got {scans!r}. "
            'Both ways along the rows are ("raster", "raster_rev").'
        )
    check_grid(function, height, width)
    if height * width != length:
        raise ShapeError(
            f"{function}: height * width must be the number of tokens, {length}; got {height} * {width} = "
            f"{height * width}. Tokens are the cells of the grid row by row, without class tokens."
        )
    return tuple(parse_scan(function, scan) for scan in scans)


def check_grid(function: str, height: int, width: int) -> None:
    """Height and width are integers >= 0."""
    for name, size in (("height", height), ("width", width)):
        if isinstance(size, bool) or not isinstance(size, (int, torch.SymInt)) or size < 0:
            raise ShapeError(f"{function}: {name} must be an integer >= 0; got {size!r}. It counts cells of the grid.")


def scan_permutation(
    kind: str,
    height: int,
    width: int,
    *,
    window: int | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""The order in which a scan visits the cells of a grid, and its inverse.

    $$x_{\text{scanned}}[t] = x[\pi(t)], \qquad y[r] = y_{\text{scanned}}[\pi^{-1}(r)], \qquad r = i \cdot width + j$$

    | kind | path |
    |---|---|
    | `raster` | rows, each left to right |
    | `column` | columns, each top to bottom |
    | `snake_row`, `snake_col` | the same, every second one backwards: neighbours stay neighbours |
    | `diagonal` | by i + j, then i |
    | `anti_diagonal` | by i - j, then i |
    | `hilbert` | the generalised Hilbert curve of any rectangle |
    | `window` | rows inside windows of side `window`, windows row by row (those at the border may be smaller) |

    Each kind with `_rev` appended is walked backwards.

    Args:
        kind: one of the table.
        height: rows of the grid, >= 0.
        width: columns of the grid, >= 0.
        window: side of the windows; "window:7" says the same.
        device: of the result.

    Returns:
        indices: (height * width,) int64, pi.
        inverse: (height * width,) int64, its inverse.

    Raises:
        ConfigError: an unknown kind, or `window` given where there is none or the other way round.
        ShapeError: height or width is no integer >= 0.

    Numerics: integers.
    Cost: O(height width) Python steps for a grid's first call, then one copy.

    Example:
        >>> import mmkernels
        >>> mmkernels.scan_permutation("column", 2, 3)[0]
        tensor([0, 3, 1, 4, 2, 5])

    Source: Vim (arXiv 2401.09417), VMamba (2401.10166), LocalMamba (2403.09338) for windows; the Hilbert curve of a
        rectangle after Cerveny's gilbert.
    """
    check_grid("scan_permutation", height, width)
    order = order_of(parse_scan("scan_permutation", kind, window), height, width, device or "cpu").clone()
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    return order, inverse


def order_of(scan: Scan, height: int, width: int, device: torch.device | str) -> Tensor:
    """The permutation pi as an int64 tensor."""
    if torch.compiler.is_compiling():  # the length of a range is a plain int, where a size may be a symbol
        height, width = len(range(height)), len(range(width))
    return torch.tensor(_cells(scan.kind, scan.window, scan.reverse, height, width), dtype=torch.int64, device=device)


_known_orders: dict[tuple[tuple[Scan, ...], int, int, str], Tensor] = {}


def orders_of(scans: tuple[Scan, ...], height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """The permutations of several scans as one (K, seqlen) int64 tensor, remembered; do not write to it."""
    if torch.compiler.is_compiling():
        return torch.stack([order_of(scan, height, width, device) for scan in scans])
    key = (scans, height, width, str(device))
    if key not in _known_orders:
        if len(_known_orders) >= 256:
            _known_orders.clear()
        with torch.inference_mode(False):  # so that autograd may save it later
            made = torch.stack([order_of(scan, height, width, device) for scan in scans])
        if type(made) is not Tensor:  # a fake one, made while somebody traces without torch.compile
            return made
        _known_orders[key] = made
    return _known_orders[key]


def _cells(kind: str, window: int, reverse: bool, height: int, width: int) -> list[int]:
    return _remembered_cells(kind, window, reverse, height, width)


# A compiler need not trace the path, only know it.  What torch.compiler.assume_constant_result sets; calling it would
# import the whole compiler.
_cells._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=256)
def _remembered_cells(kind: str, window: int, reverse: bool, height: int, width: int) -> list[int]:
    path = _PATHS[kind](height, width, window)
    return path[::-1] if reverse else path


def _raster(height: int, width: int, _: int) -> list[int]:
    return list(range(height * width))


def _column(height: int, width: int, _: int) -> list[int]:
    return [i * width + j for j in range(width) for i in range(height)]


def _snake_row(height: int, width: int, _: int) -> list[int]:
    return [i * width + (width - 1 - j if i % 2 else j) for i in range(height) for j in range(width)]


def _snake_col(height: int, width: int, _: int) -> list[int]:
    return [(height - 1 - i if j % 2 else i) * width + j for j in range(width) for i in range(height)]


def _diagonal(height: int, width: int, _: int) -> list[int]:
    return sorted(range(height * width), key=lambda cell: (cell // width + cell % width, cell // width))


def _anti_diagonal(height: int, width: int, _: int) -> list[int]:
    return sorted(range(height * width), key=lambda cell: (cell // width - cell % width, cell // width))


def _window(height: int, width: int, side: int) -> list[int]:
    def place(cell: int) -> tuple[int, int, int]:
        i, j = divmod(cell, width)
        return i // side, j // side, cell  # inside a window raster order is the order of the cells themselves

    return sorted(range(height * width), key=place)


def _hilbert(height: int, width: int, _: int) -> list[int]:
    path: list[complex] = []

    def walk(corner: complex, length: int, step: complex, breadth: int, side: complex) -> None:
        """Cover length x breadth cells from `corner`, and end at the other end of the edge along `step`."""
        if breadth == 1 or length == 1:
            ahead = step if breadth == 1 else side
            path.extend(corner + n * ahead for n in range(length * breadth))
        elif 2 * length > 3 * breadth:  # long: two parts, one after the other, the first of even length
            half = _even(length)
            walk(corner, half, step, breadth, side)
            walk(corner + half * step, length - half, step, breadth, side)
        else:  # up the near half, along the far edge, and down again
            up, near = _even(breadth), length // 2
            walk(corner, up, side, near, step)
            walk(corner + up * side, length, step, breadth - up, side)
            walk(corner + (length - 1) * step + (up - 1) * side, up, -side, length - near, -step)

    if height * width > 0:
        walk(0j, width, 1, height, 1j) if width >= height else walk(0j, height, 1j, width, 1)
    return [int(cell.imag) * width + int(cell.real) for cell in path]


def _even(size: int) -> int:
    half = size // 2
    return half + 1 if half % 2 and size > 2 else half


_PATHS = {
    "raster": _raster,
    "column": _column,
    "snake_row": _snake_row,
    "snake_col": _snake_col,
    "diagonal": _diagonal,
    "anti_diagonal": _anti_diagonal,
    "hilbert": _hilbert,
    "window": _window,
}


def heads_and_keys(xBC: Tensor, nheads: int, headdim: int, ngroups: int) -> tuple[Tensor, Tensor, Tensor]:
    """The channels [x | B | C] as heads and groups."""
    inner = nheads * headdim
    keys = (xBC.shape[-1] - inner) // 2
    x, B, C = xBC.split([inner, keys, keys], dim=-1)
    groups = (ngroups, keys // ngroups)
    return x.unflatten(-1, (nheads, headdim)), B.unflatten(-1, groups), C.unflatten(-1, groups)
