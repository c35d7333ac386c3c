"""Step sizes of the state-space scan, what decays add up to, their gradient; and what all its Triton kernels share.

Positions count tokens in scan order from the start of a sequence; a token is a position in memory.  A row is what has
a state of its own: an element of the batch, a packed sequence, or one direction of an element of the batch, which reads
its tokens as `order` (directions, seqlen) lists them and writes to the same places.  Chunks are cut inside rows; a span
is EVERY chunks.  The kernels here work on tiles (tokens, heads), as dt lies in memory, and write (heads, tokens), as
the others read; with an order (heads, positions): what passes between kernels is in scan order then.
All that is float64 is here: it costs a few numbers a token and head.
"""

import triton
import triton.language as tl

from mmkernels._triton import Specimen
from mmkernels._triton_math import INTERPRETED, dot, row_offset, sigmoid, softplus

# A decay nobody survives: e^-1024 is 0 in float32 and float64.  A change of id is one such step; steeper decays are cut
# here, which changes no result and keeps prefix sums small.
FORGET = tl.constexpr(-1024.0)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """x in another dtype, rounded to nearest even as a GPU does; the interpreter cuts bfloat16 off instead."""
    if INTERPRETED:
        if tl.bfloat16 == DTYPE:
            bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
            nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            x = tl.where(x == x, nearest, bits).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def bounds_of(row, cu_seqlens, seqlen):
    """(element of the batch, first token, one past the last) of a row, as 64-bit integers."""
    if cu_seqlens is not None:
        start = tl.load(cu_seqlens + row).to(tl.int64)
        end = tl.load(cu_seqlens + row + 1).to(tl.int64)
        batch = start * 0
    else:
        batch = row.to(tl.int64)
        start = batch * 0
        end = start + seqlen
    return batch, start, end


@triton.jit
def row_of(number, span_row, first_span, spans):
    """(the row that span `number` belongs to, that row's first span); the row may be one too many in a packed call."""
    if span_row is not None:
        row = tl.load(span_row + number)
        first = tl.load(first_span + row).to(tl.int64)
    else:
        row = number // spans
        first = row.to(tl.int64) * spans
    return row, first


@triton.jit
def token_of(position, known, start, end, order, REVERSE: tl.constexpr):
    """The tokens at the known positions of [start, end)."""
    if order is not None:
        token = tl.load(order + position, known, other=0)
    elif REVERSE:
        token = end - 1 - position
    else:
        token = start + position
    return token


@triton.jit
def clock_of(position, token, order):
    """Where the clocks of a row have what is at a position: at its token, or given an order in scan order."""
    if order is not None:
        at = position
    else:
        at = token
    return at


@triton.jit
def tokens_at(first, count, start, end, order, SIZE: tl.constexpr, REVERSE: tl.constexpr):
    """Of positions first ... first + count - 1: their tokens, where clocks have them, which of SIZE lanes hold one."""
    lane = tl.arange(0, SIZE)
    position = first + lane
    inside = (lane < count) & (position < end - start)
    token = token_of(position, inside, start, end, order, REVERSE)
    return token, clock_of(position, token, order), inside


@triton.jit
def without_padding(inside, ids, ids_token, token):
    """Lanes that hold a token whose id is not negative."""
    if ids is not None:
        inside = inside & (tl.load(ids + token * ids_token, inside, other=-1) >= 0)
    return inside


@triton.jit
def fading(high, low):
    """exp(min(exponent, 0)) of a difference of prefix sums, each a pair of numbers, high + low."""
    return tl.exp(tl.minimum(high + low, 0.0))


@triton.jit
def sums_before(clock, plane, first, start, end, order, entered, REVERSE: tl.constexpr):
    """The prefix sum up to position first - 1 as (high, low); zero where a span is entered."""
    earlier = first > entered
    position = tl.maximum(first - 1, 0)
    if order is not None:
        at = position
    else:
        at = token_of(position, earlier, start, end, order, REVERSE)
    high = tl.load(clock + plane + at, earlier, other=0.0)
    low = tl.load(clock + 2 * plane + at, earlier, other=0.0)
    return high, low


