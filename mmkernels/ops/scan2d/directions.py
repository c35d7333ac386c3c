"""What backends share: tensors of one direction and of all, and directions run one after the other."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.scan2d.orders import heads_and_keys

# A grid is one sequence for each direction: no states come or go, and no other sequence lies beside it.
WHOLE: dict[str, Any] = {
    "initial_states": None,
    "seq_idx": None,
    "cu_seqlens": None,
    "return_final_states": False,
}


def own(tensor: Tensor, k: int, shared_dims: int) -> Tensor:
    """What direction k has of a tensor: all of it, if it has the dimensions of one that the directions share."""
    return tensor if tensor.dim() == shared_dims else tensor[:, k]


def each(tensor: Tensor, scans: int, shared_dims: int) -> Tensor:
    """One slice for each direction; the same memory where they share it."""
    return tensor if tensor.dim() > shared_dims else tensor[:, None].expand(-1, scans, *tensor.shape[1:])


def row(parameter: Tensor | None, k: int) -> Tensor | None:
    """Direction k's row of a parameter that may be missing."""
    return None if parameter is None else parameter[k]


def by_orders(orders: Iterable[Tensor], direction: Callable[[int, Tensor], Any]) -> Tensor:
    """direction(k, order) for each order, (batch, seqlen, ...) in that order, put back: (batch, K, seqlen, ...)."""
    ys = []
    for k, order in enumerate(orders):
        y: Tensor = direction(k, order)
        ys.append(torch.zeros_like(y).index_copy(1, order, y))
    return torch.stack(ys, dim=1)


def convolve_then_scan(
    convolve: Callable[..., Tensor],
    scan: Callable[..., Tensor],
    *,
    xBC: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    activation: str | None,
    headdim: int,
    ngroups: int,
    A: Tensor,
    **rest: Any,
) -> Tensor:
    """`mmkernels.conv_ssd_scan_2d` as its two parts; `rest` is what the scan takes besides, the grid included."""
    grid = {name: rest[name] for name in ("scans", "height", "width")}
    convolved = convolve(x=xBC, weight=conv_weight, bias=conv_bias, activation=activation, **grid)
    x, B, C = heads_and_keys(convolved, A.shape[1], headdim, ngroups)
    return scan(x=x, A=A, B=B, C=C, **rest)
