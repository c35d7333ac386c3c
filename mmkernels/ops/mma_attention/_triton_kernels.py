"""Triton kernels of mma_attention, forward: attention of one tile of packed rows, merged splits, attention mass.

Tiles and packed rows are those of _triton_kernels_plan.py.  Softmax is computed in base 2 with a running maximum
(arXiv 2205.14135, algorithm 1; arXiv 2307.08691, section 3.1).
"""

import triton
import triton.language as tl

from mmkernels import _triton
from mmkernels._triton import Config, Specimen
from mmkernels._triton_math import dot
from mmkernels.ops.mma_attention._triton_kernels_plan import kept, listed_rects

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_rows(base, at, inside, HEADDIM: tl.constexpr, CHANNELS: tl.constexpr, UNIT: tl.constexpr):
    """Rows of HEADDIM channels at the offsets `at * UNIT`, zeros where not inside (None: all are) and up to CHANNELS.

    Strides come divided by UNIT: that a row begins at a multiple of 16 bytes is then known when the kernel is compiled,
    and loads are vectors, for head dimensions too that are multiples of 8 and not of 16.
    """
    channel = tl.arange(0, CHANNELS)[None, :]
    pointer = base + (at * UNIT)[:, None] + channel
    if HEADDIM == CHANNELS:
        if inside is None:
            rows = tl.load(pointer)
        else:
            rows = tl.load(pointer, inside[:, None], other=0.0)
    else:
        if inside is None:
            rows = tl.load(pointer, channel < HEADDIM, other=0.0)
        else:
            rows = tl.load(pointer, inside[:, None] & (channel < HEADDIM), other=0.0)
    return rows


