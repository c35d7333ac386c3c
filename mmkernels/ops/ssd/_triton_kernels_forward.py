"""Forward kernels of the state-space scan: the states that enter the spans, then every chunk's outputs.

Dao and Gu, "Transformers are SSMs" (2024), section 6, in two passes: README.md says which bytes move.
"""

import triton
import triton.language as tl

from mmkernels._triton import Specimen
from mmkernels._triton_math import dot, row_offset, silu, silu_derivative
from mmkernels.ops.ssd._triton_kernels_steps import (
    bounds_of,
    fading,
    pass_over,
    rounded,
    row_of,
    sums_before,
    tokens_at,
    without_padding,
)


@triton.jit
def states_kernel(
    u,
    v,
    ids,
    cu_seqlens,
    order,
    first_span,
    clocks,
    edge_in,
    states,
    edge_out,
    plane,
    width,
    seqlen,
    spans,
    span,
    heads,
    per_group,
    headdim,
    dstate,
    directions,
    u_batch,
    u_direction,
    u_token,
    u_head,
    v_batch,
    v_direction,
    v_token,
    v_group,
    ids_batch,
    ids_token,
    GRADIENT: tl.constexpr,
    REVERSE: tl.constexpr,
    ACC: tl.constexpr,
    SPAN: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
):
    """Walk the spans of one row with a tile of one head's state in registers; store it where each span is entered.

    GRADIENT walks backwards with the gradient of the state, and stores it where each span is left.
    Grid: (rows * heads * tiles of a state,).
    """
    across, down = tl.cdiv(dstate, BN), tl.cdiv(headdim, BP)
    pid = tl.program_id(0)
    n = pid % across * BN + tl.arange(0, BN)
    pid = pid // across
    p = pid % down * BP + tl.arange(0, BP)
    pid = pid // down
    head = (pid % heads).to(tl.int64)
    row = pid // heads
    has_p, has_n = p < headdim, n < dstate
    whole = has_n[:, None] & has_p[None, :]
    at = p[None, :].to(tl.int64) * dstate + n[:, None]

    batch, start, end = bounds_of(row, cu_seqlens, seqlen)
    group = head // per_group
    u += row_offset(batch, directions, u_batch, u_direction, order) + head * u_head
    v += row_offset(batch, directions, v_batch, v_direction, order) + group * v_group
    if order is not None:
        order += batch % directions * seqlen
    clock = clocks + head * width + batch * seqlen
    if ids is not None:
        ids += batch * ids_batch
    if cu_seqlens is not None:
        first = tl.load(first_span + row).to(tl.int64)
    else:
        first = row.to(tl.int64) * spans
    count = tl.cdiv(end - start, span).to(tl.int32)

    edge = (row.to(tl.int64) * heads + head) * headdim * dstate
    if edge_in is not None:
        state = tl.load(edge_in + edge + at, whole, other=0.0).to(ACC)
    else:
        state = tl.zeros((BN, BP), ACC)
    for walked in range(0, count):
        if GRADIENT:
            number = first + count - 1 - walked
        else:
            number = first + walked
        kept = states + (number * heads + head) * headdim * dstate
        tl.store(kept + at, rounded(state, states.dtype.element_ty), whole)
        state = pass_over(
            state,
            u,
            u_token,
            v,
            v_token,
            ids,
            ids_token,
            clock,
            plane,
            (number - first) * span,
            (number - first) * span,
            span,
            start,
            end,
            order,
            p,
            has_p,
            n,
            has_n,
            GRADIENT,
            REVERSE,
            ACC,
            SPAN,
        )
    if edge_out is not None:
        tl.store(edge_out + edge + at, rounded(state, edge_out.dtype.element_ty), whole)


