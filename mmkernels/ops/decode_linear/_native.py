"""Backend "native" of decode_linear: csrc/cpu/decode_linear.cpp; here its fake kernels and its gradients."""

from typing import Any

import torch
from torch import Tensor

from mmkernels import _checks, _native
from mmkernels._gradients import wants_gradient

_native.require()
_inference = torch.ops.mmkernels.decode_linear.default
_fwd = torch.ops.mmkernels.decode_linear_fwd.default
library_op = _inference._op  # without Python's frame around it


def decode_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See mmkernels.decode_linear."""
    wide = x.dtype == torch.float64
    if (weight.dtype == torch.float64) != wide or (bias is not None and (bias.dtype == torch.float64) != wide):
        # One of them is float64, and then so is the arithmetic.
        return decode_linear(x.double(), weight.double(), None if bias is None else bias.double()).to(x.dtype)
    if wants_gradient(x, weight, bias):
        return _fwd(x, weight, bias)
    return _inference(x, weight, bias)


@torch.library.register_fake(_inference)
@torch.library.register_fake(_fwd)
def decode_linear_fake(x: Tensor, weight: Tensor, bias: Any = None) -> Tensor:
    """Shape and dtype of y, dense."""
    _checks.same_device("decode_linear", x=x, weight=weight, bias=bias)  # a direct call comes unchecked
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    # Plain products of torch, differentiable again: a gradient is wanted while training, where rows are many.
    x, weight = ctx.saved_tensors
    acc = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    grad = grad_y.to(acc)
    rows = grad.reshape(-1, grad.shape[-1])
    grad_x = (grad @ weight.to(acc)).to(x.dtype) if ctx.needs_input_grad[0] else None
    grad_weight = None
    if ctx.needs_input_grad[1]:
        grad_weight = (rows.t() @ x.to(acc).reshape(rows.shape[0], x.shape[-1])).to(weight.dtype)
    grad_bias = rows.sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
    return grad_x, grad_weight, grad_bias


torch.library.register_autograd(_fwd, _backward, setup_context=_setup)
