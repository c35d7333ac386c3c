"""Backward of the state-space scan on Triton: launches and the sums over chunks, rows and heads."""

import torch
from torch import Tensor

from mmkernels import _triton
from mmkernels.ops.ssd import _triton_kernels_backward as kernels
from mmkernels.ops.ssd import _triton_kernels_steps as kernels_steps
from mmkernels.ops.ssd._triton_call import Call, dense
from mmkernels.ops.ssd._triton_forward import clocks, scan, states


def backward(call: Call, grad_y: Tensor, grad_final: Tensor | None, initial: Tensor | None) -> tuple[Tensor, ...]:
    """Gradients of x, dt, A, B, C, D, z, dt_bias, initial_states; empty for what was not given."""
    x, plan, acc = call.x, call.plan, call.acc
    seqlen, heads, headdim, groups, dstate = call.seqlen, call.heads, call.headdim, call.groups, call.dstate
    per_group = heads // groups
    grad_y = dense(grad_y)
    clock = clocks(call)
    entering = states(call, clock, None, initial, None)
    grad_z = None
    if call.z is not None:
        through, grad_z = x.new_empty(x.shape), x.new_empty(x.shape)
        scan(call, clock, entering, grad_y, through, grad_z)
        grad_y = through
    grad_initial = None if initial is None else torch.empty_like(initial, memory_format=torch.contiguous_format)
    leaving = states(call, clock, grad_y, grad_final, grad_initial)
    config = call.sizes.keys
    blocks = -(-per_group // config.blocks["HEADS"])
    grad_x = x.new_empty(x.shape)
    grad_dt = call.dt.new_empty(call.dt.shape)
    # One block of heads writes the gradient itself, several write shares of it.
    shape = (blocks, *call.B.shape)
    of_B, of_C = (x.new_empty(shape, dtype=x.dtype if blocks == 1 else acc) for _ in range(2))
    shares = x.new_empty((4, heads, call.tokens), dtype=acc)
    across = x.new_empty((plan.chunks, heads), dtype=acc)
    grad_A, grad_bias = x.new_zeros((2, plan.chunks, heads), dtype=torch.float64)
    grad_D = None if call.D is None else x.new_zeros((plan.chunks, heads, headdim), dtype=acc)
    _triton.launch(
        kernels.inputs_kernel,
        (plan.chunks * heads,),
        call.sizes.inputs,
        grad_y,
        x,
        call.B,
        call.C,
        call.D,
        call.ids,
        call.cu_seqlens,
        call.order,
        plan.span_row,
        plan.first_span,
        clock,
        entering,
        leaving,
        grad_x,
        grad_D,
        shares,
        across,
        clock.stride(0),
        clock.stride(1),
        plan.rows,
        seqlen,
        plan.spans,
        plan.tokens,
        heads,
        per_group,
        headdim,
        dstate,
        call.directions,
        *call.strides(grad_y),
        *call.strides(x),
        *call.strides(call.B),
        *call.strides(call.C),
        *call.skip_strides,
        *call.ids_strides,
        EVERY=plan.every,
        TILES=-(-headdim // call.sizes.inputs.blocks["BP"]),
        STATE_TILES=-(-dstate // call.sizes.inputs.blocks["BN"]),
        **call.options,
    )
    _triton.launch(
        kernels.keys_kernel,
        (plan.chunks * groups * blocks * -(-dstate // config.blocks["BN"]),),
        config,
        grad_y,
        x,
        call.B,
        call.C,
        call.ids,
        call.cu_seqlens,
        call.order,
        plan.span_row,
        plan.first_span,
        clock,
        entering,
        leaving,
        of_B,
        of_C,
        clock.stride(0),
        clock.stride(1),
        plan.rows,
        seqlen,
        plan.spans,
        plan.tokens,
        heads,
        per_group,
        headdim,
        dstate,
        of_B.stride(0),
        call.directions,
        *call.strides(grad_y),
        *call.strides(x),
        *call.strides(call.B),
        *call.strides(call.C),
        *call.ids_strides,
        EVERY=plan.every,
        TILES=-(-headdim // config.blocks["BP"]),
        **call.options,
    )
    config = call.sizes.step_gradients
    _triton.launch(
        kernels_steps.step_gradients_kernel,
        (plan.chunks * -(-heads // config.blocks["HEADS"]),),
        config,
        call.dt,
        call.A,
        call.dt_bias,
        call.ids,
        call.cu_seqlens,
        call.order,
        plan.span_row,
        plan.first_span,
        clock,
        shares,
        across,
        grad_dt,
        grad_A,
        None if call.dt_bias is None else grad_bias,
        clock.stride(0),
        clock.stride(1),
        plan.rows,
        seqlen,
        plan.spans,
        plan.tokens,
        heads,
        call.directions,
        *call.strides(call.dt),
        *call.ids_strides,
        EVERY=plan.every,
        **call.step_options,
        **call.options,
    )
    of_D = None
    if grad_D is not None:
        of_D = _over_chunks(call, grad_D)
        of_D = of_D if call.D is None or call.D.dim() == of_D.dim() else of_D.sum(-1)
    return (
        grad_x,
        grad_dt,
        _typed(_over_chunks(call, grad_A), call.A, x.device),
        of_B[0] if blocks == 1 else of_B.sum(0).to(x.dtype),
        of_C[0] if blocks == 1 else of_C.sum(0).to(x.dtype),
        _typed(of_D, call.D, x.device),
        x.new_empty((0,)) if grad_z is None else grad_z,
        _typed(_over_chunks(call, grad_bias), call.dt_bias, x.device),
        x.new_empty((0,)) if grad_initial is None else grad_initial,
    )


def _over_chunks(call: Call, shares: Tensor) -> Tensor:
    """Add (chunks, ...) up, in float64 and a fixed order; with directions, what each of them has for itself."""
    if call.order is None:
        return shares.sum(0, dtype=torch.float64)
    own = call.plan.spans * call.plan.every
    return shares.view(call.x.shape[0], call.directions, own, *shares.shape[1:]).sum((0, 2), dtype=torch.float64)


def _typed(grad: Tensor | None, given: Tensor | None, device: torch.device) -> Tensor:
    return torch.empty(0, device=device) if grad is None or given is None else grad.to(given.dtype)
