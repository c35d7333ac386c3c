"""Forward of the state-space scan on Triton: launches."""

import torch
from torch import Tensor

from mmkernels import _triton
from mmkernels.ops.ssd import _triton_kernels_forward as kernels
from mmkernels.ops.ssd import _triton_kernels_steps as kernels_steps
from mmkernels.ops.ssd._triton_call import Call


def states(
    call: Call, clock: Tensor, gradient: Tensor | None, edge: Tensor | None, edge_out: Tensor | None
) -> Tensor | None:
    """Walk the spans; the states that enter them, or with a gradient of y the gradients of those that leave them."""
    plan = call.plan
    if edge_out is None and edge is None and (plan.spans <= 1):
        return None
    x, heads, headdim, dstate = call.x, call.heads, call.headdim, call.dstate
    kept = x.new_empty((plan.total, heads, headdim, dstate))
    config = call.sizes.states
    u, v = (x, call.B) if gradient is None else (gradient, call.C)
    tiles = -(-headdim // config.blocks["BP"]) * -(-dstate // config.blocks["BN"])
    _triton.launch(
        kernels.states_kernel,
        (plan.rows * heads * tiles,),
        config,
        u,
        v,
        call.ids,
        call.cu_seqlens,
        call.order,
        plan.first_span,
        clock,
        edge,
        kept,
        edge_out,
        clock.stride(0),
        clock.stride(1),
        call.seqlen,
        plan.spans,
        plan.span,
        heads,
        heads // call.groups,
        headdim,
        dstate,
        call.directions,
        *call.strides(u),
        *call.strides(v),
        *call.ids_strides,
        GRADIENT=gradient is not None,
        **call.options,
    )
    return kept


def clocks(call: Call) -> Tensor:
    """(3, heads, tokens): step sizes, and sums of A dt since the start of the span as two numbers, in scan order."""
    plan, config, heads = call.plan, call.sizes.steps, call.heads
    made = call.x.new_empty((3, heads, call.tokens), dtype=call.acc)
    _triton.launch(
        kernels_steps.steps_kernel,
        (plan.total * -(-heads // config.blocks["HEADS"]),),
        config,
        call.dt,
        call.A,
        call.dt_bias,
        call.ids,
        call.cu_seqlens,
        call.order,
        plan.span_row,
        plan.first_span,
        made,
        made.stride(0),
        made.stride(1),
        plan.rows,
        call.seqlen,
        plan.spans,
        plan.span,
        heads,
        call.directions,
        *call.strides(call.dt),
        *call.ids_strides,
        **call.step_options,
        **call.options,
    )
    return made


def forward(call: Call, initial: Tensor | None, final: Tensor | None) -> Tensor:
    """y; the last states are written to `final` if given."""
    clock = clocks(call)
    y = torch.empty_like(call.x, memory_format=torch.contiguous_format)
    scan(call, clock, states(call, clock, None, initial, final), None, y, None)
    return y


def scan(
    call: Call, clock: Tensor, kept: Tensor | None, grad_y: Tensor | None, y: Tensor, grad_z: Tensor | None
) -> None:
    """Write y; or with a gradient of y those of z and, to y, of what the gate multiplies."""
    x, plan, config = call.x, call.plan, call.sizes.scan
    heads, headdim, dstate = call.heads, call.headdim, call.dstate
    tiles = -(-headdim // config.blocks["BP"])
    _triton.launch(
        kernels.scan_kernel,
        (plan.chunks * heads * tiles,),
        config,
        x,
        call.z,
        grad_y,
        call.B,
        call.C,
        call.D,
        call.ids,
        call.cu_seqlens,
        call.order,
        plan.span_row,
        plan.first_span,
        clock,
        kept,
        y,
        grad_z,
        clock.stride(0),
        clock.stride(1),
        plan.rows,
        call.seqlen,
        plan.spans,
        plan.tokens,
        heads,
        heads // call.groups,
        headdim,
        dstate,
        call.directions,
        *call.strides(x),
        *call.z_strides,
        *((0, 0, 0) if grad_y is None else grad_y.stride()[:3]),
        *call.strides(call.B),
        *call.strides(call.C),
        *call.skip_strides,
        *call.ids_strides,
        EVERY=plan.every,
        STATE_TILES=-(-dstate // config.blocks["BN"]),
        **call.options,
    )
