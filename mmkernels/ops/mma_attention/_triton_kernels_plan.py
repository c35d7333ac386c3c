"""Triton kernels that find the live tiles of an MMAMask, and the pair-by-pair mask inside a tile that needs one.

Query rows are packed: packed row r of a key-value head is query row r // GROUP of query head r % GROUP of its group, so
that one tile of keys serves all heads that share it.  A tile is ROWS packed rows by KEYS keys.
"""

import triton
import triton.language as tl

from mmkernels import _triton
from mmkernels._triton import Config, Specimen

DEAD, PARTIAL, FULL = 0, 1, 2


@triton.jit
def rectangle(rects, n, qlen, klen):
    """Rows and keys of a rectangle, cut to the call: q0, q1, k0, k1."""
    at = rects + tl.cast(n, tl.int64) * 5
    q1, k1 = tl.minimum(tl.load(at + 2), qlen), tl.minimum(tl.load(at + 4), klen)
    return tl.load(at + 1), q1, tl.load(at + 3), k1


@triton.jit
def kept(row, key, begin, end, rects, first, last, qlen, klen, row_low, row_high, key_low, key_high):
    """keep(row, key) of a tile; row, begin and end vary along one axis, key along the other.

    `end` is at most klen, and 0 for rows that are none; rects first..last-1 are the batch element's; the tile is within
    rows row_low..row_high and keys key_low..key_high.
    """
    keep = (key >= begin) & (key < end)
    if rects is not None:
        for n in range(first, last):
            q0, q1, k0, k1 = rectangle(rects, n, qlen, klen)
            if (q0 <= row_high) & (q1 > row_low) & (k0 <= key_high) & (k1 > key_low):
                keep = keep | (((row >= q0) & (row < q1)) & ((key >= k0) & (key < k1)))
    return keep


@triton.jit
def listed_rects(before, b):
    """The range of batch element b's rectangles; empty where the mask has none."""
    first, last = b * 0, b * 0
    if before is not None:
        first, last = tl.load(before + b).to(tl.int32), tl.load(before + b + 1).to(tl.int32)
    return first, last


@triton.jit(do_not_specialize=["qlen", "klen", "qtiles", "ktiles"])
def classify_kernel(
    row_start,
    row_end,
    rects,
    before,
    classes,
    qlen,
    klen,
    qtiles,
    ktiles,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    TILES: tl.constexpr,
    LINES: tl.constexpr,
):
    """Say of every tile whether it keeps nothing (0), something (1) or everything (2).

    Grid: (batch * qtiles,).  A program owns one tile of query rows and walks the tiles of keys, TILES at a time; LINES
    is at least the number of query rows of a tile.  Every pair of a full tile is kept, of rows that exist.
    Bytes: row_start, row_end and the rectangles of the batch element read once, one byte a tile written.
    """
    b = tl.program_id(0) // qtiles
    tile = tl.program_id(0) % qtiles
    first, last = listed_rects(before, b)
    low = tile * ROWS // GROUP
    high = tl.minimum((tile * ROWS + ROWS - 1) // GROUP, qlen - 1)
    row = low + tl.arange(0, LINES)
    exists = row <= high
    at = b.to(tl.int64) * qlen + row
    begin = tl.load(row_start + at, exists, other=0)[:, None]
    end = tl.minimum(tl.load(row_end + at, exists, other=0), klen)[:, None]
    absent = (exists == 0)[:, None]
    out = classes + tl.program_id(0).to(tl.int64) * ktiles
    for start in range(0, ktiles, TILES):
        other = start + tl.arange(0, TILES)
        key = other * KEYS
        meets = (begin < end) & (begin < (key + KEYS)[None, :]) & (end > key[None, :])
        holds = ((begin <= key[None, :]) & (end >= (key + KEYS)[None, :])) | absent
        live = tl.max(meets.to(tl.int32), 0)
        full = tl.min(holds.to(tl.int32), 0)
        if rects is not None:
            for n in range(first, last):
                q0, q1, k0, k1 = rectangle(rects, n, qlen, klen)
                hit = (key < k1) & (key + KEYS > k0) & (key * 0 + k1 > k0)
                hit = hit & (key * 0 + q1 > low) & (key * 0 + q0 <= high) & (key * 0 + q1 > q0)
                whole = hit & (key >= k0) & (key + KEYS <= k1) & (key * 0 + q0 <= low) & (key * 0 + q1 > high)
                live = tl.maximum(live, hit.to(tl.int32))
                full = tl.maximum(full, whole.to(tl.int32))
        tl.store(out + other, (live + live * full).to(tl.int8), other < ktiles)


@triton.jit(do_not_specialize=["tiles", "others"])
def list_kernel(classes, counts, lists, tiles, others, c_batch, c_tile, c_other, TILES: tl.constexpr):
    """Turn the classes of one axis' tiles into the tiles of the other axis to visit.

    Grid: (batch * tiles,).  A program owns one line of lists (batch, tiles, others) int32: the partial tiles from the
    front, the full ones from the back, and counts (batch, tiles, 2) of both.
    Bytes: one byte a tile read, four a live tile written.
    """
    b = (tl.program_id(0) // tiles).to(tl.int64)
    tile = (tl.program_id(0) % tiles).to(tl.int64)
    classes += b * c_batch + tile * c_tile
    line = tl.program_id(0).to(tl.int64)
    lists += line * others
    partial, full = tl.program_id(0) * 0, tl.program_id(0) * 0
    for start in range(0, others, TILES):
        other = start + tl.arange(0, TILES)
        found = tl.load(classes + other.to(tl.int64) * c_other, other < others, other=0).to(tl.int32)
        some, all_ = (found == 1).to(tl.int32), (found == 2).to(tl.int32)
        tl.store(lists + partial + tl.cumsum(some, 0) - 1, other, found == 1)
        tl.store(lists + others - full - tl.cumsum(all_, 0), other, found == 2)
        partial += tl.sum(some, 0)
        full += tl.sum(all_, 0)
    tl.store(counts + line * 2, partial)
    tl.store(counts + line * 2 + 1, full)


def classify_config(rows: int, keys: int, group: int) -> Config:
    """128 tiles of keys at a time, fewer when a tile has many rows: 4096 comparisons."""
    lines = _triton.bucket((rows + group - 2) // group + 1, 2)
    return Config({"ROWS": rows, "KEYS": keys, "LINES": lines, "TILES": max(16, min(128, 4096 // lines))})


def list_config() -> Config:
    """One warp's worth of tiles, a few each."""
    return Config({"TILES": 128}, warps=1)


def specimens(architecture: str) -> list[Specimen]:
    """What is compiled ahead of time."""
    types = {"row_start": "*i32", "row_end": "*i32", "rects": "*i32", "before": "*i64", "classes": "*i8"}
    types |= {"counts": "*i32", "lists": "*i32", "c_batch": "i64", "c_tile": "i64", "c_other": "i64"}
    found = [Specimen("lists", list_kernel, types, list_config())]
    for group in (1, 4, 7):
        found.append(
            Specimen(f"group {group}", classify_kernel, types, classify_config(128, 64, group), {"GROUP": group})
        )
    plain = {"GROUP": 1, "rects": None, "before": None}
    found.append(Specimen("no rectangles", classify_kernel, types, classify_config(128, 64, 1), plain))
    return found
