"""Triton kernels of causal_conv1d, forward and backward; those that touch states are in _triton_kernels_state.py.

Everything is said in scan order: from the first token to the last, or with REVERSE from the last to the first.  A token
knows how many tokens of its own run lie before and after it, as far as a filter reaches; that decides every mask.
Given `order` (directions, seqlen), every row of the batch is read in several directions, each with filters of its own:
tokens are then counted along a direction, and only an address asks where in memory they lie.
"""

import triton
import triton.language as tl

from mmkernels import _triton
from mmkernels._triton import Config, Specimen
from mmkernels._triton_math import row_offset, silu, silu_derivative

# Above this many taps the backward reads gradients of the sums from memory instead of computing each sum `width` times
# from the first-level cache: width^2 cached loads against 8 bytes of memory an element.
WIDEST_RECOMPUTED = 4


@triton.jit
def sequence_bounds(token, known, cu_seqlens, seqlen, sequences, steps):
    """Sequence of every token, its first token, and the one after its last.  `steps` halvings find it in cu_seqlens."""
    if cu_seqlens is None:
        row = token * 0
        return row, row, row + seqlen
    else:
        row = token * 0
        high = row + sequences
        for _ in range(steps):
            middle = (row + high) // 2
            searching = known & (row < high)
            after = searching & (tl.load(cu_seqlens + middle + 1, searching, other=0).to(tl.int32) <= token)
            row = tl.where(after, middle + 1, row)
            high = tl.where(searching & (after == 0), middle, high)
        known = known & (row < sequences)
        begin = tl.load(cu_seqlens + row, known, other=0).to(tl.int32)
        stop = tl.load(cu_seqlens + row + 1, known, other=0).to(tl.int32)
        # Offsets are not checked on a GPU; wrong ones must not lead out of x.
        return row, tl.maximum(begin, 0), tl.minimum(stop, seqlen)


@triton.jit
def place(token, known, begin, stop, ids, ids_token, REVERSE: tl.constexpr, HISTORY: tl.constexpr):
    """Where a token stands: (position in its sequence, tokens that follow there, tokens of its run before and after it,
    each up to HISTORY, whether its run continues the initial state, whether it is a token and no padding).
    """
    position, remaining = token - begin, stop - 1 - token
    if REVERSE:
        position, remaining = remaining, position
    back, ahead = tl.minimum(position, HISTORY), tl.minimum(remaining, HISTORY)
    leading, real = known, known
    if ids is not None:
        own = tl.load(ids + token.to(tl.int64) * ids_token, known, other=-1)
        real = known & (own >= 0)
        back, ahead = token * 0, token * 0
        same_back, same_ahead = real, real
        for s in tl.static_range(1, HISTORY + 1):
            earlier, later = token - s, token + s
            if REVERSE:
                earlier, later = later, earlier
            same_back = same_back & (position >= s)
            same_back = same_back & (tl.load(ids + earlier.to(tl.int64) * ids_token, same_back, other=-1) == own)
            same_ahead = same_ahead & (remaining >= s)
            same_ahead = same_ahead & (tl.load(ids + later.to(tl.int64) * ids_token, same_ahead, other=-1) == own)
            back += same_back.to(tl.int32)
            ahead += same_ahead.to(tl.int32)
        leading = real & (own == 0) & (back == position)
    return position, remaining, back, ahead, leading, real


@triton.jit
def in_memory(token, known, order):
    """Where the known tokens lie: as they are counted, or as the order of a direction lists them."""
    if order is not None:
        at = tl.load(order + token, known, other=0)
    else:
        at = token.to(tl.int64)
    return at


@triton.jit
def inputs_at(
    x,
    x_token,
    x_channel,
    order,
    initial,
    i_channel,
    i_tap,
    token,
    channel,
    inside,
    position,
    back,
    ahead,
    leading,
    real,
    OFFSET: tl.constexpr,
    REVERSE: tl.constexpr,
    HISTORY: tl.constexpr,
    ACC: tl.constexpr,
):
    """The raw inputs OFFSET tokens after each token, (TOKENS, CHANNELS), where its run or initial state has them.

    `x`, `initial` and `order` point to the row; `initial` is a column of pointers when every sequence has its own.
    """
    source = token + OFFSET
    if REVERSE:
        source = token - OFFSET
    has = real & (back + OFFSET >= 0) & (ahead >= OFFSET)
    at = in_memory(source, has, order)[:, None] * x_token + channel[None, :] * x_channel
    found = tl.load(x + at, has[:, None] & inside[None, :], other=0.0).to(ACC)
    if initial is not None:
        if OFFSET < 0:
            entry = position + (HISTORY + OFFSET)
            old = real & leading & (position + OFFSET < 0) & (entry >= 0)
            at = channel[None, :] * i_channel + entry.to(tl.int64)[:, None] * i_tap
            found += tl.load(initial + at, old[:, None] & inside[None, :], other=0.0).to(ACC)
    return found


