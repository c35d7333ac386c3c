"""Backward kernels of the state-space scan: gradients of x and z head by head, of B and C summed over heads.

The formulas are those of csrc/cpu/ssd_bwd.cpp (README.md derives them); the states and their gradients at the edges of
spans come from _triton_kernels_forward.states_kernel, walked forwards and backwards.
"""

import triton
import triton.language as tl

from mmkernels._triton import Specimen
from mmkernels._triton_math import dot, row_offset
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
def inputs_kernel(
    dy,
    x,
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
    grad_states,
    grad_x,
    grad_D,
    shares,
    across_out,
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
    dy_batch,
    dy_direction,
    dy_token,
    dy_head,
    x_batch,
    x_direction,
    x_token,
    x_head,
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
    TILES: tl.constexpr,
    STATE_TILES: tl.constexpr,
    TOKENS: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
):
    """Gradients of x in one chunk of one head, and the shares of the gradients of D and of the step sizes.

    With dR' the gradient of the state that leaves the chunk, e_ij = e^{s_i - s_j} and W_ij = e_ij dt_j (dY_i . x_j):
      dx_j = dt_j du_j + D dY_j,   du_j = e^{s_T - s_j} dR' B_j + sum_{i >= j} (C_i . B_j) e_ij dY_i
      da_k = e^{s_T} <R, dR'> + sum_{i >= k} r_i + sum_{j < k} q_j + sum_{j < k <= i} W_ij (C_i . B_j),
             r_i = dY_i . e^{s_i} R C_i,  q_j = dt_j x_j . e^{s_T - s_j} dR' B_j
    The pieces of da, and x . du, go to _triton_kernels_steps.step_gradients_kernel.
    Grid: (chunks * heads,), chunks slowest.
    """
    head = (tl.program_id(0) % heads).to(tl.int64)
    chunk = tl.program_id(0) // heads
    group = head // per_group
    number = chunk // EVERY
    row, first = row_of(number, span_row, first_span, spans)
    if row >= rows:
        return
    batch, start, end = bounds_of(row, cu_seqlens, seqlen)
    entered = (number - first) * EVERY * tokens
    part = chunk % EVERY
    here = entered + part.to(tl.int64) * tokens
    if here >= end - start:
        return

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
    lane = tl.arange(0, TOKENS)
    causal = lane[:, None] >= lane[None, :]
    x += row_offset(batch, directions, x_batch, x_direction, order) + head * x_head
    dy += row_offset(batch, directions, dy_batch, dy_direction, order) + head * dy_head
    clock = clocks + head * width + batch * seqlen
    high = tl.load(clock + plane + clock_at, inside, other=0.0)
    low = tl.load(clock + 2 * plane + clock_at, inside, other=0.0)
    step = tl.load(clock + clock_at, inside, other=0.0)
    high_in, low_in = sums_before(clock, plane, here, start, end, order, entered, REVERSE)
    stop = tl.minimum(here + tokens, end - start)
    high_out, low_out = sums_before(clock, plane, stop, start, end, order, entered, REVERSE)
    grown = fading(high - high_in, low - low_in)
    left = fading(high_out - high, low_out - low)
    decays = fading(high[:, None] - high[None, :], low[:, None] - low[None, :])
    scores = tl.zeros((TOKENS, TOKENS), ACC)
    for state_tile in range(0, STATE_TILES):
        n = state_tile * BN + tl.arange(0, BN)
        keyed = live[:, None] & (n < dstate)[None, :]
        keys = tl.load(B + token[:, None] * B_token + n[None, :], keyed, other=0.0)
        queries = tl.load(C + token[:, None] * C_token + n[None, :], keyed, other=0.0)
        scores = dot(queries, tl.trans(keys), scores)
    # decays is not 0 above the diagonal, but at most 1.
    mixing = tl.where(causal, scores, 0.0) * decays

    products = tl.zeros((TOKENS, TOKENS), ACC)  # dY_i . x_j
    of_step = tl.zeros((TOKENS,), ACC)  # x_j . du_j
    after = tl.zeros((TOKENS,), ACC)  # r
    before = tl.zeros((TOKENS,), ACC)  # q / dt
    across = tl.zeros((), ACC)  # <R, dR'>
    for tile in range(0, TILES):
        p = tile * BP + tl.arange(0, BP)
        has_p = p < headdim
        valued = live[:, None] & has_p[None, :]
        to = ((batch * seqlen + token) * heads + head)[:, None] * headdim + p[None, :]
        written = inside[:, None] & has_p[None, :]
        value = tl.load(x + token[:, None] * x_token + p[None, :], valued, other=0.0)
        narrow = tl.load(dy + token[:, None] * dy_token + p[None, :], valued, other=0.0)
        of_y = narrow.to(ACC)
        skip = tl.zeros((BP,), ACC)
        if D is not None:
            skip = tl.load(D + head * D_head + p.to(tl.int64) * D_channel, has_p, other=0.0).to(ACC)
        products = dot(narrow, tl.trans(value), products)

        read = tl.zeros((TOKENS, BP), ACC)
        of_value = tl.zeros((TOKENS, BP), ACC)
        if states is not None or grad_states is not None or EVERY > 1:
            for state_tile in range(0, STATE_TILES):
                n = state_tile * BN + tl.arange(0, BN)
                has_n = n < dstate
                keyed = live[:, None] & has_n[None, :]
                whole = has_n[:, None] & has_p[None, :]
                kept = (number.to(tl.int64) * heads + head) * headdim * dstate
                kept += p[None, :].to(tl.int64) * dstate + n[:, None]
                state = tl.zeros((BN, BP), ACC)
                if states is not None:
                    state = tl.load(states + kept, whole, other=0.0).to(ACC)
                if EVERY > 1:
                    at_token = entered
                    for _ in range(0, part):
                        state = pass_over(
                            state, x, x_token, B, B_token, ids, ids_token, clock, plane, entered, at_token,
                            tokens, start, end, order, p, has_p, n, has_n, False, REVERSE, ACC, TOKENS,
                        )  # fmt: skip
                        at_token += tokens
                if states is not None or EVERY > 1:
                    queries = tl.load(C + token[:, None] * C_token + n[None, :], keyed, other=0.0)
                    read = dot(queries, rounded(state, queries.dtype), read)
                of_state = tl.zeros((BN, BP), ACC)
                if grad_states is not None:
                    of_state = tl.load(grad_states + kept, whole, other=0.0).to(ACC)
                if EVERY > 1:
                    at_token = entered + (EVERY - 1) * tokens
                    for _ in range(part + 1, EVERY):
                        of_state = pass_over(
                            of_state, dy, dy_token, C, C_token, ids, ids_token, clock, plane, entered, at_token,
                            tokens, start, end, order, p, has_p, n, has_n, True, REVERSE, ACC, TOKENS,
                        )  # fmt: skip
                        at_token -= tokens
                if grad_states is not None or EVERY > 1:
                    keys = tl.load(B + token[:, None] * B_token + n[None, :], keyed, other=0.0)
                    of_value = dot(keys, rounded(of_state, keys.dtype), of_value)
                    across += tl.sum(tl.sum(state * of_state, 1), 0)
            read *= grown[:, None]
            after += tl.sum(read * of_y, 1)
            of_value *= left[:, None]
            before += tl.sum(of_value * value.to(ACC), 1)
        of_value = dot(tl.trans(rounded(mixing, value.dtype)), narrow, of_value)
        of_step += tl.sum(of_value * value.to(ACC), 1)
        of_x = of_value * step[:, None] + of_y * skip[None, :]
        tl.store(grad_x + to, rounded(of_x, grad_x.dtype.element_ty), written)
        if grad_D is not None:
            of_skip = tl.sum(value.to(ACC) * of_y, 0)
            tl.store(grad_D + (chunk.to(tl.int64) * heads + head) * headdim + p, of_skip, has_p)

    # w_k sums the terms that decay across token k, never differences of larger sums.
    crossing = tl.cumsum(products * mixing * step[None, :], 0, reverse=True)
    crossed = tl.sum(tl.where(lane[None, :] < lane[:, None], crossing, 0.0), 1)
    share = shares + head * width + batch * seqlen + clock_at
    tl.store(share, of_step, inside)
    tl.store(share + plane, crossed, inside)
    tl.store(share + 2 * plane, after, inside)
    tl.store(share + 3 * plane, before * step, inside)
    across *= fading(high_out - high_in, low_out - low_in)
    tl.store(across_out + chunk.to(tl.int64) * heads + head, across)