@triton.jit
def attend(
    q, total, largest, sums, k, v, k_row, v_row, tile,
    row, begin, end, rects, first, last, qlen, klen, row_low, row_high,
    MASKED: tl.constexpr, SCALE: tl.constexpr, HEADDIM: tl.constexpr, KEYS: tl.constexpr, CHANNELS: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """One tile of keys: the weighted sum of values, the largest score (base 2) and the sum of weights, updated."""
    key = tile * KEYS + tl.arange(0, KEYS)
    inside = None
    if MASKED:
        inside = key < klen
    keys = load_rows(k, key.to(tl.int64) * k_row, inside, HEADDIM, CHANNELS, UNIT)
    scores = dot(q, tl.trans(keys)) * (SCALE * LOG2E)
    if MASKED:
        keep = kept(
            row[:, None], key[None, :], begin[:, None], end[:, None], rects, first, last, qlen, klen,
            row_low, row_high, tile * KEYS, tile * KEYS + KEYS - 1,
        )  # fmt: skip
        scores = tl.where(keep, scores, float("-inf"))
    largest_now = tl.maximum(largest, tl.max(scores, 1))
    # Rows that have kept nothing so far: exp2(-inf - 0) = 0 instead of exp2(-inf + inf).
    shift = tl.where(largest_now == float("-inf"), 0.0, largest_now)
    weights = tl.exp2(scores - shift[:, None])
    rescale = tl.exp2(largest - shift)
    values = load_rows(v, key.to(tl.int64) * v_row, inside, HEADDIM, CHANNELS, UNIT)
    total = dot(weights.to(values.dtype), values, total * rescale[:, None])
    return total, largest_now, sums * rescale + tl.sum(weights, 1)


@triton.jit(do_not_specialize=["batch", "qlen", "klen", "qtiles", "ktiles", "splits"])
def forward_kernel(
    q,
    k,
    v,
    row_start,
    row_end,
    rects,
    before,
    counts,
    lists,
    out,
    lse,
    batch,
    qlen,
    klen,
    nkvheads,
    qtiles,
    ktiles,
    splits,
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    GROUP: tl.constexpr,
    SCALE: tl.constexpr,
    HEADDIM: tl.constexpr,
    UNIT: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """out = softmax(scale q k^T) v and lse over the live tiles, or over one of `splits` shares of them.

    Grid: (batch * nkvheads * qtiles * splits,), the last query tiles (of causal masks the longest) first.  A program
    owns ROWS packed rows of one key-value head: its queries are read once, keys and values once for every live tile.
    out (splits, batch, qlen, nheads, HEADDIM) and lse (splits, batch, nheads, qlen) are dense.
    Bytes: q once; k and v once for every live tile, from the second-level cache but for the first time; out and lse
    once, in each split.
    """
    split = tl.program_id(0) % splits
    place = tl.program_id(0) // splits
    tile = qtiles - 1 - place % qtiles
    kv = (place // qtiles % nkvheads).to(tl.int64)
    b = place // qtiles // nkvheads
    wide = b.to(tl.int64)
    packed = tile * ROWS + tl.arange(0, ROWS)
    row = packed // GROUP
    head = kv * GROUP + packed % GROUP
    exists = row < qlen
    row_low = tile * ROWS // GROUP
    row_high = (tile * ROWS + ROWS - 1) // GROUP
    first, last = listed_rects(before, b)
    begin = tl.load(row_start + wide * qlen + row, exists, other=0)
    end = tl.minimum(tl.load(row_end + wide * qlen + row, exists, other=0), klen)
    at = wide * q_batch + row.to(tl.int64) * q_row + head * q_head
    queries = load_rows(q, at, exists, HEADDIM, CHANNELS, UNIT)
    k += (wide * k_batch + kv * k_head) * UNIT
    v += (wide * v_batch + kv * v_head) * UNIT
    line = wide * qtiles + tile
    lists += line * ktiles
    partial = tl.load(counts + line * 2)
    full = tl.load(counts + line * 2 + 1)
    share = tl.cdiv(partial + full, splits)
    start, stop = split * share, tl.minimum(split * share + share, partial + full)
    total = tl.zeros((ROWS, CHANNELS), ACC)
    largest = tl.full((ROWS,), float("-inf"), ACC)
    sums = tl.zeros((ROWS,), ACC)
    for n in range(tl.minimum(start, partial), tl.minimum(stop, partial)):
        total, largest, sums = attend(
            queries, total, largest, sums, k, v, k_row, v_row, tl.load(lists + n),
            row, begin, end, rects, first, last, qlen, klen, row_low, row_high,
            True, SCALE, HEADDIM, KEYS, CHANNELS, UNIT,
        )  # fmt: skip
    for n in range(tl.maximum(start, partial), tl.maximum(stop, partial)):
        total, largest, sums = attend(
            queries, total, largest, sums, k, v, k_row, v_row, tl.load(lists + (ktiles - 1 + partial - n)),
            row, begin, end, rects, first, last, qlen, klen, row_low, row_high,
            False, SCALE, HEADDIM, KEYS, CHANNELS, UNIT,
        )  # fmt: skip
    # A row without keys: 0 / 1 and log2 0 = -inf.
    total = total / tl.where(sums > 0, sums, 1.0)[:, None]
    largest = tl.where(sums > 0, (largest + tl.log2(tl.where(sums > 0, sums, 1.0))) * LN2, float("-inf"))
    element = split.to(tl.int64) * batch + wide
    nheads = nkvheads * GROUP
    channel = tl.arange(0, CHANNELS)[None, :]
    at = ((element * qlen + row) * nheads + head)[:, None] * HEADDIM + channel
    tl.store(out + at, total.to(out.dtype.element_ty), exists[:, None] & (channel < HEADDIM))
    tl.store(lse + (element * nheads + head) * qlen + row, largest, exists)


@triton.jit(do_not_specialize=["lines", "qlen", "splits"])
def merge_kernel(
    parts,
    part_lse,
    out,
    lse,
    lines,
    qlen,
    nheads,
    splits,
    HEADDIM: tl.constexpr,
    ACC: tl.constexpr,
    LINES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Merge attention over disjoint sets of keys: lse = log sum_s e^{lse_s}, out = sum_s e^{lse_s - lse} out_s.

    Grid: (cdiv(lines, LINES),), lines = batch * qlen * nheads.  A program owns LINES lines of out.
    Bytes: parts and part_lse read once, out and lse written once.
    """
    line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    exists = line < lines
    head = line % nheads
    row = line // nheads % qlen
    b = line // nheads // qlen
    at = (b * nheads + head) * qlen + row
    channel = tl.arange(0, CHANNELS)[None, :]
    total = tl.zeros((LINES, CHANNELS), ACC)
    largest = tl.full((LINES,), float("-inf"), ACC)
    sums = tl.zeros((LINES,), ACC)
    for s in range(0, splits):
        skipped = (line * 0 + s) * lines
        part = tl.load(part_lse + skipped + at, exists, other=float("-inf"))
        largest_now = tl.maximum(largest, part)
        shift = tl.where(largest_now == float("-inf"), 0.0, largest_now)
        rescale, weight = tl.exp(largest - shift), tl.exp(part - shift)
        pointer = parts + (skipped + line)[:, None] * HEADDIM + channel
        values = tl.load(pointer, exists[:, None] & (channel < HEADDIM), other=0.0)
        total = total * rescale[:, None] + values * weight[:, None]
        sums = sums * rescale + weight
        largest = largest_now
    alive = sums > 0
    sums = tl.where(alive, sums, 1.0)
    pointer = out + line[:, None] * HEADDIM + channel
    tl.store(pointer, (total / sums[:, None]).to(out.dtype.element_ty), exists[:, None] & (channel < HEADDIM))
    tl.store(lse + at, tl.where(alive, largest + tl.log(sums), float("-inf")), exists)


@triton.jit(do_not_specialize=["qlen", "klen", "qtiles", "ktiles"])
def mass_kernel(
    q,
    k,
    row_start,
    row_end,
    rects,
    before,
    counts,
    lists,
    lse,
    weights,
    mass,
    qlen,
    klen,
    nheads,
    qtiles,
    ktiles,
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    GROUP: tl.constexpr,
    SCALE: tl.constexpr,
    HEADDIM: tl.constexpr,
    UNIT: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """mass[b, h, j] = sum_i weights[b, i] P[i, j], in one order.

    Grid: (batch * nheads * ktiles,).  A program owns KEYS keys of one query head and walks the tiles of query rows that
    attend them, not packed (lists are those of a group of 1); tiles without any weight are passed over.
    Bytes: k once for every query head; q, lse and weights once for every live tile that counts; mass once.
    """
    tile = tl.program_id(0) % ktiles
    head = (tl.program_id(0) // ktiles % nheads).to(tl.int64)
    b = tl.program_id(0) // ktiles // nheads
    wide = b.to(tl.int64)
    first, last = listed_rects(before, b)
    key = tile * KEYS + tl.arange(0, KEYS)
    at = wide * k_batch + key.to(tl.int64) * k_row + head // GROUP * k_head
    keys = tl.trans(load_rows(k, at, key < klen, HEADDIM, CHANNELS, UNIT))
    line = wide * ktiles + tile
    lists += line * qtiles
    partial = tl.load(counts + line * 2)
    live = partial + tl.load(counts + line * 2 + 1)
    lse += (wide * nheads + head) * qlen
    total = tl.zeros((KEYS,), ACC)
    for n in range(0, live):
        found = tl.load(lists + tl.where(n < partial, n, qtiles - 1 + partial - n))
        row = found * ROWS + tl.arange(0, ROWS)
        exists = row < qlen
        weight = tl.load(weights + wide * qlen + row, exists, other=0.0)
        if tl.max(tl.abs(weight), 0) > 0:
            rows = wide * q_batch + row.to(tl.int64) * q_row + head * q_head
            queries = load_rows(q, rows, exists, HEADDIM, CHANNELS, UNIT)
            norm = tl.load(lse + row, exists, other=0.0)
            norm = tl.where(norm == float("-inf"), 0.0, norm)
            begin = tl.load(row_start + wide * qlen + row, exists, other=0)
            end = tl.minimum(tl.load(row_end + wide * qlen + row, exists, other=0), klen)
            keep = kept(
                row[:, None], key[None, :], begin[:, None], end[:, None], rects, first, last, qlen, klen,
                found * ROWS, found * ROWS + ROWS - 1, tile * KEYS, tile * KEYS + KEYS - 1,
            )  # fmt: skip
            p = tl.exp2(dot(queries, keys) * (SCALE * LOG2E) - (norm * LOG2E)[:, None])
            total += tl.sum(tl.where(keep, p * weight[:, None], 0.0), 0)
    tl.store(mass + (wide * nheads + head) * klen + key, total, key < klen)


def forward_config(architecture: str, packed: int, headdim: int, itemsize: int) -> Config:
    """Tiles of up to 128 packed rows; fewer where float32, or long heads, have to fit registers."""
    channels = _triton.bucket(headdim, 16)
    most, keys = (128, 64) if channels <= 64 else (128, 32)
    if itemsize > 2:
        most, keys = (32, 32) if channels <= 64 else (16, 16)
    if channels > max(headdim, 64) or (channels > 64 and architecture == "sm_120"):  # masked channels cost registers
        most = min(most, 64)
    rows = _triton.bucket(packed, 16, max(16, most * 128 // max(channels, 128)))
    blocks = {"ROWS": rows, "KEYS": keys, "CHANNELS": channels}
    # Two loads are in flight one after the other, of the list and of the tile it names: three stages, if registers
    # are enough for them.
    stages = 1 if itemsize > 2 else 2 if architecture == "sm_120" else 3
    return Config(blocks, warps=4 if rows == 16 else 8, stages=stages)


def merge_config(headdim: int) -> Config:
    """2048 elements of output a program."""
    channels = _triton.bucket(headdim, 16)
    return Config({"LINES": max(1, 2048 // channels), "CHANNELS": channels})


def mass_config(architecture: str, qlen: int, headdim: int, itemsize: int) -> Config:
    """Tiles of 64 keys (float32: 32) by up to as many rows."""
    channels = _triton.bucket(headdim, 16)
    most = 32 if itemsize > 2 or channels > 128 else 64
    blocks = {"ROWS": _triton.bucket(qlen, 16, most), "KEYS": most, "CHANNELS": channels}
    return Config(blocks, warps=8 if itemsize > 2 and channels > 64 else 4, stages=1)


def specimens(architecture: str) -> list[Specimen]:
    """What is compiled ahead of time: the head dimensions of decoders and vision towers, decoding, attention mass."""
    integers = ("row_start", "row_end", "rects", "counts", "lists")
    floats = ("out", "lse", "parts", "part_lse", "weights", "mass")
    common = dict.fromkeys(integers, "*i32") | dict.fromkeys(floats, "*fp32") | {"before": "*i64"}
    wide = {name: "i64" for t in "qkv" for name in (f"{t}_batch", f"{t}_row", f"{t}_head")}
    found = []
    for dtype, itemsize in (("bf16", 2), ("fp32", 4)):
        types = common | wide | dict.fromkeys(("q", "k", "v", "out"), f"*{dtype}")
        for headdim, group in ((64, 1), (72, 1), (96, 1), (128, 4)):
            constants = {"GROUP": group, "SCALE": headdim**-0.5, "HEADDIM": headdim, "UNIT": 8, "ACC": tl.float32}
            label = f"{dtype} headdim {headdim} group {group}"
            config = forward_config(architecture, 4096, headdim, itemsize)
            found.append(Specimen(label, forward_kernel, types, config, constants))
            config = mass_config(architecture, 4096, headdim, itemsize)
            found.append(Specimen(label, mass_kernel, types, config, constants))
        causal = constants | {"rects": None, "before": None}
        config = forward_config(architecture, 4096, headdim, itemsize)
        found.append(Specimen(f"{dtype} headdim 128 no rectangles", forward_kernel, types, config, causal))
        config = forward_config(architecture, group, headdim, itemsize)
        found.append(Specimen(f"{dtype} decode headdim 128", forward_kernel, types, config, constants))
        found.append(Specimen(f"{dtype} headdim 128", merge_kernel, types, merge_config(headdim), constants))
    return found
