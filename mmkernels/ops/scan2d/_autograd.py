"""Fake kernels and gradients of the library ops of this folder (csrc/registration.cpp), twice differentiable.

Tensors are (batch, K, seqlen, ...) here: what directions share has been expanded, and its gradients are added outside.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmkernels._gradients import second_order


def _work(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _like(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _register(
    fwd: Any, bwd: Any, differentiable: int, tensors: int, recomputed: Callable[..., Callable[..., Tensor]]
) -> None:
    """Gradients of fwd(*tensors, *options), whose backward bwd(grad, *tensors, *options) reads its inputs alone.

    Args:
        fwd: returns one tensor.
        bwd: returns one gradient for each of the first `differentiable` tensors, empty where there was none.
        differentiable: leading tensors that have gradients.
        tensors: leading arguments that are tensors.
        recomputed: of the other tensors and the options: the op, in differentiable operations.
    """

    def fwd_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:tensors])
        ctx.options = inputs[tensors:]
        ctx.set_materialize_grads(False)

    def fwd_backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, options = ctx.saved_tensors, ctx.options
        rest = (None,) * (tensors - differentiable + len(options))
        if grad is None:
            return (None,) * differentiable + rest
        grads = bwd(grad, *saved, *options)
        return (*(None if t is None else g for g, t in zip(grads, saved[:differentiable], strict=True)), *rest)

    def bwd_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[: tensors + 1])
        ctx.options = inputs[tensors + 1 :]
        ctx.set_materialize_grads(False)

    def bwd_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        grad, *saved = ctx.saved_tensors
        function = recomputed(*saved[differentiable:], *ctx.options)
        (of_grad,), of_inputs = second_order(function, saved[:differentiable], [grad], cotangents)
        return (of_grad, *of_inputs, *(None,) * (tensors - differentiable + len(ctx.options)))

    torch.library.register_autograd(fwd, fwd_backward, setup_context=fwd_setup)
    torch.library.register_autograd(bwd, bwd_backward, setup_context=bwd_setup)


def register_scan(inference: Any, fwd: Any, bwd: Any) -> None:
    """Teach torch the ops behind ssd_scan_2d: tensors x, dt, A, B, C, D, dt_bias, orders."""
    torch.library.register_fake(inference)(_like)
    torch.library.register_fake(fwd)(_like)

    def bwd_fake(grad_y: Tensor, *args: Any) -> tuple[Tensor, ...]:
        tensors, work = args[:7], _work(args[0])
        return tuple(
            args[0].new_empty((0,) if t is None else t.shape, dtype=work if t is None else t.dtype) for t in tensors
        )

    def recomputed(orders: Tensor, softplus: bool, low: float, high: float, chunk_size: int) -> Callable[..., Tensor]:
        from mmkernels.ops.scan2d import _torch

        def function(*tensors: Tensor | None) -> Tensor:
            return _torch.scan_by_orders(
                *tensors,  # type: ignore[arg-type]
                orders=orders,
                dt_softplus=softplus,
                dt_limit=(low, high),
                chunk_size=chunk_size or None,
            )

        return function

    torch.library.register_fake(bwd)(bwd_fake)
    _register(fwd, bwd, 7, 8, recomputed)


def register_fused(op: Any) -> None:
    """Teach torch the op behind conv_ssd_scan_2d for inference, which has no gradients."""

    def fake(xBC: Tensor, dt: Tensor, weight: Tensor, bias: Any, A: Tensor, *rest: Any) -> Tensor:
        headdim = rest[3]  # after D, dt_bias and orders
        return xBC.new_empty((*xBC.shape[:3], A.shape[1], headdim))

    torch.library.register_fake(op)(fake)


def register_convolution(inference: Any, fwd: Any, bwd: Any) -> None:
    """Teach torch the ops behind causal_conv1d_2d: tensors x, weight, bias, orders."""
    torch.library.register_fake(inference)(_like)
    torch.library.register_fake(fwd)(_like)

    def bwd_fake(grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *_: Any) -> tuple[Tensor, ...]:
        kept = weight.new_empty((0,)) if bias is None else bias.new_empty(bias.shape)
        return x.new_empty(x.shape), weight.new_empty(weight.shape), kept

    def recomputed(orders: Tensor, silu: bool) -> Callable[..., Tensor]:
        from mmkernels.ops.scan2d import _torch

        def function(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return _torch.convolve_by_orders(x, weight, bias, orders=orders, silu=silu)

        return function

    torch.library.register_fake(bwd)(bwd_fake)
    _register(fwd, bwd, 3, 4, recomputed)


def register_merge(inference: Any, fwd: Any, bwd: Any) -> None:
    """Teach torch the ops behind merged_gated_rms_norm: tensors y, weight, z; `fwd` also returns 1 / rms."""

    def fake(y: Tensor, *_: Any) -> Tensor:
        return y.new_empty((y.shape[0], *y.shape[2:]))

    def fwd_fake(y: Tensor, weight: Tensor, z: Any, eps: float, group_size: int, mean: bool) -> tuple[Tensor, Tensor]:
        return fake(y), y.new_empty((*y.shape[:-1], y.shape[-1] // group_size), dtype=_work(y))

    def bwd_fake(grad_out: Tensor, y: Tensor, weight: Tensor, z: Tensor | None, *_: Any) -> tuple[Tensor, ...]:
        of_z = y.new_empty((0,)) if z is None else z.new_empty(z.shape)
        return y.new_empty(y.shape), weight.new_empty(weight.shape), of_z

    def fwd_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        y, weight, z, *ctx.options = inputs
        ctx.save_for_backward(y, weight, z, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    def fwd_backward(ctx: Any, grad_out: Tensor | None, _rstd: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_out is None:
            return (None,) * 6
        y, weight, z, rstd = ctx.saved_tensors
        grad_y, grad_weight, grad_z = bwd(grad_out, y, weight, z, rstd, *ctx.options)
        return grad_y, grad_weight, None if z is None else grad_z, None, None, None

    def bwd_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        grad_out, y, weight, z, _rstd, *ctx.options = inputs
        ctx.save_for_backward(grad_out, y, weight, z)
        ctx.set_materialize_grads(False)

    def bwd_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        from mmkernels.ops.scan2d import _torch

        grad_out, *inputs = ctx.saved_tensors
        eps, group_size, mean = ctx.options

        def function(y: Tensor, weight: Tensor, z: Tensor | None) -> Tensor:
            reduction = "mean" if mean else "sum"
            return _torch.merged_gated_rms_norm(
                y=y, weight=weight, z=z, eps=eps, group_size=group_size, reduction=reduction
            )

        (of_grad,), of_inputs = second_order(function, inputs, [grad_out], cotangents)
        # 1 / rms is a function of y and z, whose gradients above already contain it
        return (of_grad, *of_inputs, None, None, None, None)

    torch.library.register_fake(inference)(fake)
    torch.library.register_fake(fwd)(fwd_fake)
    torch.library.register_fake(bwd)(bwd_fake)
    torch.library.register_autograd(fwd, fwd_backward, setup_context=fwd_setup)
    torch.library.register_autograd(bwd, bwd_backward, setup_context=bwd_setup)
