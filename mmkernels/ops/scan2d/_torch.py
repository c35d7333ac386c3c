"""Backend "torch": each direction by the torch backend of the one-dimensional op.

Walking backwards is that op's `reverse`, so a row-wise or backward direction reads its inputs as they lie.  A path of
another kind is gathered once for all directions that share the input and the path.
"""

import torch
from torch import Tensor

from mmkernels.ops.causal_conv1d import _torch as conv_torch
from mmkernels.ops.gated_rms_norm import _torch as norm_torch
from mmkernels.ops.scan2d.orders import Scan, heads_and_keys, order_of
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
        shared = tensor.dim() == shared_dims
        own = tensor if shared else tensor[:, k]
        if path not in self.orders:
            return own
        if not shared:
            return own.index_select(1, self.orders[path])
        if (name, path) not in self._read:
            self._read[name, path] = own.index_select(1, self.orders[path])
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
            D=None if D is None else D[k],
            z=None,
            dt_bias=None if dt_bias is None else dt_bias[k],
            dt_softplus=dt_softplus,
            dt_limit=dt_limit,
            initial_states=None,
            seq_idx=None,
            cu_seqlens=None,
            chunk_size=chunk_size,
            reverse=scan.reverse,
            return_final_states=False,
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
            bias=None if bias is None else bias[k],
            activation=activation,
            initial_states=None,
            seq_idx=None,
            cu_seqlens=None,
            reverse=scan.reverse,
            return_final_states=False,
        )
        assert isinstance(y, Tensor)  # no final states were asked for
        ys.append(paths.back(y, k))
    return torch.stack(ys, dim=1)


def conv_ssd_scan_2d(
    *,
    xBC: Tensor,
    dt: Tensor,
    conv_weight: Tensor,
    A: Tensor,
    headdim: int,
    ngroups: int,
    conv_bias: Tensor | None,
    activation: str | None,
    D: Tensor | None,
    dt_bias: Tensor | None,
    scans: tuple[Scan, ...],
    height: int,
    width: int,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    chunk_size: int | None,
) -> Tensor:
    """`mmkernels.conv_ssd_scan_2d`: one part after the other."""
    convolved = causal_conv1d_2d(
        x=xBC,
        weight=conv_weight,
        bias=conv_bias,
        scans=scans,
        height=height,
        width=width,
        activation=activation,
    )
    x, B, C = heads_and_keys(convolved, A.shape[1], headdim, ngroups)
    return ssd_scan_2d(
        x=x,
        dt=dt,
        A=A,
        B=B,
        C=C,
        D=D,
        dt_bias=dt_bias,
        scans=scans,
        height=height,
        width=width,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
        chunk_size=chunk_size,
    )


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
    ys = []
    for k, order in enumerate(orders.unbind(0)):
        y = ssd_torch.ssd_scan(
            x=x[:, k].index_select(1, order),
            dt=dt[:, k].index_select(1, order),
            A=A[k],
            B=B[:, k].index_select(1, order),
            C=C[:, k].index_select(1, order),
            D=None if D is None else D[k],
            z=None,
            dt_bias=None if dt_bias is None else dt_bias[k],
            dt_softplus=dt_softplus,
            dt_limit=dt_limit,
            initial_states=None,
            seq_idx=None,
            cu_seqlens=None,
            chunk_size=chunk_size,
            reverse=False,
            return_final_states=False,
        )
        assert isinstance(y, Tensor)  # no final states were asked for
        ys.append(torch.zeros_like(y).index_copy(1, order, y))
    return torch.stack(ys, dim=1)


def convolve_by_orders(x: Tensor, weight: Tensor, bias: Tensor | None, *, orders: Tensor, silu: bool) -> Tensor:
    """`causal_conv1d_2d` of x (batch, K, seqlen, dim) along any permutations: what native gradients differentiate."""
    ys = []
    for k, order in enumerate(orders.unbind(0)):
        y = conv_torch.causal_conv1d(
            x=x[:, k].index_select(1, order),
            weight=weight[k],
            bias=None if bias is None else bias[k],
            activation="silu" if silu else None,
            initial_states=None,
            seq_idx=None,
            cu_seqlens=None,
            reverse=False,
            return_final_states=False,
        )
        assert isinstance(y, Tensor)  # no final states were asked for
        ys.append(torch.zeros_like(y).index_copy(1, order, y))
    return torch.stack(ys, dim=1)
