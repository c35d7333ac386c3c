"""Triton kernels of mma_attention, backward: P is computed again from lse; nothing is added with atomics.

Tiles and packed rows are those of _triton_kernels_plan.py; the formulas are those of arXiv 2307.08691, section 3.1,
with the gradient of lse added to the row sums.
"""

import triton
import triton.language as tl

from mmkernels import _triton
from mmkernels._triton import Config, Specimen
from mmkernels._triton_math import dot
from mmkernels.ops.mma_attention._triton_kernels import LOG2E, load_rows
from mmkernels.ops.mma_attention._triton_kernels_plan import kept, listed_rects


@triton.jit(do_not_specialize=["lines", "qlen"])
def row_sums_kernel(
    grad_out,
    grad_lse,
    out,
    lse,
    sums,
    lines,
    qlen,
    nheads,
    g_batch,
    g_row,
    g_head,
    HEADDIM: tl.constexpr,
    UNIT: tl.constexpr,
    ACC: tl.constexpr,
    LINES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """sums[b, h, i] = grad_out[b, i, h] . out[b, i, h] - grad_lse[b, h, i]; 0 for a row without keys.

    Grid: (cdiv(lines, LINES),), lines = batch * qlen * nheads.  A program owns LINES lines of the dense out.
    Bytes: grad_out, out, lse and grad_lse read once, sums written once.
    """
    line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    exists = line < lines
    head = line % nheads
    row = line // nheads % qlen
    b = line // nheads // qlen
    at = (b * nheads + head) * qlen + row
    total = tl.zeros((LINES,), ACC)
    if grad_out is not None:
        grads = load_rows(grad_out, b * g_batch + row * g_row + head * g_head, exists, HEADDIM, CHANNELS, UNIT)
        total += tl.sum(grads.to(ACC) * load_rows(out, line * HEADDIM, exists, HEADDIM, CHANNELS, 1).to(ACC), 1)
    if grad_lse is not None:
        total -= tl.load(grad_lse + at, exists, other=0.0)
    norm = tl.load(lse + at, exists, other=float("-inf"))
    tl.store(sums + at, tl.where(norm == float("-inf"), 0.0, total), exists)


@triton.jit
def query_gradient(
    total, queries, grads, norm, inner, k, v, k_row, v_row, tile,
    row, begin, end, rects, first, last, qlen, klen, row_low, row_high,
    MASKED: tl.constexpr, SCALE: tl.constexpr, HEADDIM: tl.constexpr, KEYS: tl.constexpr, CHANNELS: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """One tile of keys: total + dS K, with dS = P * (dO V^T - inner)."""
    key = tile * KEYS + tl.arange(0, KEYS)
    inside = None
    if MASKED:
        inside = key < klen
    keys = load_rows(k, key.to(tl.int64) * k_row, inside, HEADDIM, CHANNELS, UNIT)
    p = tl.exp2(dot(queries, tl.trans(keys)) * (SCALE * LOG2E) - norm[:, None])
    if MASKED:
        keep = kept(
            row[:, None], key[None, :], begin[:, None], end[:, None], rects, first, last, qlen, klen,
            row_low, row_high, tile * KEYS, tile * KEYS + KEYS - 1,
        )  # fmt: skip
        p = tl.where(keep, p, 0.0)
    values = load_rows(v, key.to(tl.int64) * v_row, inside, HEADDIM, CHANNELS, UNIT)
    ds = p * (dot(grads, tl.trans(values)) - inner[:, None])
    return dot(ds.to(keys.dtype), keys, total)


@triton.jit(do_not_specialize=["qlen", "klen", "qtiles", "ktiles"])
def query_kernel(
    q,
    k,
    v,
    grad_out,
    row_start,
    row_end,
    rects,
    before,
    counts,
    lists,
    lse,
    sums,
    grad_q,
    qlen,
    klen,
    nkvheads,
    qtiles,
    ktiles,
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    g_batch,
    g_row,
    g_head,
    GROUP: tl.constexpr,
    SCALE: tl.constexpr,
    HEADDIM: tl.constexpr,
    UNIT: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """grad_q = scale dS K.

    Grid: (batch * nkvheads * qtiles,), the last query tiles first.  A program owns ROWS packed rows of one key-value
    head: q, grad_out, lse and sums are read once, k and v once for every live tile; grad_q is dense.
    Bytes: as said; k and v come from the second-level cache but for the first time.
    """
    tile = qtiles - 1 - tl.program_id(0) % qtiles
    kv = (tl.program_id(0) // qtiles % nkvheads).to(tl.int64)
    b = tl.program_id(0) // qtiles // nkvheads
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
    nheads = nkvheads * GROUP
    at = wide * q_batch + row.to(tl.int64) * q_row + head * q_head
    queries = load_rows(q, at, exists, HEADDIM, CHANNELS, UNIT)
    at = wide * g_batch + row.to(tl.int64) * g_row + head * g_head
    grads = load_rows(grad_out, at, exists, HEADDIM, CHANNELS, UNIT)
    at = (wide * nheads + head) * qlen + row
    norm = tl.load(lse + at, exists, other=0.0)
    norm = tl.where(norm == float("-inf"), 0.0, norm) * LOG2E
    inner = tl.load(sums + at, exists, other=0.0)
    k += (wide * k_batch + kv * k_head) * UNIT
    v += (wide * v_batch + kv * v_head) * UNIT
    line = wide * qtiles + tile
    lists += line * ktiles
    partial = tl.load(counts + line * 2)
    full = tl.load(counts + line * 2 + 1)
    total = tl.zeros((ROWS, CHANNELS), ACC)
    for n in range(0, partial):
        total = query_gradient(
            total, queries, grads, norm, inner, k, v, k_row, v_row, tl.load(lists + n),
            row, begin, end, rects, first, last, qlen, klen, row_low, row_high,
            True, SCALE, HEADDIM, KEYS, CHANNELS, UNIT,
        )  # fmt: skip
    for n in range(0, full):
        total = query_gradient(
            total, queries, grads, norm, inner, k, v, k_row, v_row, tl.load(lists + (ktiles - 1 - n)),
            row, begin, end, rects, first, last, qlen, klen, row_low, row_high,
            False, SCALE, HEADDIM, KEYS, CHANNELS, UNIT,
        )  # fmt: skip
    channel = tl.arange(0, CHANNELS)[None, :]
    at = ((wide * qlen + row) * nheads + head)[:, None] * HEADDIM + channel
    tl.store(grad_q + at, (total * SCALE).to(grad_q.dtype.element_ty), exists[:, None] & (channel < HEADDIM))


@triton.jit
def key_gradients(
    of_keys, of_values, keys, values, q, grad_out, lse, sums, q_row, q_head, g_row, g_head, tile,
    key, row_start, row_end, rects, first, last, qlen, klen, key_low, key_high,
    MASKED: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr, HEADDIM: tl.constexpr, ROWS: tl.constexpr,
    CHANNELS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """One tile of packed rows: of_keys + dS^T Q and of_values + P^T dO, everything transposed.

    Rows that do not exist read as zeros: P is 1 where it is not masked, times a dO of 0; dS is 0.
    """
    packed = tile * ROWS + tl.arange(0, ROWS)
    row = packed // GROUP
    head = (packed % GROUP).to(tl.int64)
    exists = row < qlen
    queries = load_rows(q, row.to(tl.int64) * q_row + head * q_head, exists, HEADDIM, CHANNELS, UNIT)
    norm = tl.load(lse + head * qlen + row, exists, other=0.0)
    norm = tl.where(norm == float("-inf"), 0.0, norm) * LOG2E
    p = tl.exp2(dot(keys, tl.trans(queries)) * (SCALE * LOG2E) - norm[None, :])
    if MASKED:
        begin = tl.load(row_start + row, exists, other=0)
        end = tl.minimum(tl.load(row_end + row, exists, other=0), klen)
        keep = kept(
            row[None, :], key[:, None], begin[None, :], end[None, :], rects, first, last, qlen, klen,
            tile * ROWS // GROUP, (tile * ROWS + ROWS - 1) // GROUP, key_low, key_high,
        )  # fmt: skip
        p = tl.where(keep, p, 0.0)
    grads = load_rows(grad_out, row.to(tl.int64) * g_row + head * g_head, exists, HEADDIM, CHANNELS, UNIT)
    of_values = dot(p.to(grads.dtype), grads, of_values)
    inner = tl.load(sums + head * qlen + row, exists, other=0.0)
    ds = p * (dot(values, tl.trans(grads)) - inner[None, :])
    return dot(ds.to(queries.dtype), queries, of_keys), of_values


@triton.jit(do_not_specialize=["qlen", "klen", "qtiles", "ktiles"])
def key_kernel(
    q,
    k,
    v,
    grad_out,
    row_start,
    row_end,
    rects,
    before,
    counts,
    lists,
    lse,
    sums,
    grad_k,
    grad_v,
    qlen,
    klen,
    nkvheads,
    qtiles,
    ktiles,
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    g_batch,
    g_row,
    g_head,
    GROUP: tl.constexpr,
    SCALE: tl.constexpr,
    HEADDIM: tl.constexpr,
    UNIT: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """grad_k = scale dS^T Q and grad_v = P^T dO, summed over the query heads of a group as over rows.

    Grid: (batch * nkvheads * ktiles,), the first keys (of causal masks the longest) first.  A program owns KEYS keys of
    one key-value head: k and v are read once, q, grad_out, lse and sums once for every live tile; the gradients are
    dense.
    Bytes: as said; q and grad_out come from the second-level cache but for the first time.
    """
    tile = tl.program_id(0) % ktiles
    kv = (tl.program_id(0) // ktiles % nkvheads).to(tl.int64)
    b = tl.program_id(0) // ktiles // nkvheads
    wide = b.to(tl.int64)
    first, last = listed_rects(before, b)
    key = tile * KEYS + tl.arange(0, KEYS)
    inside = key < klen
    keys = load_rows(k, wide * k_batch + key.to(tl.int64) * k_row + kv * k_head, inside, HEADDIM, CHANNELS, UNIT)
    values = load_rows(v, wide * v_batch + key.to(tl.int64) * v_row + kv * v_head, inside, HEADDIM, CHANNELS, UNIT)
    q += (wide * q_batch + kv * GROUP * q_head) * UNIT
    grad_out += (wide * g_batch + kv * GROUP * g_head) * UNIT
    above = (wide * nkvheads + kv) * GROUP * qlen
    lse += above
    sums += above
    row_start += wide * qlen
    row_end += wide * qlen
    line = wide * ktiles + tile
    lists += line * qtiles
    partial = tl.load(counts + line * 2)
    full = tl.load(counts + line * 2 + 1)
    of_keys, of_values = tl.zeros((KEYS, CHANNELS), ACC), tl.zeros((KEYS, CHANNELS), ACC)
    for n in range(0, partial):
        of_keys, of_values = key_gradients(
            of_keys, of_values, keys, values, q, grad_out, lse, sums, q_row, q_head, g_row, g_head, tl.load(lists + n),
            key, row_start, row_end, rects, first, last, qlen, klen, tile * KEYS, tile * KEYS + KEYS - 1,
            True, GROUP, SCALE, HEADDIM, ROWS, CHANNELS, UNIT,
        )  # fmt: skip
    for n in range(0, full):
        of_keys, of_values = key_gradients(
            of_keys, of_values, keys, values, q, grad_out, lse, sums, q_row, q_head, g_row, g_head,
            tl.load(lists + (qtiles - 1 - n)),
            key, row_start, row_end, rects, first, last, qlen, klen, tile * KEYS, tile * KEYS + KEYS - 1,
            False, GROUP, SCALE, HEADDIM, ROWS, CHANNELS, UNIT,
        )  # fmt: skip
    channel = tl.arange(0, CHANNELS)[None, :]
    at = ((wide * klen + key) * nkvheads + kv)[:, None] * HEADDIM + channel
    written = inside[:, None] & (channel < HEADDIM)
    tl.store(grad_k + at, (of_keys * SCALE).to(grad_k.dtype.element_ty), written)
    tl.store(grad_v + at, of_values.to(grad_v.dtype.element_ty), written)


def row_sums_config(headdim: int) -> Config:
    """2048 elements of output a program."""
    channels = _triton.bucket(headdim, 16)
    return Config({"LINES": max(1, 2048 // channels), "CHANNELS": channels}, warps=8)


def query_config(architecture: str, packed: int, headdim: int, itemsize: int) -> Config:
    """Tiles that fit registers; on gfx942 and sm_100 eight warps spilled, and so did two stages of float32 on sm_80."""
    few = architecture.startswith("gfx") or (architecture == "sm_100" and itemsize == 2)
    stages = 3 if architecture == "sm_80" and itemsize > 2 else 2
    return Config(_blocks(architecture, packed, headdim, itemsize), warps=4 if few else 8, stages=stages)


def key_config(architecture: str, packed: int, headdim: int, itemsize: int) -> Config:
    """The same tiles, for the plan is shared; eight warps leave a thread of gfx942 256 registers, too few."""
    warps = 4 if architecture.startswith("gfx") else 8
    return Config(_blocks(architecture, packed, headdim, itemsize), warps=warps, stages=2)


def _blocks(architecture: str, packed: int, headdim: int, itemsize: int) -> dict[str, int]:
    channels = _triton.bucket(headdim, 16)
    rows, keys = 64, 32
    if itemsize > 2:  # the interpreter has registers enough, and dear programs
        rows, keys = (32, 32) if channels <= 64 or architecture == _triton.INTERPRETER else (16, 16)
    elif channels > 128:
        rows, keys = 32, 16
    return {"ROWS": _triton.bucket(packed, 16, rows), "KEYS": keys, "CHANNELS": channels}


def specimens(architecture: str) -> list[Specimen]:
    """What is compiled ahead of time: the head dimensions of decoders and vision towers."""
    types = dict.fromkeys(("row_start", "row_end", "rects", "counts", "lists"), "*i32") | {"before": "*i64"}
    types |= dict.fromkeys(("lse", "sums", "grad_lse"), "*fp32")
    types |= {name: "i64" for t in "qkvg" for name in (f"{t}_batch", f"{t}_row", f"{t}_head")}
    found = []
    for dtype, itemsize in (("bf16", 2), ("fp32", 4)):
        types |= dict.fromkeys(("q", "k", "v", "out", "grad_out", "grad_q", "grad_k", "grad_v"), f"*{dtype}")
        for headdim, group in ((64, 1), (72, 1), (96, 1), (128, 4)):
            constants = {"GROUP": group, "SCALE": headdim**-0.5, "HEADDIM": headdim, "UNIT": 8, "ACC": tl.float32}
            label = f"{dtype} headdim {headdim} group {group}"
            sizes = (architecture, 4096, headdim, itemsize)
            found.append(Specimen(label, query_kernel, dict(types), query_config(*sizes), constants))
            found.append(Specimen(label, key_kernel, dict(types), key_config(*sizes), constants))
        causal = constants | {"rects": None, "before": None}
        label = f"{dtype} headdim 128 no rectangles"
        found.append(Specimen(label, query_kernel, dict(types), query_config(*sizes), causal))
        found.append(Specimen(label, key_kernel, dict(types), key_config(*sizes), causal))
        found.append(
            Specimen(f"{dtype} headdim 128", row_sums_kernel, dict(types), row_sums_config(headdim), constants)
        )
    return found