@triton.jit
def sums_at(
    x,
    x_token,
    x_channel,
    order,
    weight,
    w_channel,
    w_tap,
    bias,
    initial,
    i_channel,
    i_tap,
    token,
    channel,
    inside,
    position,
    back,
    ahead,
    leading,
    real,
    OFFSET: tl.constexpr,
    REVERSE: tl.constexpr,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Bias plus the weighted inputs (before the activation) of the tokens OFFSET after each token, if of its run."""
    total = tl.zeros((TOKENS, CHANNELS), ACC)
    if bias is not None:
        total += tl.load(bias + channel, inside, other=0.0).to(ACC)[None, :]
    for s in tl.static_range(WIDTH):
        taps = inputs_at(
            x, x_token, x_channel, order, initial, i_channel, i_tap, token, channel, inside,
            position, back, ahead, leading, real, OFFSET - s, REVERSE, WIDTH - 1, ACC,
        )  # fmt: skip
        w = tl.load(weight + channel * w_channel + (WIDTH - 1 - s) * w_tap, inside, other=0.0).to(ACC)
        total += taps * w[None, :]
    return total


@triton.jit(do_not_specialize=["seqlen", "sequences", "steps"])
def forward_kernel(
    x,
    weight,
    bias,
    initial,
    ids,
    cu_seqlens,
    order,
    grad_y,
    y,
    seqlen,
    dim,
    sequences,
    steps,
    directions,
    x_row,
    x_direction,
    x_token,
    x_channel,
    w_direction,
    w_channel,
    w_tap,
    i_row,
    i_channel,
    i_tap,
    ids_row,
    ids_token,
    g_row,
    g_direction,
    g_token,
    g_channel,
    SILU: tl.constexpr,
    REVERSE: tl.constexpr,
    ACC: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """y; or, given grad_y, the gradient of what goes into silu.

    Grid: (batch [* directions] * cdiv(seqlen, TOKENS) * cdiv(dim, CHANNELS),), channels innermost.  A program owns
    TOKENS tokens of CHANNELS channels.  Bytes: x (and grad_y) read once from memory, `width` times from the first-level
    cache; y written once.
    """
    blocks, slices = tl.cdiv(seqlen, TOKENS), tl.cdiv(dim, CHANNELS)
    program = tl.program_id(0)
    block, channel = program // slices, (program % slices) * CHANNELS + tl.arange(0, CHANNELS).to(tl.int64)
    inside = channel < dim
    batch = (block // blocks).to(tl.int64)
    token = (block % blocks) * TOKENS + tl.arange(0, TOKENS)
    known = token < seqlen
    if ids is not None:
        ids += batch * ids_row
    if order is not None:
        order += batch % directions * seqlen
        weight += batch % directions * w_direction
        if bias is not None:
            bias += batch % directions * dim
    row, begin, stop = sequence_bounds(token, known, cu_seqlens, seqlen, sequences, steps)
    position, _, back, ahead, leading, real = place(token, known, begin, stop, ids, ids_token, REVERSE, WIDTH - 1)
    if initial is not None:
        initial += (batch + row.to(tl.int64))[:, None] * i_row
    total = sums_at(
        x + row_offset(batch, directions, x_row, x_direction, order), x_token, x_channel, order,
        weight, w_channel, w_tap, bias, initial, i_channel, i_tap,
        token, channel, inside, position, back, ahead, leading, real,
        0, REVERSE, WIDTH, ACC, TOKENS, CHANNELS,
    )  # fmt: skip
    here = known[:, None] & inside[None, :]
    lies = in_memory(token, known, order)[:, None]
    if grad_y is not None:
        at = row_offset(batch, directions, g_row, g_direction, order) + lies * g_token + channel[None, :] * g_channel
        total = tl.load(grad_y + at, here, other=0.0).to(ACC) * silu_derivative(total)
    else:
        if SILU:
            total = silu(total)
    at = (batch * seqlen + lies) * dim + channel[None, :]
    tl.store(y + at, tl.where(real[:, None], total, 0.0).to(y.dtype.element_ty), here)


@triton.jit(do_not_specialize=["seqlen", "sequences", "steps", "tiles", "strips"])
def backward_kernel(
    grad,
    grad_final,
    x,
    weight,
    bias,
    initial,
    ids,
    cu_seqlens,
    order,
    grad_x,
    partial_weight,
    partial_bias,
    seqlen,
    dim,
    sequences,
    steps,
    tiles,
    strips,
    directions,
    x_row,
    x_direction,
    x_token,
    x_channel,
    w_direction,
    w_channel,
    w_tap,
    i_row,
    i_channel,
    i_tap,
    ids_row,
    ids_token,
    g_row,
    g_direction,
    g_token,
    g_channel,
    f_row,
    f_channel,
    f_tap,
    SILU: tl.constexpr,
    REVERSE: tl.constexpr,
    ACC: tl.constexpr,
    WIDTH: tl.constexpr,
    TAPS: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """grad_x, and every program's share of the gradients of weight and bias.

    `grad` is the gradient of y, through silu if SILU (its argument is computed again), else of the sums themselves.
    Grid: (strips [* directions] * cdiv(dim, CHANNELS),), channels innermost.  A program owns every strips-th tile of
    TOKENS tokens of its channels (and direction), and alone its row of the partial sums (strips, [directions,] dim,
    width), (strips, [directions,] dim).  Each direction has a gradient of x of its own.
    Bytes: grad and x read once from memory, from the first-level cache width (SILU: width^2) times; grad_x written.
    """
    blocks, slices = tl.cdiv(seqlen, TOKENS), tl.cdiv(dim, CHANNELS)
    share = tl.program_id(0) // slices
    strip = share
    direction = share * 0
    if order is not None:
        strip = share // directions
        direction = share % directions
        order += direction.to(tl.int64) * seqlen
        weight += direction.to(tl.int64) * w_direction
        if bias is not None:
            bias += direction.to(tl.int64) * dim
    channel = (tl.program_id(0) % slices) * CHANNELS + tl.arange(0, CHANNELS).to(tl.int64)
    inside = channel < dim
    tap = tl.arange(0, TAPS)
    of_weight = tl.zeros((TAPS, CHANNELS), ACC)
    of_bias = tl.zeros((CHANNELS,), ACC)
    for tile in range(strip, tiles, strips):
        batch = (tile // blocks).to(tl.int64)
        if order is not None:
            batch = batch * directions + direction
        token = (tile % blocks) * TOKENS + tl.arange(0, TOKENS)
        known = token < seqlen
        row_ids = ids
        if ids is not None:
            row_ids = ids + batch * ids_row
        row, begin, stop = sequence_bounds(token, known, cu_seqlens, seqlen, sequences, steps)
        position, remaining, back, ahead, leading, real = place(
            token, known, begin, stop, row_ids, ids_token, REVERSE, WIDTH - 1
        )
        row_initial = initial
        if initial is not None:
            row_initial = initial + (batch + row.to(tl.int64))[:, None] * i_row
        row_x = x + row_offset(batch, directions, x_row, x_direction, order)
        row_grad = grad + row_offset(batch, directions, g_row, g_direction, order)
        total = tl.zeros((TOKENS, CHANNELS), ACC)
        for o in tl.static_range(WIDTH):
            user = token + o
            if REVERSE:
                user = token - o
            used = real & (o <= ahead)
            at = in_memory(user, used, order)[:, None] * g_token + channel[None, :] * g_channel
            g = tl.load(row_grad + at, used[:, None] & inside[None, :], other=0.0).to(ACC)
            if SILU:
                g *= silu_derivative(
                    sums_at(
                        row_x, x_token, x_channel, order,
                        weight, w_channel, w_tap, bias, row_initial, i_channel, i_tap,
                        token, channel, inside, position, back, ahead, leading, real,
                        o, REVERSE, WIDTH, ACC, TOKENS, CHANNELS,
                    )
                )  # fmt: skip
            w = tl.load(weight + channel * w_channel + (WIDTH - 1 - o) * w_tap, inside, other=0.0).to(ACC)
            total += g * w[None, :]
            if o == 0:
                if partial_weight is not None:
                    for s in tl.static_range(WIDTH):
                        taps = inputs_at(
                            row_x, x_token, x_channel, order, row_initial, i_channel, i_tap, token, channel, inside,
                            position, back, ahead, leading, real, -s, REVERSE, WIDTH - 1, ACC,
                        )  # fmt: skip
                        of_weight += tl.where(tap[:, None] == WIDTH - 1 - s, tl.sum(g * taps, 0)[None, :], 0.0)
                if partial_bias is not None:
                    of_bias += tl.sum(g, 0)
        if grad_final is not None:
            kept = real & (remaining < WIDTH - 1) & (ahead == remaining)
            at = channel[None, :] * f_channel + (WIDTH - 2 - remaining).to(tl.int64)[:, None] * f_tap
            at += (batch + row.to(tl.int64))[:, None] * f_row
            total += tl.load(grad_final + at, kept[:, None] & inside[None, :], other=0.0).to(ACC)
        at = (batch * seqlen + in_memory(token, known, order))[:, None] * dim + channel[None, :]
        tl.store(grad_x + at, total.to(grad_x.dtype.element_ty), known[:, None] & inside[None, :])
    if partial_weight is not None:
        at = (share.to(tl.int64) * dim + channel)[None, :] * WIDTH + tap[:, None]
        tl.store(partial_weight + at, of_weight, (tap < WIDTH)[:, None] & inside[None, :])
    if partial_bias is not None:
        tl.store(partial_bias + share.to(tl.int64) * dim + channel, of_bias, inside)


def config(architecture: str, seqlen: int, dim: int, tight: bool = False) -> Config:
    """Tiles of up to 16 tokens by 64 channels (128 bytes of bf16): 8 elements a thread, for each of 4 taps.

    `tight` is the backward with an order, whose addresses need registers: half of that.
    """
    if architecture == _triton.INTERPRETER:  # tiny tiles for tiny cases, so that those cross tiles too
        return Config({"TOKENS": 8 if seqlen < 16 else 64, "CHANNELS": _triton.bucket(dim, 1, 64)})
    return Config({"TOKENS": _triton.bucket(seqlen, 8, 8 if tight else 16), "CHANNELS": _triton.bucket(dim, 32, 64)})


def specimens(architecture: str) -> list[Specimen]:
    """What is compiled ahead of time: Mamba-2, mmMamba with states, packed sequences, a wide filter, a grid's scans."""
    found = []
    for label, pointer, width, extras in (
        ("Mamba-2 bf16", "*bf16", 4, ()),
        ("mmMamba fp32 states", "*fp32", 2, ("initial", "grad_final")),
        ("ids bf16 states", "*bf16", 4, ("ids", "initial", "grad_final")),
        ("packed bf16 states", "*bf16", 4, ("cu_seqlens", "initial", "grad_final")),
        ("wide fp32", "*fp32", 9, ()),
        ("scans bf16", "*bf16", 4, ("order",)),
    ):
        recomputed = width <= WIDEST_RECOMPUTED
        types = dict.fromkeys(("x", "weight", "bias", "initial", "grad_final", "grad_y", "y", "grad_x"), pointer)
        types |= {
            "ids": "*i32",
            "cu_seqlens": "*i32",
            "order": "*i64",
            "partial_weight": "*fp32",
            "partial_bias": "*fp32",
        }
        types["grad"] = pointer if recomputed else "*fp32"
        constants = {"REVERSE": False, "ACC": tl.float32, "WIDTH": width, "x_channel": 1, "g_channel": 1, "w_tap": 1}
        constants |= {n: None for n in ("initial", "ids", "cu_seqlens", "order", "grad_final") if n not in extras}
        tile = config(architecture, 2048, 1536)
        found.append(Specimen(label, forward_kernel, types, tile, {**constants, "SILU": True, "grad_y": None}))
        taps = {"SILU": recomputed, "TAPS": _triton.bucket(width)}
        tile = config(architecture, 2048, 1536, tight="order" in extras)
        found.append(Specimen(label, backward_kernel, types, tile, {**constants, **taps}))
        if not recomputed:
            found.append(Specimen(f"{label}, gradient", forward_kernel, types, tile, {**constants, "SILU": True}))
    return found