@triton.jit
def scan_kernel(
    x,
    z,
    dy,
    B,
    C,
    D,
    ids,
    cu_seqlens,
    order,
    span_row,
    first_span,
    clocks,
    states,
    y,
    of_gate,
    plane,
    width,
    rows,
    seqlen,
    spans,
    tokens,
    heads,
    per_group,
    headdim,
    dstate,
    directions,
    x_batch,
    x_direction,
    x_token,
    x_head,
    z_batch,
    z_token,
    z_head,
    dy_batch,
    dy_token,
    dy_head,
    B_batch,
    B_direction,
    B_token,
    B_group,
    C_batch,
    C_direction,
    C_token,
    C_group,
    D_direction,
    D_head,
    D_channel,
    ids_batch,
    ids_token,
    REVERSE: tl.constexpr,
    ACC: tl.constexpr,
    EVERY: tl.constexpr,
    STATE_TILES: tl.constexpr,
    TOKENS: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
):
    """Outputs of one chunk of one head, a tile of channels; or, given dy, the gradients that pass through the gate.

      v_i = e^{s_i} R C_i + sum_{j <= i} (C_i . B_j) e^{s_i - s_j} dt_j x_j + D x_i
      y = v silu(z)    or    of_gate = dy v silu'(z) and y = dy silu(z), the gradients of z and of v
    Directions of a grid have no gate: it is applied when they are merged.
    Grid: (chunks * heads * tiles of channels,), chunks slowest.
    """
    tiles = tl.cdiv(headdim, BP)
    pid = tl.program_id(0)
    tile = pid % tiles
    head = (pid // tiles % heads).to(tl.int64)
    chunk = pid // tiles // heads
    group = head // per_group
    number = chunk // EVERY
    row, first = row_of(number, span_row, first_span, spans)
    if row >= rows:
        return
    batch, start, end = bounds_of(row, cu_seqlens, seqlen)
    entered = (number - first) * EVERY * tokens
    here = entered + (chunk % EVERY).to(tl.int64) * tokens
    if here >= end - start:
        return

    p = tile * BP + tl.arange(0, BP)
    has_p = p < headdim
    x += row_offset(batch, directions, x_batch, x_direction, order) + head * x_head
    B += row_offset(batch, directions, B_batch, B_direction, order) + group * B_group
    C += row_offset(batch, directions, C_batch, C_direction, order) + group * C_group
    if order is not None:
        order += batch % directions * seqlen
        if D is not None:
            D += batch % directions * D_direction
    if ids is not None:
        ids += batch * ids_batch
    token, clock_at, inside = tokens_at(here, tokens, start, end, order, TOKENS, REVERSE)
    live = without_padding(inside, ids, ids_token, token)
    valued = live[:, None] & has_p[None, :]
    clock = clocks + head * width + batch * seqlen
    kept = (number.to(tl.int64) * heads + head) * headdim * dstate

    scores = tl.zeros((TOKENS, TOKENS), ACC)
    out = tl.zeros((TOKENS, BP), ACC)
    for state_tile in range(0, STATE_TILES):
        n = state_tile * BN + tl.arange(0, BN)
        has_n = n < dstate
        keyed = live[:, None] & has_n[None, :]
        keys = tl.load(B + token[:, None] * B_token + n[None, :], keyed, other=0.0)
        queries = tl.load(C + token[:, None] * C_token + n[None, :], keyed, other=0.0)
        scores = dot(queries, tl.trans(keys), scores)
        if states is not None or EVERY > 1:
            whole = has_n[:, None] & has_p[None, :]
            state = tl.zeros((BN, BP), ACC)
            if states is not None:
                at = kept + p[None, :].to(tl.int64) * dstate + n[:, None]
                state = tl.load(states + at, whole, other=0.0).to(ACC)
            if EVERY > 1:
                at_token = entered
                for _ in range(0, chunk % EVERY):
                    state = pass_over(
                        state, x, x_token, B, B_token, ids, ids_token, clock, plane, entered, at_token,
                        tokens, start, end, order, p, has_p, n, has_n, False, REVERSE, ACC, TOKENS,
                    )  # fmt: skip
                    at_token += tokens
            out = dot(queries, rounded(state, queries.dtype), out)

    high = tl.load(clock + plane + clock_at, inside, other=0.0)
    low = tl.load(clock + 2 * plane + clock_at, inside, other=0.0)
    step = tl.load(clock + clock_at, inside, other=0.0)
    high_in, low_in = sums_before(clock, plane, here, start, end, order, entered, REVERSE)
    out *= fading(high - high_in, low - low_in)[:, None]
    lane = tl.arange(0, TOKENS)
    # The exponent is clamped: above the diagonal decays is not 0, but at most 1.
    decays = fading(high[:, None] - high[None, :], low[:, None] - low[None, :])
    weights = tl.where(lane[:, None] >= lane[None, :], scores, 0.0) * decays * step[None, :]
    value = tl.load(x + token[:, None] * x_token + p[None, :], valued, other=0.0)
    out = dot(rounded(weights, value.dtype), value, out)
    if D is not None:
        skip = tl.load(D + head * D_head + p.to(tl.int64) * D_channel, has_p, other=0.0).to(ACC)
        out += skip[None, :] * value.to(ACC)
    to = ((batch * seqlen + token) * heads + head)[:, None] * headdim + p[None, :]
    written = inside[:, None] & has_p[None, :]
    if z is not None:
        gates = z + batch * z_batch + head * z_head
        gate = tl.load(gates + token[:, None] * z_token + p[None, :], valued, other=0.0).to(ACC)
        if dy is not None:
            dys = dy + batch * dy_batch + head * dy_head
            of_y = tl.load(dys + token[:, None] * dy_token + p[None, :], valued, other=0.0).to(ACC)
            tl.store(of_gate + to, rounded(of_y * out * silu_derivative(gate), of_gate.dtype.element_ty), written)
            out = of_y * silu(gate)
        else:
            out *= silu(gate)
    tl.store(y + to, rounded(out, y.dtype.element_ty), written)


def specimens(architecture: str) -> list[Specimen]:
    """What is compiled ahead of time."""
    from mmkernels.ops.ssd import _triton_specimens

    return _triton_specimens.of(architecture, states_kernel, scan_kernel)
