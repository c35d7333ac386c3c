"""Fake kernels and gradients of the library ops behind gated_rms_norm, the same for native and Triton kernels."""

from typing import Any

import torch
from torch import Tensor

from mmkernels._gradients import second_order


def register(inference: Any, fwd: Any, bwd: Any) -> None:
    """Tell torch what the three ops (csrc/registration.cpp) return, and how they are differentiated, twice.

    Args:
        inference: y.
        fwd: (y, rstd).
        bwd: gradients of x, weight, z, bias; empty where there is none.
    """
    torch.library.register_fake(inference)(_fake)
    torch.library.register_fake(fwd)(_fwd_fake)
    torch.library.register_fake(bwd)(_bwd_fake)

    def _fwd_backward(ctx: Any, grad_y: Tensor | None, _grad_rstd: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_y is None:
            return (None,) * 7
        x, weight, z, bias, rstd = ctx.saved_tensors
        parameters = ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
        grad_x, grad_weight, grad_z, grad_bias = bwd(grad_y, x, weight, z, bias, rstd, *ctx.options, parameters)
        return (
            grad_x,
            grad_weight if parameters else None,
            None if z is None else grad_z,
            grad_bias if parameters and bias is not None else None,
            *(None,) * 3,
        )

    torch.library.register_autograd(fwd, _fwd_backward, setup_context=_fwd_setup)
    torch.library.register_autograd(bwd, _bwd_backward, setup_context=_bwd_setup)


def _fake(x: Tensor, weight: Tensor, z: Any, bias: Any, eps: float, group_size: int, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _fwd_fake(
    x: Tensor, weight: Tensor, z: Any, bias: Any, eps: float, group_size: int, *_: Any
) -> tuple[Tensor, Tensor]:
    """(y, rstd): rstd has one value a group, float32 (float64 for float64)."""
    statistics = x.new_empty(
        (*x.shape[:-1], x.shape[-1] // group_size), dtype=torch.promote_types(x.dtype, torch.float32)
    )
    return x.new_empty(x.shape), statistics


def _bwd_fake(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    z: Tensor | None,
    bias: Tensor | None,
    rstd: Tensor,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
    parameter_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_weight = weight.new_empty(weight.shape if parameter_gradients else (0,))
    grad_z = x.new_empty((0,) if z is None else x.shape)
    kept_bias = bias if bias is not None and parameter_gradients else None
    grad_bias = (weight if bias is None else bias).new_empty((0,) if kept_bias is None else kept_bias.shape)
    return x.new_empty(x.shape), grad_weight, grad_z, grad_bias


def _fwd_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, z, bias, *ctx.options = inputs
    ctx.save_for_backward(x, weight, z, bias, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _bwd_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    grad_y, x, weight, z, bias, _rstd, *ctx.options, _parameters = inputs
    ctx.save_for_backward(grad_y, x, weight, z, bias)
    ctx.set_materialize_grads(False)


def _bwd_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    from mmkernels.ops.gated_rms_norm import api

    grad_y, *inputs = ctx.saved_tensors
    eps, group_size, norm_before_gate = ctx.options

    def recomputed(x: Tensor, weight: Tensor, z: Tensor | None, bias: Tensor | None) -> Tensor:
        options = {"eps": eps, "group_size": group_size, "norm_before_gate": norm_before_gate}
        return api.gated_rms_norm(x, weight, z=z, bias=bias, **options, backend="torch")

    (of_grad_y,), of_inputs = second_order(recomputed, inputs, [grad_y], cotangents)
    # rstd is a function of x and z, whose gradients above already contain it; eps and the flags have none.
    return (of_grad_y, *of_inputs, *(None,) * 5)
