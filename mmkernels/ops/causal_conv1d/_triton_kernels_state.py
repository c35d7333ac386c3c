"""Triton kernels of causal_conv1d that touch states: final states, gradients of initial ones, and the step in place."""

import triton
import triton.language as tl

from mmkernels import _triton
from mmkernels._triton import Config, Specimen
from mmkernels._triton_math import silu, silu_derivative
from mmkernels.ops.causal_conv1d._triton_kernels import place, sums_at


@triton.jit
def _row_bounds(row, cu_seqlens, seqlen):
    """(batch row, first token, one past the last) of the sequence that owns state `row`."""
    if cu_seqlens is None:
        return row, row * 0, row * 0 + seqlen
    else:
        begin = tl.maximum(tl.load(cu_seqlens + row).to(tl.int32), 0)
        return row * 0, begin, tl.minimum(tl.load(cu_seqlens + row + 1).to(tl.int32), seqlen)


@triton.jit(do_not_specialize=["seqlen"])
def final_states_kernel(
    x,
    initial,
    ids,
    cu_seqlens,
    final,
    seqlen,
    dim,
    x_row,
    x_token,
    x_channel,
    i_row,
    i_channel,
    i_tap,
    ids_row,
    ids_token,
    REVERSE: tl.constexpr,
    HISTORY: tl.constexpr,
    ENTRIES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The last HISTORY raw inputs of every sequence, in scan order; of its last run only, and of its initial state.

    Grid: (rows * cdiv(dim, CHANNELS),).  A program owns one row's states of CHANNELS channels.
    Bytes: rows * dim * HISTORY elements read and written once.
    """
    slices = tl.cdiv(dim, CHANNELS)
    row = tl.program_id(0) // slices
    channel = (tl.program_id(0) % slices) * CHANNELS + tl.arange(0, CHANNELS).to(tl.int64)
    inside = channel < dim
    batch, begin, stop = _row_bounds(row, cu_seqlens, seqlen)
    entry = tl.arange(0, ENTRIES)
    step = stop - begin - HISTORY + entry  # the scan position that the entry remembers
    token = begin + step
    if REVERSE:
        token = stop - 1 - step
    known = (entry < HISTORY) & (step >= 0)
    if ids is not None:
        ids += batch.to(tl.int64) * ids_row
    _, remaining, _, ahead, leading, real = place(token, known, begin, stop, ids, ids_token, REVERSE, HISTORY)
    last = real & (ahead == remaining)
    at = batch.to(tl.int64) * x_row + token.to(tl.int64)[:, None] * x_token + channel[None, :] * x_channel
    kept = tl.load(x + at, last[:, None] & inside[None, :], other=0.0).to(final.dtype.element_ty)
    if initial is not None:
        # Still remembered: only when every token of the sequence is of the run that the state began.
        broken = tl.maximum(stop - begin, 0) - tl.sum((last & leading).to(tl.int32), 0)
        old = (broken + entry * 0 == 0) & (entry < HISTORY) & (step < 0)
        at = row.to(tl.int64) * i_row + channel[None, :] * i_channel
        at += (entry + stop - begin).to(tl.int64)[:, None] * i_tap
        before = tl.load(initial + at, old[:, None] & inside[None, :], other=0.0).to(final.dtype.element_ty)
        kept = tl.where(old[:, None], before, kept)
    at = (row.to(tl.int64) * dim + channel)[None, :] * HISTORY + entry[:, None]
    tl.store(final + at, kept, (entry < HISTORY)[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["seqlen"])
def initial_gradient_kernel(
    grad,
    grad_final,
    x,
    weight,
    bias,
    initial,
    ids,
    cu_seqlens,
    grad_initial,
    seqlen,
    dim,
    x_row,
    x_token,
    x_channel,
    w_channel,
    w_tap,
    i_row,
    i_channel,
    i_tap,
    ids_row,
    ids_token,
    g_row,
    g_token,
    g_channel,
    f_row,
    f_channel,
    f_tap,
    SILU: tl.constexpr,
    REVERSE: tl.constexpr,
    ACC: tl.constexpr,
    WIDTH: tl.constexpr,
    ENTRIES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Gradients of the initial states: of entry k, sum over the first tokens p <= k of dsum_p weight[k - p].

    Grid: (rows * cdiv(dim, CHANNELS),).  A program owns one row's states of CHANNELS channels.
    Bytes: the first width - 1 tokens of grad and x, and the states, read once; grad_initial written once.
    """
    history: tl.constexpr = WIDTH - 1
    slices = tl.cdiv(dim, CHANNELS)
    row = tl.program_id(0) // slices
    channel = (tl.program_id(0) % slices) * CHANNELS + tl.arange(0, CHANNELS).to(tl.int64)
    inside = channel < dim
    batch, begin, stop = _row_bounds(row, cu_seqlens, seqlen)
    wide_row, wide_batch = row.to(tl.int64), batch.to(tl.int64)
    step = tl.arange(0, ENTRIES)
    token = begin + step
    if REVERSE:
        token = stop - 1 - step
    known = (step < history) & (step < stop - begin)
    if ids is not None:
        ids += wide_batch * ids_row
    position, remaining, back, ahead, leading, real = place(token, known, begin, stop, ids, ids_token, REVERSE, history)
    at = wide_batch * g_row + token.to(tl.int64)[:, None] * g_token + channel[None, :] * g_channel
    g = tl.load(grad + at, leading[:, None] & inside[None, :], other=0.0).to(ACC)
    if SILU:
        g *= silu_derivative(
            sums_at(
                x + wide_batch * x_row, x_token, x_channel, None, weight, w_channel, w_tap, bias,
                initial + wide_row * i_row, i_channel, i_tap,
                token, channel, inside, position, back, ahead, leading, real,
                0, REVERSE, WIDTH, ACC, ENTRIES, CHANNELS,
            )
        )  # fmt: skip
    broken = tl.maximum(stop - begin, 0) - tl.sum((leading & (ahead == remaining)).to(tl.int32), 0)
    for k in tl.static_range(WIDTH - 1):
        reads = (step <= k)[:, None] & inside[None, :]
        at = channel[None, :] * w_channel + (k - step).to(tl.int64)[:, None] * w_tap
        total = tl.sum(g * tl.load(weight + at, reads, other=0.0).to(ACC), 0)
        if grad_final is not None:
            # Scalars join a mask by arithmetic: the interpreter makes integers of a boolean it has to broadcast.
            kept = (broken + channel * 0 == 0) & (k + begin - stop + channel * 0 >= 0) & inside
            at = wide_row * f_row + channel * f_channel + (k - (stop - begin)).to(tl.int64) * f_tap
            total += tl.load(grad_final + at, kept, other=0.0).to(ACC)
        at = (wide_row * dim + channel) * (WIDTH - 1) + k
        tl.store(grad_initial + at, total.to(grad_initial.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["nslots"])
def update_kernel(
    x,
    state,
    weight,
    bias,
    indices,
    y,
    tokens,
    dim,
    nslots,
    length,
    x_row,
    x_token,
    x_channel,
    s_slot,
    s_channel,
    s_entry,
    w_channel,
    w_tap,
    SILU: tl.constexpr,
    ACC: tl.constexpr,
    WIDTH: tl.constexpr,
    ENTRIES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Outputs of the new tokens, and the state shifted left by as many, with them appended; in place.

    Grid: (batch * cdiv(dim, CHANNELS),).  A program owns one row's state of CHANNELS channels.  A negative slot is
    padding: output 0.  A slot that is none: output NaN, and no memory is touched.
    Bytes: the addressed states read and written once, x read and y written once.
    """
    slices = tl.cdiv(dim, CHANNELS)
    row = (tl.program_id(0) // slices).to(tl.int64)
    channel = (tl.program_id(0) % slices) * CHANNELS + tl.arange(0, CHANNELS).to(tl.int64)
    inside = channel < dim
    slot = row
    if indices is not None:
        slot = tl.load(indices + row).to(tl.int64)
    slots = slot + channel * 0
    owned = (slots >= 0) & (slots < nslots)
    x += row * x_row + channel * x_channel
    state += slot * s_slot + channel * s_channel
    for t in range(0, tokens):
        total = tl.zeros((CHANNELS,), ACC)
        if bias is not None:
            total += tl.load(bias + channel, inside, other=0.0).to(ACC)
        for s in tl.static_range(WIDTH):
            source = row * 0 + (t - s)
            new = tl.load(x + source * x_token, inside & (source + channel * 0 >= 0), other=0.0)
            old = tl.load(state + (length + source) * s_entry, inside & owned & (source + channel * 0 < 0), other=0.0)
            w = tl.load(weight + channel * w_channel + (WIDTH - 1 - s) * w_tap, inside, other=0.0).to(ACC)
            total += (new.to(ACC) + old.to(x.dtype.element_ty).to(ACC)) * w
        if SILU:
            total = silu(total)
        total = tl.where(owned, total, tl.where(slots < 0, 0.0, float("nan")))
        tl.store(y + (row * tokens + t) * dim + channel, total.to(y.dtype.element_ty), inside)
    entry = tl.arange(0, ENTRIES).to(tl.int64)[:, None]
    source = entry + tokens
    mine = (entry < length) & (inside & owned)[None, :]
    kept = tl.load(state[None, :] + source * s_entry, mine & (source < length), other=0.0)
    appended = tl.load(x[None, :] + (source - length) * x_token, mine & (source >= length), other=0.0)
    after = tl.where(source < length, kept, appended.to(kept.dtype))
    # What one thread reads another overwrites: all must have read.
    tl.debug_barrier()
    tl.store(state[None, :] + entry * s_entry, after, mine)


def config(dim: int, entries: int) -> Config:
    """A whole row's states of up to 128 channels."""
    block = _triton.bucket(entries, 1)
    return Config({"ENTRIES": block, "CHANNELS": _triton.bucket(dim, 32, max(32, 512 // block))}, warps=4)


def specimens(architecture: str) -> list[Specimen]:
    """What is compiled ahead of time: states of a Mamba-2 and of an mmMamba mixer, with every input there is."""
    found = []
    for label, pointer, width in (("Mamba-2 bf16", "*bf16", 4), ("mmMamba fp32", "*fp32", 2)):
        names = ("x", "weight", "bias", "initial", "grad", "grad_final", "final", "grad_initial", "state", "y")
        types = dict.fromkeys(names, pointer) | {"ids": "*i32", "cu_seqlens": "*i32", "indices": "*i32"}
        constants = {"REVERSE": False, "ACC": tl.float32, "SILU": True, "WIDTH": width, "HISTORY": width - 1}
        for packing in ("ids", "cu_seqlens"):
            chosen = {**constants, "ids": None} if packing == "cu_seqlens" else {**constants, "cu_seqlens": None}
            tile = config(1536, width - 1)
            found.append(Specimen(f"{label} {packing}", final_states_kernel, types, tile, chosen))
            found.append(Specimen(f"{label} {packing}", initial_gradient_kernel, types, tile, chosen))
        found.append(Specimen(label, update_kernel, types, config(1536, width - 1), constants))
    return found
