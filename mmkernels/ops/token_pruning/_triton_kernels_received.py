"""Triton kernels of attention_column_scores: the mean of the attention map's columns, tile by tile, without the map."""

import triton
import triton.language as tl

from mmkernels import _triton
from mmkernels._triton import Config, Specimen
from mmkernels._triton_math import dot

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def masked(mask, b, at, size):
    """Whether the places `at` of sample b exist, and the (batch, size) mask, if there is one, has them."""
    there = at < size
    if mask is not None:
        there = there & (tl.load(mask + b * size + at, there, other=0) != 0)
    return there


@triton.jit
def load_rows(base, at, there, HEADDIM: tl.constexpr, CHANNELS: tl.constexpr):
    """Rows of HEADDIM channels at the offsets `at`, zeros where not there: what a mask hides is not even read."""
    channel = tl.arange(0, CHANNELS)[None, :]
    return tl.load(base + at[:, None] + channel, there[:, None] & (channel < HEADDIM), other=0.0)


@triton.jit(do_not_specialize=["rows", "seqlen"])
def lse_kernel(
    q,
    k,
    query_mask,
    key_mask,
    lse,
    rows,
    seqlen,
    nheads,
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
    SCALE: tl.constexpr,
    HEADDIM: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """lse[b, h, r] = log of the sum of e^(SCALE q_rh . k_j) over the keys j that row r sees; -inf where it sees none.

    Grid: (batch * nheads * cdiv(rows, ROWS),).  A program owns ROWS rows of one query head and passes all keys by, none
    where no row of it counts.
    Bytes: q once, k once for every ROWS rows (from the second-level cache but for the first time), lse once.
    """
    tiles = tl.cdiv(rows, ROWS)
    tile = tl.program_id(0) % tiles
    line = (tl.program_id(0) // tiles).to(tl.int64)
    b, head = line // nheads, line % nheads
    row = tile * ROWS + tl.arange(0, ROWS)
    counts = masked(query_mask, b, row, rows)
    queries = load_rows(q, b * q_batch + row.to(tl.int64) * q_row + head * q_head, counts, HEADDIM, CHANNELS)
    k += b * k_batch + head // GROUP * k_head
    largest = tl.full((ROWS,), float("-inf"), ACC)
    sums = tl.zeros((ROWS,), ACC)
    end = seqlen
    if CAUSAL:
        end = tl.minimum(seqlen, tile * ROWS + ROWS + seqlen - rows)
    end = tl.where(tl.max(counts.to(tl.int32), 0) > 0, end, 0)
    for start in range(0, end, KEYS):
        key = start + tl.arange(0, KEYS)
        seen = masked(key_mask, b, key, seqlen)
        keys = load_rows(k, key.to(tl.int64) * k_row, seen, HEADDIM, CHANNELS)
        keep = seen[None, :]
        if CAUSAL:
            keep = keep & (key[None, :] <= row[:, None] + (seqlen - rows))
        logits = tl.where(keep, dot(queries, tl.trans(keys)) * (SCALE * LOG2E), float("-inf"))
        largest_now = tl.maximum(largest, tl.max(logits, 1))
        # Rows that have seen nothing so far: exp2(-inf - 0) = 0 instead of exp2(-inf + inf).
        shift = tl.where(largest_now == float("-inf"), 0.0, largest_now)
        sums = sums * tl.exp2(largest - shift) + tl.sum(tl.exp2(logits - shift[:, None]), 1)
        largest = largest_now
    found = sums != 0  # NaN too
    norm = (largest + tl.log2(tl.where(found, sums, 1.0))) * LN2
    tl.store(lse + line * rows + row, tl.where(found, norm, float("-inf")), row < rows)


@triton.jit(do_not_specialize=["rows", "seqlen"])
def columns_kernel(
    q,
    k,
    query_mask,
    key_mask,
    lse,
    sums,
    rows,
    seqlen,
    nheads,
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
    SCALE: tl.constexpr,
    HEADDIM: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """sums[b, h, j] = sum over the rows r that count and see key j of e^(SCALE q_rh . k_j - lse[b, h, r]).

    Grid: (batch * nheads * cdiv(seqlen, KEYS),).  A program owns KEYS keys of one query head and passes the rows by in
    order; tiles of rows of which none counts are left out.  lse is dense.
    Bytes: k once for every query head, q and lse once for every KEYS keys, sums once.
    """
    tiles = tl.cdiv(seqlen, KEYS)
    tile = tl.program_id(0) % tiles
    line = (tl.program_id(0) // tiles).to(tl.int64)
    b, head = line // nheads, line % nheads
    key = tile * KEYS + tl.arange(0, KEYS)
    seen = masked(key_mask, b, key, seqlen)
    at = b * k_batch + head // GROUP * k_head + key.to(tl.int64) * k_row
    keys = tl.trans(load_rows(k, at, seen, HEADDIM, CHANNELS))
    q += b * q_batch + head * q_head
    total = tl.zeros((KEYS,), ACC)
    begin = rows * 0
    if CAUSAL:  # the first row that sees the first key
        begin = tl.maximum(0, tile * KEYS + rows - seqlen) // ROWS * ROWS
    for start in range(begin, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        counts = masked(query_mask, b, row, rows)
        if tl.max(counts.to(tl.int32), 0) > 0:
            queries = load_rows(q, row.to(tl.int64) * q_row, counts, HEADDIM, CHANNELS)
            norm = tl.load(lse + line * rows + row, counts, other=0.0).to(ACC)
            norm = tl.where(norm == float("-inf"), 0.0, norm)  # of a row that sees no key
            p = tl.exp2(dot(queries, keys) * (SCALE * LOG2E) - (norm * LOG2E)[:, None])
            keep = counts[:, None] & seen[None, :]
            if CAUSAL:
                keep = keep & (key[None, :] <= row[:, None] + (seqlen - rows))
            total += tl.sum(tl.where(keep, p, 0.0), 0)
    tl.store(sums + line * seqlen + key, total, key < seqlen)


@triton.jit(do_not_specialize=["rows", "seqlen", "prefix"])
def heads_kernel(sums, counts, scores, rows, seqlen, nheads, prefix, ACC: tl.constexpr, TOKENS: tl.constexpr):
    """scores[b, j - prefix] = the mean of sums[b, h, j] over heads, in order, and rows: counts[b] of them, else all.

    Grid: (batch * cdiv(seqlen - prefix, TOKENS),).  A program owns TOKENS tokens of one sample.
    Bytes: sums read once, scores written once.
    """
    strips = tl.cdiv(seqlen - prefix, TOKENS)
    b = (tl.program_id(0) // strips).to(tl.int64)
    token = tl.program_id(0) % strips * TOKENS + tl.arange(0, TOKENS)
    inside = token < seqlen - prefix
    total = tl.zeros((TOKENS,), ACC)
    for head in range(0, nheads):
        total += tl.load(sums + (b * nheads + head) * seqlen + prefix + token, inside, other=0.0)
    chosen = b * 0 + rows
    if counts is not None:
        chosen = tl.load(counts + b)
    terms = (tl.maximum(chosen, 1) * nheads).to(ACC)
    tl.store(scores + b * (seqlen - prefix) + token, total / terms, inside)


def tiles_config(rows: int, seqlen: int, headdim: int, itemsize: int) -> Config:
    """Tiles of up to 64 rows by 64 keys (float32 and long heads: 32), of both kernels that make products."""
    channels = _triton.bucket(headdim, 16)
    most = 32 if itemsize > 2 or channels > 128 else 64
    blocks = {"ROWS": _triton.bucket(rows, 16, most), "KEYS": _triton.bucket(seqlen, 16, most), "CHANNELS": channels}
    return Config(blocks, warps=8 if channels > 64 else 4, stages=2 if itemsize <= 2 else 1)


def heads_config() -> Config:
    """128 tokens a program: loads of one warp's width for every head, many in flight."""
    return Config({"TOKENS": 128})


def specimens(architecture: str) -> list[Specimen]:
    """What is compiled ahead of time: vision towers, decoders with grouped heads, every mask."""
    types = dict.fromkeys(("lse", "sums", "scores"), "*fp32") | dict.fromkeys(("query_mask", "key_mask"), "*u8")
    types |= {"counts": "*i64"} | {f"{t}_{axis}": "i64" for t in "qk" for axis in ("batch", "row", "head")}
    found = []
    for dtype, headdim, group in (("bf16", 64, 1), ("fp32", 64, 1), ("bf16", 128, 4)):
        masks = {} if group > 1 else {"query_mask": None, "key_mask": None}
        constants = {"GROUP": group, "CAUSAL": group > 1, "SCALE": headdim**-0.5, "HEADDIM": headdim, "ACC": tl.float32}
        inputs = types | dict.fromkeys(("q", "k"), f"*{dtype}")
        config = tiles_config(577, 577, headdim, 4 if dtype == "fp32" else 2)
        label = f"{dtype} headdim {headdim} group {group}" + ("" if masks else " causal masked")
        for kernel in (lse_kernel, columns_kernel):
            found.append(Specimen(label, kernel, inputs, config, constants | masks))
    constants = {"ACC": tl.float32, "counts": None}
    found.append(Specimen("577 keys", heads_kernel, types, heads_config(), constants))
    return found
