"""Triton kernels of bipartite_soft_matching: the best link of each even place, the best links, and what remains.

Every order is found by counting what comes before, so that no kernel sorts and no program waits for another.
"""

import triton
import triton.language as tl

from mmkernels import _triton
from mmkernels._triton import Config, Specimen
from mmkernels._triton_math import dot, inverse_root


@triton.jit(do_not_specialize=["tokens"])
def lengths_kernel(
    metric,
    inverse,
    tokens,
    dim,
    m_batch,
    m_row,
    ACC: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """inverse[b, t] = 1 / max(|m_t|, 1e-12): a vector of zeros stays one.

    Grid: (batch * cdiv(tokens, TOKENS),).  A program owns TOKENS tokens of one sample.
    Bytes: metric read once, inverse written once.
    """
    strips = tl.cdiv(tokens, TOKENS)
    b = (tl.program_id(0) // strips).to(tl.int64)
    token = tl.program_id(0) % strips * TOKENS + tl.arange(0, TOKENS)
    exists = token < tokens
    at = metric + b * m_batch + (token.to(tl.int64) * m_row)[:, None]
    squares = tl.zeros((TOKENS,), ACC)
    for start in range(0, dim, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)[None, :]
        x = tl.load(at + channel, exists[:, None] & (channel < dim), other=0.0).to(ACC)
        squares += tl.sum(x * x, 1)
    tl.store(inverse + b * tokens + token, inverse_root(tl.maximum(squares, 1e-24)), exists)


@triton.jit(do_not_specialize=["tokens", "evens", "odds", "rows", "columns"])
def links_kernel(
    metric,
    inverse,
    cosine,
    link,
    tokens,
    dim,
    evens,
    odds,
    rows,
    columns,
    m_batch,
    m_row,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """cosine[b, i] = the largest of m_a . m_b / |m_a| |m_b|, a = 2 (i + evens), over b = 2 (j + odds) + 1; link, its j.

    Grid: (batch * cdiv(rows, ROWS),).  A program owns ROWS even places of one sample and passes the odd ones by; of
    equal cosines the lowest j stays.  A cosine is the same sum in the same order wherever it stands in a tile.
    Bytes: half the metric for every ROWS even places (from the second-level cache but for the first time), and the even
    half as often as there are tiles of odd places; 8 bytes written an even place.
    """
    strips = tl.cdiv(rows, ROWS)
    b = (tl.program_id(0) // strips).to(tl.int64)
    i = tl.program_id(0) % strips * ROWS + tl.arange(0, ROWS)
    exists = i < rows
    even = 2 * (i + evens)
    metric += b * m_batch
    inverse += b * tokens
    scale = tl.load(inverse + even, exists, other=0.0)
    best = tl.full((ROWS,), float("-inf"), ACC)
    place = tl.zeros((ROWS,), tl.int32)
    for first in range(0, columns, COLUMNS):
        j = first + tl.arange(0, COLUMNS)
        inside = j < columns
        odd = 2 * (j + odds) + 1
        products = tl.zeros((ROWS, COLUMNS), ACC)
        for start in range(0, dim, CHANNELS):
            channel = start + tl.arange(0, CHANNELS)[None, :]
            there = channel < dim
            left = tl.load(metric + (even.to(tl.int64) * m_row)[:, None] + channel, exists[:, None] & there, other=0.0)
            right = tl.load(metric + (odd.to(tl.int64) * m_row)[:, None] + channel, inside[:, None] & there, other=0.0)
            products = dot(left, tl.trans(right), products)
        cosines = products * scale[:, None] * tl.load(inverse + odd, inside, other=0.0)[None, :]
        cosines = tl.where(inside[None, :], cosines, float("-inf"))
        top = tl.max(cosines, 1)
        at = tl.min(tl.where(cosines == top[:, None], j[None, :], 2147483647), 1)
        better = top > best  # nor does a NaN, whose place is nowhere, ever get here
        place = tl.where(better, at, place)
        best = tl.where(better, top, best)
    tl.store(cosine + b * rows + i, best, exists)
    tl.store(link + b * rows + i, place, exists)


@triton.jit(do_not_specialize=["rows", "merged", "evens"])
def ranks_kernel(
    cosine,
    rank,
    source,
    similarity,
    rows,
    merged,
    evens,
    ROWS: tl.constexpr,
    OTHERS: tl.constexpr,
):
    """rank[b, i] = how many links are better than that of even place i, or as good and before it; the first are listed.

    Grid: (batch * cdiv(rows, ROWS),).  A program owns ROWS even places of one sample and counts all of them.
    Bytes: cosine once for every ROWS places, from the first-level cache; rank once; 12 bytes a link that is made.
    """
    strips = tl.cdiv(rows, ROWS)
    b = (tl.program_id(0) // strips).to(tl.int64)
    i = tl.program_id(0) % strips * ROWS + tl.arange(0, ROWS)
    exists = i < rows
    mine = tl.load(cosine + b * rows + i, exists, other=float("-inf"))
    ahead = tl.zeros((ROWS,), tl.int32)
    for first in range(0, rows, OTHERS):
        j = first + tl.arange(0, OTHERS)
        other = tl.load(cosine + b * rows + j, j < rows, other=float("-inf"))[None, :]
        before = (other > mine[:, None]) | ((other == mine[:, None]) & (j[None, :] < i[:, None]))
        ahead += tl.sum(before.to(tl.int32), 1)
    tl.store(rank + b * rows + i, ahead, exists)
    goes = exists & (ahead < merged)
    tl.store(source + b * merged + ahead, (2 * (i + evens)).to(tl.int64), goes)
    tl.store(similarity + b * merged + ahead, mine, goes)


@triton.jit(do_not_specialize=["tokens", "rows", "merged", "evens", "odds"])
def plan_kernel(
    link,
    rank,
    keep,
    assignment,
    tokens,
    rows,
    merged,
    evens,
    odds,
    SETS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """assignment[b, t] = the slot of token t, or of what it is merged into; keep[b, slot] = the token that stays there.

    Grid: (batch * cdiv(tokens, TOKENS),).  A program owns TOKENS tokens of one sample.  A slot is a token's place less
    what is merged away before it, which every program counts for itself.
    Bytes: rank once for every TOKENS tokens, from the first-level cache; 8 bytes a token and 8 a slot written.
    """
    strips = tl.cdiv(tokens, TOKENS)
    b = (tl.program_id(0) // strips).to(tl.int64)
    token = tl.program_id(0) % strips * TOKENS + tl.arange(0, TOKENS)
    exists = token < tokens
    i = token // 2 - evens
    even = exists & (token % 2 == 0) & (i >= 0)
    goes = even & (tl.load(rank + b * rows + i, even, other=0) < merged)
    into = 2 * (tl.load(link + b * rows + i, goes, other=0) + odds) + 1
    stays = tl.where(goes, into, token)
    before = tl.zeros((TOKENS,), tl.int32)
    for first in range(0, rows, ROWS):
        j = first + tl.arange(0, ROWS)
        leaves = tl.load(rank + b * rows + j, j < rows, other=2147483647) < merged
        before += tl.sum((leaves[None, :] & (2 * (j + evens)[None, :] < stays[:, None])).to(tl.int32), 1)
    slot = stays - before
    if SETS:  # even places, then odd ones
        slot = tl.where(stays % 2 == 0, stays // 2 - before, tl.cdiv(tokens, 2) - merged + stays // 2)
    tl.store(assignment + b * tokens + token, slot.to(tl.int64), exists)
    tl.store(keep + b * (tokens - merged) + slot, token.to(tl.int64), exists & (goes == 0))


def lengths_config(dim: int) -> Config:
    """4096 elements at a time."""
    channels = _triton.bucket(dim, 16, 256)
    return Config({"TOKENS": 4096 // channels, "CHANNELS": channels})


def links_config(rows: int, columns: int, dim: int, itemsize: int) -> Config:
    """Tiles of up to 64 by 64 places (float32: 32 by 32); with four warps ptxas spilled the larger ones."""
    most = 32 if itemsize > 2 else 64
    blocks = {
        "ROWS": _triton.bucket(rows, 16, most),
        "COLUMNS": _triton.bucket(columns, 16, most),
        "CHANNELS": _triton.bucket(dim, 16, 64),
    }
    return Config(blocks, warps=8 if itemsize <= 2 else 4, stages=2 if itemsize <= 2 else 1)


def counting_config(places: int, name: str, others: str) -> Config:
    """32 places a program, compared with 128 at a time: 32 comparisons a thread."""
    return Config({name: _triton.bucket(places, 16, 32), others: _triton.bucket(places, 16, 128)})


def specimens(architecture: str) -> list[Specimen]:
    """What is compiled ahead of time: a tower's keys, tokens as their own metric."""
    types = dict.fromkeys(("inverse", "cosine", "similarity"), "*fp32") | dict.fromkeys(("link", "rank"), "*i32")
    types |= dict.fromkeys(("source", "keep", "assignment"), "*i64") | dict.fromkeys(("m_batch", "m_row"), "i64")
    found, acc = [], {"ACC": tl.float32}
    for dtype, itemsize, dim in (("bf16", 2, 64), ("fp32", 4, 64), ("bf16", 2, 1024)):
        inputs = types | {"metric": f"*{dtype}"}
        config = links_config(288, 288, dim, itemsize)
        found.append(Specimen(f"{dtype} dim {dim}", links_kernel, inputs, config, acc, aligned=("dim",)))
    inputs = types | {"metric": "*bf16"}
    found.append(Specimen("bf16 dim 64", lengths_kernel, inputs, lengths_config(64), acc))
    found.append(Specimen("289 places", ranks_kernel, types, counting_config(289, "ROWS", "OTHERS")))
    config = counting_config(577, "TOKENS", "ROWS")
    found.append(Specimen("577 tokens in sets", plan_kernel, types, config, {"SETS": True}))
    return found
