"""Backend "torch": each direction by the torch backend of the one-dimensional op.

Walking backwards is that op's `reverse`, so a row-wise or backward direction reads its inputs as they lie.  A path of
another kind is gathered once for all directions that share the input and the path.
"""

from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.causal_conv1d import _torch as conv_torch
from mmkernels.ops.gated_rms_norm import _torch as norm_torch
from mmkernels.ops.scan2d.directions import WHOLE, by_orders, convolve_then_scan, own, row
from mmkernels.ops.scan2d.orders import Scan, order_of
from mmkernels.ops.ssd import _torch as ssd_torch


class Paths:
    """Inputs in the order of a path, outputs back in raster order."""

    def __init__(self, scans: tuple[Scan, ...], height: int, width: int, device: torch.device):
        ssd_torch.pin_sizes(height, width)  # a path is part of the program; so seqlen needs no algebra while compiling
        self.scans = scans
        forward = {scan._replace(reverse=False) for scan in scans if scan.kind != "raster"}
        self.orders = {path: order_of(path, height, width, device) for path in sorted(forward)}
        self._read: dict[tuple[str, Scan], Tensor] = {}

    def read(self, name: str, tensor: Tensor, k: int, shared_dims: int) -> Tensor:
        """What direction k reads of a tensor: the tensor itself where it lies in raster order."""
        path = self.scans[k]._replace(reverse=False)
        mine = own(tensor, k, shared_dims)
        if path not in self.orders:
            return mine
        if mine is not tensor:
            return mine.index_select(1, self.orders[path])
        if (name, path) not in self._read:
            self._read[name, path] = mine.index_select(1, self.orders[path])
        return self._read[name, path]

    def back(self, y: Tensor, k: int) -> Tensor:
        """What direction k made, in raster order."""
        path = self.scans[k]._replace(reverse=False)
        return y if path not in self.orders else torch.zeros_like(y).index_copy(1, self.orders[path], y)


def ssd_scan_2d(
    *,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    scans: tuple[Scan, ...],
    height: int,
    width: int,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    chunk_size: int | None,
) -> Tensor:
    """`mmkernels.ssd_scan_2d` on validated arguments."""
    paths = Paths(scans, height, width, x.device)
    ssd_torch.pin_sizes(dt.shape[-2])
    ys = []
    for k, scan in enumerate(scans):
        y = ssd_torch.ssd_scan(
            x=paths.read("x", x, k, 4),
            dt=paths.read("dt", dt, k, 3),
            A=A[k],
            B=paths.read("B", B, k, 4),
            C=paths.read("C", C, k, 4),
            D=row(D, k),
            z=None,
            dt_bias=row(dt_bias, k),
            dt_softplus=dt_softplus,
            dt_limit=dt_limit,
            chunk_size=chunk_size,
            reverse=scan.reverse,
            **WHOLE,
        )
        assert isinstance(y, Tensor)  # no final states were asked for
        ys.append(paths.back(y, k))
    return torch.stack(ys, dim=1)


def causal_conv1d_2d(
    *,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scans: tuple[Scan, ...],
    height: int,
    width: int,
    activation: str | None,
) -> Tensor:
    """`mmkernels.causal_conv1d_2d` on validated arguments."""
    paths = Paths(scans, height, width, x.device)
    ys = []
    for k, scan in enumerate(scans):
        y = conv_torch.causal_conv1d(
            x=paths.read("x", x, k, 3),
            weight=weight[k],
            bias=row(bias, k),
            activation=activation,
            reverse=scan.reverse,
            **WHOLE,
        )
        assert isinstance(y, Tensor)  # no final states were asked for
        ys.append(paths.back(y, k))
    return torch.stack(ys, dim=1)


def conv_ssd_scan_2d(**args: Any) -> Tensor:
    """`mmkernels.conv_ssd_scan_2d`: one part after the other."""
    return convolve_then_scan(causal_conv1d_2d, ssd_scan_2d, **args)


def merged_gated_rms_norm(
    *, y: Tensor, weight: Tensor, z: Tensor | None, eps: float, group_size: int, reduction: str
) -> Tensor:
    """`mmkernels.merged_gated_rms_norm` on validated arguments."""
    work = torch.promote_types(y.dtype, torch.float32)
    normed = norm_torch.gated_rms_norm(
        x=y.to(work),
        weight=weight,
        z=None if z is None else z[:, None],
        bias=None,
        eps=eps,
        group_size=group_size,
        norm_before_gate=False,
    )
    return (normed.mean(1) if reduction == "mean" else normed.sum(1)).to(y.dtype)


def scan_by_orders(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    *,
    orders: Tensor,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    chunk_size: int | None,
) -> Tensor:
    """`ssd_scan_2d` of tensors (batch, K, seqlen, ...) along any permutations: what native gradients differentiate."""

    def direction(k: int, order: Tensor) -> Any:
        return ssd_torch.ssd_scan(
            x=x[:, k].index_select(1, order),
            dt=dt[:, k].index_select(1, order),
            A=A[k],
            B=B[:, k].index_select(1, order),
            C=C[:, k].index_select(1, order),
            D=row(D, k),
            z=None,
            dt_bias=row(dt_bias, k),
            dt_softplus=dt_softplus,
            dt_limit=dt_limit,
            chunk_size=chunk_size,
            reverse=False,
            **WHOLE,
        )

    return by_orders(orders.unbind(0), direction)


def convolve_by_orders(x: Tensor, weight: Tensor, bias: Tensor | None, *, orders: Tensor, silu: bool) -> Tensor:
    """`causal_conv1d_2d` of x (batch, K, seqlen, dim) along any permutations: what native gradients differentiate."""
    activation = "silu" if silu else None

    def direction(k: int, order: Tensor) -> Any:
        read = x[:, k].index_select(1, order)
        return conv_torch.causal_conv1d(
            x=read, weight=weight[k], bias=row(bias, k), activation=activation, reverse=False, **WHOLE
        )

    return by_orders(orders.unbind(0), direction)
