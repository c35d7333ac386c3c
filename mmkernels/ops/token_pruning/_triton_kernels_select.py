"""Triton kernels of prune_tokens: the exact choice of each sample's best scores, and the copy of what stays."""

import triton
import triton.language as tl

from mmkernels import _triton
from mmkernels._triton import Config, Specimen

INTEGER = {False: tl.int32, True: tl.int64}  # of ranks, by whether scores are float64
LOWEST32, LOWEST64 = tl.constexpr(-(1 << 31)), tl.constexpr(-(1 << 63))


@triton.jit
def ranks(scores, mask, start, seqlen, s_token, LOW: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Integers in the order of the scores start..start+BLOCK-1, and where there are any: -0 is 0, NaN is below every
    number, a token that the mask drops or that does not exist is below NaN.
    """
    token = start + tl.arange(0, BLOCK)
    fit = token < seqlen
    value = tl.load(scores + token.to(tl.int64) * s_token, fit, other=0.0)
    if BITS == 32:
        value = value.to(tl.float32)
        bits = value.to(tl.int32, bitcast=True)
        key = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # two's complement of what is sign and magnitude
        lowest = tl.full((BLOCK,), LOWEST32, tl.int32)
    else:
        bits = value.to(tl.int64, bitcast=True)
        key = bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
        lowest = tl.full((BLOCK,), LOWEST64, tl.int64)
    key = tl.where(value == 0.0, 0, key)
    key = tl.where(value == value, key, lowest + (1 << LOW))
    if mask is not None:
        fit = fit & (tl.load(mask + token, fit, other=0) != 0)
    return tl.where(fit, key, lowest), fit


@triton.jit(do_not_specialize=["seqlen", "width"])
def select_kernel(
    scores,
    mask,
    position_ids,
    counts,
    before,
    indices,
    positions,
    real,
    offsets,
    seqlen,
    width,
    s_batch,
    s_token,
    f_batch,
    f_row,
    PACKED: tl.constexpr,
    BITS: tl.constexpr,
    LOW: tl.constexpr,
    INT: tl.constexpr,
    ONCE: tl.constexpr,
    BLOCK: tl.constexpr,
    DIGITS: tl.constexpr,
):
    """The places of the counts[b] best scores of a sample in rising order; of equal scores the first ones.

    Grid: (batch,).  A program owns one sample.  It settles the counts[b]-th largest rank digit by digit, by counting
    the ranks that reach each of the DIGITS candidates, then gives the tokens above it, and the first of those equal to
    it, their slots.  Ranks have BITS bits, of which the LOW lowest say nothing.
    Writes indices, positions, real, and offsets: where the token's features begin, -1 for padding.
    Bytes: scores and mask read once where ONCE (BLOCK holds all), else once for each digit from the first-level cache;
    25 bytes written a slot.
    """
    b = tl.program_id(0).to(tl.int64)
    scores += b * s_batch
    count = width
    if counts is not None:
        count = tl.load(counts + b).to(tl.int32)
    out = b * width
    room = width
    if PACKED:
        out = tl.load(before + b).to(tl.int64)
        room = count
    if mask is not None:
        mask += b * seqlen
    if position_ids is not None:
        position_ids += b * seqlen
    key, fit = ranks(scores, mask, 0, seqlen, s_token, LOW, BITS, BLOCK)
    digit = tl.arange(0, DIGITS).to(INT)
    if BITS == 32:
        level = tl.full((1,), LOWEST32, INT)
    else:
        level = tl.full((1,), LOWEST64, INT)
    STEP: tl.constexpr = 2
    tl.static_assert(DIGITS == 1 << STEP)
    for n in range(0, (BITS - LOW) // STEP):
        shift = BITS - STEP - n * STEP
        candidates = level + (digit << shift)
        if ONCE:
            reach = tl.sum((key[:, None] >= candidates[None, :]).to(tl.int32), 0)
        else:
            reach = tl.zeros((DIGITS,), tl.int32)
            for start in range(0, seqlen, BLOCK):
                other, _ = ranks(scores, mask, start, seqlen, s_token, LOW, BITS, BLOCK)
                reach += tl.sum((other[:, None] >= candidates[None, :]).to(tl.int32), 0)
        # Candidates rise, so those with enough ranks above are the first ones; the lowest always has.
        found = tl.sum((reach >= count).to(tl.int32), 0) - 1
        level += tl.zeros((1,), INT) + (found.to(INT) << shift)
    level = level >> LOW
    above = tl.sum(((key >> LOW) > level).to(tl.int32), 0)
    if not ONCE:
        for start in range(BLOCK, seqlen, BLOCK):
            other, _ = ranks(scores, mask, start, seqlen, s_token, LOW, BITS, BLOCK)
            above += tl.sum(((other >> LOW) > level).to(tl.int32), 0)
    wanted = count - above  # of those equal to the level
    equals, slots = above * 0, above * 0
    for start in range(0, seqlen, BLOCK):
        if not ONCE:
            key, fit = ranks(scores, mask, start, seqlen, s_token, LOW, BITS, BLOCK)
        equal = (((key >> LOW) == level) & fit).to(tl.int32)
        stays = ((key >> LOW) > level) | ((equal > 0) & (equals + tl.cumsum(equal, 0) <= wanted))
        slot = slots + tl.cumsum(stays.to(tl.int32), 0) - 1
        stays = stays & (slot < room)  # however the scores may change while they are read
        token = start + tl.arange(0, BLOCK)
        place = slot.to(tl.int64)
        if position_ids is not None:
            place = tl.load(position_ids + token, stays, other=0).to(tl.int64)
        tl.store(indices + out + slot, token.to(tl.int64), stays)
        tl.store(positions + out + slot, place.to(positions.dtype.element_ty), stays)
        tl.store(real + out + slot, tl.full((BLOCK,), 1, tl.uint8), stays)
        tl.store(offsets + out + slot, b * f_batch + token.to(tl.int64) * f_row, stays)
        equals += tl.sum(equal, 0)
        slots += tl.sum(stays.to(tl.int32), 0)
    for start in range(0, room, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        padding = (slot >= slots) & (slot < room)
        none = tl.full((BLOCK,), -1, tl.int64)
        tl.store(indices + out + slot, none, padding)
        tl.store(positions + out + slot, (none * 0).to(positions.dtype.element_ty), padding)
        tl.store(real + out + slot, tl.full((BLOCK,), 0, tl.uint8), padding)
        tl.store(offsets + out + slot, none, padding)


@triton.jit(do_not_specialize=["slots"])
def gather_kernel(features, offsets, tokens, slots, dim, SLOTS: tl.constexpr, COLUMNS: tl.constexpr):
    """tokens[slot] = the row of features at offsets[slot], zeros where that is -1.

    Grid: (cdiv(slots, SLOTS) * cdiv(dim, COLUMNS),).  A program owns SLOTS rows by COLUMNS columns of the dense tokens.
    Bytes: what is kept, read and written once.
    """
    strips = tl.cdiv(dim, COLUMNS)
    slot = tl.program_id(0) // strips * SLOTS + tl.arange(0, SLOTS)
    column = tl.program_id(0) % strips * COLUMNS + tl.arange(0, COLUMNS)
    offset = tl.load(offsets + slot, slot < slots, other=-1)
    inside = (column < dim)[None, :]
    row = tl.load(features + offset[:, None] + column[None, :], (offset >= 0)[:, None] & inside, other=0.0)
    tl.store(tokens + slot[:, None].to(tl.int64) * dim + column[None, :], row, (slot < slots)[:, None] & inside)


def select_config(seqlen: int) -> Config:
    """All scores of a sample in registers up to 4096 of them; 4 candidates settle 2 bits at a time.

    Eight warps: with four, and with sixteen, ptxas spilled.
    """
    return Config({"BLOCK": _triton.bucket(seqlen, 16, 4096), "DIGITS": 4}, warps=8)


def gather_config(dim: int) -> Config:
    """4096 elements a program."""
    columns = _triton.bucket(dim, 16, 1024)
    return Config({"SLOTS": max(1, 4096 // columns), "COLUMNS": columns})


def specimens(architecture: str) -> list[Specimen]:
    """What is compiled ahead of time: an image, a large one, more than registers hold, every option."""
    types = {
        "mask": "*u8",
        "position_ids": "*i64",
        "counts": "*i64",
        "before": "*i32",
        "real": "*u8",
        "tokens": "*bf16",
    }
    types |= dict.fromkeys(("indices", "positions", "offsets"), "*i64") | {"features": "*bf16"}
    types |= dict.fromkeys(("s_batch", "s_token", "f_batch", "f_row"), "i64")
    plain = {"mask": None, "position_ids": None, "counts": None, "before": None, "PACKED": False, "s_token": 1}
    found = []
    for dtype, bits, low, whole in (("fp32", 32, 0, tl.int32), ("bf16", 32, 16, tl.int32), ("fp64", 64, 0, tl.int64)):
        rank = {"BITS": bits, "LOW": low, "INT": whole}
        scored = types | {"scores": f"*{dtype}"}
        for seqlen in (576, 2880, 20000):
            constants = rank | plain | {"ONCE": seqlen <= 4096}
            found.append(Specimen(f"{dtype} {seqlen}", select_kernel, scored, select_config(seqlen), constants))
        constants = rank | {"PACKED": True, "ONCE": True}
        found.append(Specimen(f"{dtype} 576 packed masked", select_kernel, scored, select_config(576), constants))
    found.append(Specimen("bf16 dim 1024", gather_kernel, types, gather_config(1024)))
    return found