@triton.jit
def pass_over(
    state,
    u,
    u_token,
    v,
    v_token,
    ids,
    ids_token,
    clock,
    plane,
    entered,
    first,
    count,
    start,
    end,
    order,
    p,
    has_p,
    n,
    has_n,
    GRADIENT: tl.constexpr,
    REVERSE: tl.constexpr,
    ACC: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Move a tile (dstate, headdim) of the transposed state past some tokens, forwards, or of its gradient, backwards.

    Forwards  R' = e^{s_T} R + sum_j e^{s_T - s_j} dt_j x_j B_j^T          (u = x,  v = B)
    Backwards R  = e^{s_T} R' + sum_i e^{s_i} dY_i C_i^T                  (u = dY, v = C)
    """
    token, at, inside = tokens_at(first, count, start, end, order, SIZE, REVERSE)
    live = without_padding(inside, ids, ids_token, token)
    high = tl.load(clock + plane + at, inside, other=0.0)
    low = tl.load(clock + 2 * plane + at, inside, other=0.0)
    high_in, low_in = sums_before(clock, plane, first, start, end, order, entered, REVERSE)
    stop = tl.minimum(first + count, end - start)
    high_out, low_out = sums_before(clock, plane, stop, start, end, order, entered, REVERSE)
    if GRADIENT:
        weight = fading(high - high_in, low - low_in)
    else:
        weight = fading(high_out - high, low_out - low) * tl.load(clock + at, inside, other=0.0)
    left = tl.load(u + token[:, None] * u_token + p[None, :], live[:, None] & has_p[None, :], other=0.0).to(ACC)
    right = tl.load(v + token[:, None] * v_token + n[None, :], live[:, None] & has_n[None, :], other=0.0)
    left = rounded(left * weight[:, None], right.dtype)
    # A chunk beyond the end of its row has no tokens, and high_out = high_in or a sum before it: it must fade nothing.
    kept = tl.where(first < end - start, fading(high_out - high_in, low_out - low_in), 1.0)
    return dot(tl.trans(right), left, state * kept)


@triton.jit
def limited(step, LOW: tl.constexpr, HIGH: tl.constexpr):
    """step within [LOW, HIGH]; NaN stays NaN."""
    step = tl.where(step < LOW, LOW, step)
    return tl.where(step > HIGH, HIGH, step)


@triton.jit
def raw_steps(dt, dt_bias, at, head, valid, heads, ACC: tl.constexpr):
    """dt + dt_bias of a tile (tokens, heads)."""
    raw = tl.load(dt + at, valid, other=0.0).to(ACC)
    if dt_bias is not None:
        raw += tl.load(dt_bias + head, head < heads, other=0.0).to(ACC)[None, :]
    return raw


@triton.jit
def steps_kernel(
    dt,
    A,
    dt_bias,
    ids,
    cu_seqlens,
    order,
    span_row,
    first_span,
    clocks,
    plane,
    width,
    rows,
    seqlen,
    spans,
    span,
    heads,
    directions,
    dt_batch,
    dt_direction,
    dt_token,
    dt_head,
    ids_batch,
    ids_token,
    SOFTPLUS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    REVERSE: tl.constexpr,
    ACC: tl.constexpr,
    SPAN: tl.constexpr,
    HEADS: tl.constexpr,
):
    """clocks (3, heads, width): step sizes, and the sum of A dt since the span was entered as high and low.

    Sums are float64, kept as two numbers of the working dtype, so that their differences are exact to the rounding of
    the difference.  A change of id, and whatever is steeper, counts as a decay of e^-1024 = 0.
    Grid: (spans * blocks of heads,).
    """
    blocks = tl.cdiv(heads, HEADS)
    head = tl.program_id(0) % blocks * HEADS + tl.arange(0, HEADS)
    number = tl.program_id(0) // blocks
    row, first = row_of(number, span_row, first_span, spans)
    if row >= rows:
        return
    batch, start, end = bounds_of(row, cu_seqlens, seqlen)
    position = (number - first) * span
    if position >= end - start:
        return
    if order is not None:
        order += batch % directions * seqlen
        A += batch % directions * heads
        if dt_bias is not None:
            dt_bias += batch % directions * heads
    token, clock_at, inside = tokens_at(position, span, start, end, order, SPAN, REVERSE)
    if ids is not None:
        ids += batch * ids_batch
    live = without_padding(inside, ids, ids_token, token)
    has_head = head < heads
    wide = head.to(tl.int64)
    at = row_offset(batch, directions, dt_batch, dt_direction, order)
    at += token[:, None] * dt_token + wide[None, :] * dt_head
    step = raw_steps(dt, dt_bias, at, head, live[:, None] & has_head[None, :], heads, ACC)
    if SOFTPLUS:
        step = softplus(step)
    step = tl.where(live[:, None], limited(step, LOW, HIGH), 0.0)
    fall = tl.load(A + head, has_head, other=0.0).to(tl.float64)[None, :] * step.to(tl.float64)
    fall = tl.where(fall < FORGET, FORGET, fall)
    if ids is not None:
        lane = tl.arange(0, SPAN)
        own = tl.load(ids + token * ids_token, inside, other=0)
        follows = inside & (position + lane > 0)
        before = token_of(position + lane - 1, follows, start, end, order, REVERSE)
        met = tl.load(ids + before * ids_token, follows, other=0)
        fall = tl.where((own != met)[:, None], FORGET, fall)
    fall = tl.where(inside[:, None], fall, 0.0)
    sums = tl.cumsum(fall, 0)
    high = sums.to(ACC)
    low = (sums - high.to(tl.float64)).to(ACC)
    to = clocks + wide[None, :] * width + batch * seqlen + clock_at[:, None]
    written = inside[:, None] & has_head[None, :]
    tl.store(to, step, written)
    tl.store(to + plane, high, written)
    tl.store(to + 2 * plane, low, written)


@triton.jit
def step_gradients_kernel(
    dt,
    A,
    dt_bias,
    ids,
    cu_seqlens,
    order,
    span_row,
    first_span,
    clocks,
    shares,
    across,
    grad_dt,
    grad_A,
    grad_bias,
    plane,
    width,
    rows,
    seqlen,
    spans,
    tokens,
    heads,
    directions,
    dt_batch,
    dt_direction,
    dt_token,
    dt_head,
    ids_batch,
    ids_token,
    SOFTPLUS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    REVERSE: tl.constexpr,
    ACC: tl.constexpr,
    EVERY: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Gradients of dt, and of A and dt_bias from one chunk, out of shares (4, heads, width) = x . du, w, r, q.

      da_k = across + sum_{i >= k} r_i + sum_{j < k} q_j + w_k,   ddt_k = x_k . du_k + A da_k
    Grid: (chunks * blocks of heads,).
    """
    blocks = tl.cdiv(heads, HEADS)
    head = tl.program_id(0) % blocks * HEADS + tl.arange(0, HEADS)
    chunk = tl.program_id(0) // blocks
    number = chunk // EVERY
    row, first = row_of(number, span_row, first_span, spans)
    if row >= rows:
        return
    batch, start, end = bounds_of(row, cu_seqlens, seqlen)
    position = ((number - first) * EVERY + chunk % EVERY) * tokens
    if position >= end - start:
        return
    if order is not None:
        order += batch % directions * seqlen
        A += batch % directions * heads
        if dt_bias is not None:
            dt_bias += batch % directions * heads
    token, clock_at, inside = tokens_at(position, tokens, start, end, order, TOKENS, REVERSE)
    if ids is not None:
        ids += batch * ids_batch
    live = without_padding(inside, ids, ids_token, token)
    has_head = head < heads
    wide = head.to(tl.int64)
    valid = live[:, None] & has_head[None, :]
    at = wide[None, :] * width + batch * seqlen + clock_at[:, None]
    step = tl.load(clocks + at, valid, other=0.0).to(tl.float64)
    of_step = tl.load(shares + at, valid, other=0.0).to(tl.float64)
    of_fall = tl.load(shares + plane + at, valid, other=0.0).to(tl.float64)
    read = tl.load(shares + 2 * plane + at, valid, other=0.0).to(tl.float64)
    wrote = tl.load(shares + 3 * plane + at, valid, other=0.0).to(tl.float64)
    of_fall += tl.cumsum(read, 0, reverse=True) + (tl.cumsum(wrote, 0) - wrote)
    share_at = chunk.to(tl.int64) * heads + head
    of_fall += tl.load(across + share_at, has_head, other=0.0).to(tl.float64)[None, :]
    of_fall = tl.where(valid, of_fall, 0.0)
    rate = tl.load(A + head, has_head, other=0.0).to(tl.float64)
    grad = (of_step + rate[None, :] * of_fall).to(ACC)

    dt_at = row_offset(batch, directions, dt_batch, dt_direction, order)
    dt_at += token[:, None] * dt_token + wide[None, :] * dt_head
    raw = raw_steps(dt, dt_bias, dt_at, head, valid, heads, ACC)
    free = raw
    if SOFTPLUS:
        free = softplus(raw)
        grad = tl.where(raw > 20.0, grad, grad * sigmoid(raw))
    grad = tl.where(valid & (free >= LOW) & (free <= HIGH), grad, 0.0)
    to = grad_dt + (batch * seqlen + token)[:, None] * heads + head[None, :]
    tl.store(to, rounded(grad, grad_dt.dtype.element_ty), inside[:, None] & has_head[None, :])
    tl.store(grad_A + share_at, tl.sum(of_fall * step, 0), has_head)
    if grad_bias is not None:
        tl.store(grad_bias + share_at, tl.sum(grad.to(tl.float64), 0), has_head)


def specimens(architecture: str) -> list[Specimen]:
    """What is compiled ahead of time."""
    from mmkernels.ops.ssd import _triton_specimens

    return _triton_specimens.of(architecture, steps_kernel, step_gradients_kernel)
