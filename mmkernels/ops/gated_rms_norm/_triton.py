"""Backend "triton" of gated_rms_norm: allocation and launches; the kernels are in _triton_kernels.py."""

import torch
from torch import Tensor

from mmkernels import _triton
from mmkernels._gradients import wants_gradient
from mmkernels.ops.gated_rms_norm import _autograd

_triton.require()
from mmkernels import _triton_math  # noqa: E402  (needs triton, which is known to be there only now)
from mmkernels.ops.gated_rms_norm import _triton_kernels as kernels  # noqa: E402

_STRIPS = 512  # shares of the weight's gradient: some programs for every processor of the largest GPUs


def gated_rms_norm(
    x: Tensor,
    weight: Tensor,
    z: Tensor | None,
    bias: Tensor | None,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
) -> Tensor:
    """See mmkernels.gated_rms_norm."""
    if wants_gradient(x, weight, z, bias):
        return _fwd(x, weight, z, bias, eps, group_size, norm_before_gate)[0]
    return _inference(x, weight, z, bias, eps, group_size, norm_before_gate)


def _forward(
    x: Tensor, weight: Tensor, z: Tensor | None, bias: Tensor | None, eps: float, group_size: int, norm_first: bool
) -> tuple[Tensor, Tensor]:
    acc = _triton.accumulator(x.dtype)
    groups = x.shape[-1] // group_size
    y, rstd = (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty((*x.shape[:-1], groups), dtype=acc),
    )
    rows, gate = _rows(x), None if z is None else _rows(z)
    config, whole = kernels.forward_config(group_size)
    lines = rows.shape[0] * groups
    _triton.launch(
        kernels.forward_kernel,
        (-(-lines // config.blocks["LINES"]),),
        config,
        rows,
        gate,
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        y,
        rstd,
        lines,
        groups,
        group_size,
        *rows.stride(),
        *((0, 0) if gate is None else gate.stride()),
        group_size if weight.shape[0] == x.shape[-1] else 0,
        EPS=eps,
        NORM_FIRST=norm_first,
        ACC=_triton_math.dtype(acc),
        WHOLE=whole,
    )
    return y, rstd


def _forward_only(
    x: Tensor, weight: Tensor, z: Tensor | None, bias: Tensor | None, eps: float, group_size: int, norm_first: bool
) -> Tensor:
    return _forward(x, weight, z, bias, eps, group_size, norm_first)[0]


def _backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    z: Tensor | None,
    bias: Tensor | None,
    rstd: Tensor,
    eps: float,
    group_size: int,
    norm_first: bool,
    parameters: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, gate, grads = _rows(x), None if z is None else _rows(z), _rows(grad_y)
    count, dim = rows.shape
    groups = dim // group_size
    config, whole = kernels.backward_config(group_size, bias is not None)
    tiles = -(-count // config.blocks["ROWS"])
    steps = max(1, -(-tiles * groups // _STRIPS)) if whole else 1
    strips = -(-tiles // steps)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_z = x.new_empty((0,)) if z is None else torch.empty_like(grad_x)
    of_weight = x.new_empty((strips, groups, group_size), dtype=rstd.dtype) if parameters else None
    of_bias = torch.empty_like(of_weight) if of_weight is not None and bias is not None else None
    _triton.launch(
        kernels.backward_kernel,
        (strips * groups,),
        config,
        grads,
        rows,
        gate,
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        rstd,
        grad_x,
        None if z is None else grad_z,
        of_weight,
        of_bias,
        count,
        groups,
        group_size,
        steps,
        *grads.stride(),
        *rows.stride(),
        *((0, 0) if gate is None else gate.stride()),
        group_size if weight.shape[0] == dim else 0,
        NORM_FIRST=norm_first,
        ACC=_triton_math.dtype(rstd.dtype),
        WHOLE=whole,
    )
    grad_weight = _triton_math.column_sums(of_weight, weight)
    return grad_x, grad_weight, grad_z, _triton_math.column_sums(of_bias, weight if bias is None else bias)


def _rows(x: Tensor) -> Tensor:
    # (rows, dim): a view wherever the leading axes are evenly spaced, as every slice of a projection is.
    return x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty((0, x.shape[-1]))


_SCHEMA = "Tensor x, Tensor weight, Tensor? z, Tensor? bias"
_OPTIONS = "float eps, int group_size, bool norm_before_gate"
_inference = _triton.define("gated_rms_norm", f"({_SCHEMA}, {_OPTIONS}) -> Tensor", _forward_only)
_fwd = _triton.define("gated_rms_norm_fwd", f"({_SCHEMA}, {_OPTIONS}) -> (Tensor, Tensor)", _forward)
_bwd = _triton.define(
    "gated_rms_norm_bwd",
    f"(Tensor grad_y, {_SCHEMA}, Tensor rstd, {_OPTIONS}, bool parameter_gradients)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
)
_autograd.register(_inference, _fwd, _bwd)