@triton.jit
def keys_kernel(
    dy,
    x,
    B,
    C,
    ids,
    cu_seqlens,
    order,
    span_row,
    first_span,
    clocks,
    states,
    grad_states,
    grad_B,
    grad_C,
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
    block_stride,
    directions,
    dy_batch,
    dy_direction,
    dy_token,
    dy_head,
    x_batch,
    x_direction,
    x_token,
    x_head,
    B_batch,
    B_direction,
    B_token,
    B_group,
    C_batch,
    C_direction,
    C_token,
    C_group,
    ids_batch,
    ids_token,
    REVERSE: tl.constexpr,
    ACC: tl.constexpr,
    EVERY: tl.constexpr,
    TILES: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
):
    """Gradients of B and C in one chunk, a tile of the state, summed over HEADS heads of a group.

      dB_j = sum over heads e^{s_T - s_j} dt_j dR'^T x_j + sum_{i >= j} W_ij C_i,   W_ij = e_ij dt_j (dY_i . x_j)
      dC_i = sum over heads e^{s_i} R^T dY_i             + sum_{j <= i} W_ij B_j
    Grid: (chunks * groups * blocks of heads * tiles of the state,), chunks slowest.
    grad_B and grad_C hold one share a block of heads.
    """
    blocks = tl.cdiv(per_group, HEADS)
    groups = heads // per_group
    across = tl.cdiv(dstate, BN)
    pid = tl.program_id(0)
    n = pid % across * BN + tl.arange(0, BN)
    pid = pid // across
    block = pid % blocks
    group = (pid // blocks % groups).to(tl.int64)
    chunk = pid // blocks // groups
    number = chunk // EVERY
    row, first = row_of(number, span_row, first_span, spans)
    if row >= rows:
        return
    batch, start, end = bounds_of(row, cu_seqlens, seqlen)
    entered = (number - first) * EVERY * tokens
    part = chunk % EVERY
    here = entered + part.to(tl.int64) * tokens
    if here >= end - start:
        return

    has_n = n < dstate
    B += row_offset(batch, directions, B_batch, B_direction, order) + group * B_group
    C += row_offset(batch, directions, C_batch, C_direction, order) + group * C_group
    x += row_offset(batch, directions, x_batch, x_direction, order)
    dy += row_offset(batch, directions, dy_batch, dy_direction, order)
    if order is not None:
        order += batch % directions * seqlen
    if ids is not None:
        ids += batch * ids_batch
    token, clock_at, inside = tokens_at(here, tokens, start, end, order, TOKENS, REVERSE)
    live = without_padding(inside, ids, ids_token, token)
    lane = tl.arange(0, TOKENS)
    causal = lane[:, None] >= lane[None, :]
    keyed = live[:, None] & has_n[None, :]
    of_scores = tl.zeros((TOKENS, TOKENS), ACC)
    of_keys = tl.zeros((TOKENS, BN), ACC)
    of_queries = tl.zeros((TOKENS, BN), ACC)

    for shared in tl.range(0, min(per_group - block * HEADS, HEADS), disable_licm=True):
        head = group * per_group + block * HEADS + shared
        xs = x + head * x_head
        dys = dy + head * dy_head
        clock = clocks + head * width + batch * seqlen
        high = tl.load(clock + plane + clock_at, inside, other=0.0)
        low = tl.load(clock + 2 * plane + clock_at, inside, other=0.0)
        step = tl.load(clock + clock_at, inside, other=0.0)
        high_in, low_in = sums_before(clock, plane, here, start, end, order, entered, REVERSE)
        stop = tl.minimum(here + tokens, end - start)
        high_out, low_out = sums_before(clock, plane, stop, start, end, order, entered, REVERSE)
        grown = fading(high - high_in, low - low_in)
        left = fading(high_out - high, low_out - low)
        decays = fading(high[:, None] - high[None, :], low[:, None] - low[None, :])
        products = tl.zeros((TOKENS, TOKENS), ACC)  # dY_i . x_j
        for tile in range(0, TILES):
            p = tile * BP + tl.arange(0, BP)
            has_p = p < headdim
            whole = has_n[:, None] & has_p[None, :]
            valued = live[:, None] & has_p[None, :]
            kept = (number.to(tl.int64) * heads + head) * headdim * dstate
            at = p[None, :].to(tl.int64) * dstate + n[:, None]
            if states is not None or EVERY > 1:
                state = tl.zeros((BN, BP), ACC)
                if states is not None:
                    state = tl.load(states + kept + at, whole, other=0.0).to(ACC)
                if EVERY > 1:
                    at_token = entered
                    for _ in range(0, part):
                        state = pass_over(
                            state, xs, x_token, B, B_token, ids, ids_token, clock, plane, entered, at_token,
                            tokens, start, end, order, p, has_p, n, has_n, False, REVERSE, ACC, TOKENS,
                        )  # fmt: skip
                        at_token += tokens
            of_y = tl.load(dys + token[:, None] * dy_token + p[None, :], valued, other=0.0)
            value = tl.load(xs + token[:, None] * x_token + p[None, :], valued, other=0.0)
            products = dot(of_y, tl.trans(value), products)
            if states is not None or EVERY > 1:
                grown_y = rounded(of_y.to(ACC) * grown[:, None], value.dtype)
                of_queries = dot(grown_y, tl.trans(rounded(state, value.dtype)), of_queries)
            if grad_states is not None or EVERY > 1:
                of_state = tl.zeros((BN, BP), ACC)
                if grad_states is not None:
                    of_state = tl.load(grad_states + kept + at, whole, other=0.0).to(ACC)
                if EVERY > 1:
                    at_token = entered + (EVERY - 1) * tokens
                    for _ in range(part + 1, EVERY):
                        of_state = pass_over(
                            of_state, dys, dy_token, C, C_token, ids, ids_token, clock, plane, entered, at_token,
                            tokens, start, end, order, p, has_p, n, has_n, True, REVERSE, ACC, TOKENS,
                        )  # fmt: skip
                        at_token -= tokens
                weighted = rounded(value.to(ACC) * (left * step)[:, None], value.dtype)
                of_keys = dot(weighted, tl.trans(rounded(of_state, value.dtype)), of_keys)
        of_scores += products * decays * step[None, :]

    keys = tl.load(B + token[:, None] * B_token + n[None, :], keyed, other=0.0)
    queries = tl.load(C + token[:, None] * C_token + n[None, :], keyed, other=0.0)
    # decays is not 0 above the diagonal, but at most 1.
    paired = rounded(tl.where(causal, of_scores, 0.0), keys.dtype)
    of_keys = dot(tl.trans(paired), queries, of_keys)
    of_queries = dot(paired, keys, of_queries)
    key_at = (
        block.to(tl.int64) * block_stride + ((batch * seqlen + token) * groups + group)[:, None] * dstate + n[None, :]
    )
    stored = inside[:, None] & has_n[None, :]
    tl.store(grad_B + key_at, rounded(of_keys, grad_B.dtype.element_ty), stored)
    tl.store(grad_C + key_at, rounded(of_queries, grad_C.dtype.element_ty), stored)


def specimens(architecture: str) -> list[Specimen]:
    """What is compiled ahead of time."""
    from mmkernels.ops.ssd import _triton_specimens

    return _triton_specimens.of(architecture, inputs_kernel, keys_kernel)
