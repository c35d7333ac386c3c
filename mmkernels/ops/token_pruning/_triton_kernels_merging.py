"""Triton kernels of merge_tokens: means of what is merged, weighted with sizes, and their gradients.

What belongs to a slot is found by comparing: plans are short, and nothing is added with atomics.
"""

import triton
import triton.language as tl

from mmkernels import _triton
from mmkernels._triton import Config, Specimen


@triton.jit
def weights(sizes, at, there, ACC: tl.constexpr):
    """The sizes at the offsets `at`, 1 where there are none or not there."""
    if sizes is None:
        found = tl.full(at.shape, 1.0, ACC)
    else:
        found = tl.load(sizes + at, there, other=1.0)
    return found


@triton.jit(do_not_specialize=["tokens", "width", "merged"])
def merge_kernel(
    x,
    keep,
    assignment,
    source,
    sizes,
    out,
    totals,
    tokens,
    width,
    merged,
    dim,
    x_batch,
    x_row,
    ACC: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SOURCES: tl.constexpr,
):
    """out[b, o] = x_k + sum_a s_a (x_a - x_k) / totals[b, o] with k = keep[b, o] and a over what is merged into slot o.

    Grid: (batch * cdiv(width, SLOTS) * max(1, cdiv(dim, COLUMNS)),).  A program owns SLOTS slots by COLUMNS channels,
    adds in the plan's order, and copies the rows of slots that nothing is merged into.
    Bytes: x read once, out written once; the plan once for every SLOTS slots, from the second-level cache.
    """
    strips = tl.maximum(tl.cdiv(dim, COLUMNS), 1)
    blocks = tl.cdiv(width, SLOTS)
    strip = tl.program_id(0) % strips
    slot = tl.program_id(0) // strips % blocks * SLOTS + tl.arange(0, SLOTS)
    b = (tl.program_id(0) // strips // blocks).to(tl.int64)
    exists = slot < width
    column = strip * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = exists[:, None] & (column < dim)
    x += b * x_batch
    stays = tl.load(keep + b * width + slot, exists, other=0)
    value = tl.load(x + (stays * x_row)[:, None] + column, inside, other=0.0).to(ACC)
    total = weights(sizes, b * tokens + stays, exists, ACC)
    change = tl.zeros((SLOTS, COLUMNS), ACC)
    count = tl.zeros((SLOTS,), tl.int32)
    for first in range(0, merged, SOURCES):
        n = first + tl.arange(0, SOURCES)
        token = tl.load(source + b * merged + n, n < merged, other=0)
        into = tl.load(assignment + b * tokens + token, n < merged, other=-1)
        here = (into[None, :] == slot[:, None]).to(tl.int32)
        ordinal = tl.cumsum(here, 1)
        found = tl.sum(here, 1)
        for m in range(0, tl.max(found, 0)):
            some = exists & (found > m)
            which = (here > 0) & (ordinal == m + 1)
            member = tl.sum(tl.where(which, token[None, :], 0), 1)
            weight = tl.where(some, weights(sizes, b * tokens + member, some, ACC), 0.0)
            row = tl.load(x + (member * x_row)[:, None] + column, inside & some[:, None], other=0.0).to(ACC)
            change += tl.where(some[:, None], weight[:, None] * (row - value), 0.0)
            total += weight
        count += found
    value = tl.where((count > 0)[:, None], value + change / total[:, None], value)
    tl.store(out + (b * width + slot)[:, None] * dim + column, value.to(out.dtype.element_ty), inside)
    if strip == 0:
        tl.store(totals + b * width + slot, total, exists)


@triton.jit(do_not_specialize=["lines", "tokens", "width"])
def rows_gradient_kernel(
    grad,
    assignment,
    sizes,
    totals,
    out,
    lines,
    tokens,
    width,
    dim,
    ACC: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """out[b, t] = s_t / totals[b, o] grad[b, o] with o the slot of token t.

    Grid: (cdiv(lines, TOKENS) * cdiv(dim, COLUMNS),), lines = batch * tokens.  A program owns TOKENS tokens by COLUMNS
    channels; grad and out are dense.
    Bytes: grad read and out written once.
    """
    strips = tl.cdiv(dim, COLUMNS)
    line = (tl.program_id(0) // strips).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(0) % strips * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    exists = line < lines
    slot = line // tokens * width + tl.load(assignment + line, exists, other=0)
    share = weights(sizes, line, exists, ACC) / tl.load(totals + slot, exists, other=1.0)
    inside = exists[:, None] & (column < dim)
    rows = tl.load(grad + slot[:, None] * dim + column, inside, other=0.0).to(ACC)
    tl.store(out + line[:, None] * dim + column, (share[:, None] * rows).to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["tokens", "width", "merged"])
def products_kernel(
    grad,
    x,
    keep,
    assignment,
    source,
    products,
    tokens,
    width,
    merged,
    dim,
    x_batch,
    x_row,
    ACC: tl.constexpr,
    SOURCES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """products[b, n] = grad[b, o] . (x_a - x_k) for the n-th token a that is merged, its slot o and k = keep[b, o].

    Grid: (batch * cdiv(merged, SOURCES),).  A program owns SOURCES merged tokens of one sample.
    Bytes: three rows for each merged token.
    """
    strips = tl.cdiv(merged, SOURCES)
    b = (tl.program_id(0) // strips).to(tl.int64)
    n = tl.program_id(0) % strips * SOURCES + tl.arange(0, SOURCES)
    real = n < merged
    token = tl.load(source + b * merged + n, real, other=0)
    slot = tl.load(assignment + b * tokens + token, real, other=0)
    stays = tl.load(keep + b * width + slot, real, other=0)
    x += b * x_batch
    total = tl.zeros((SOURCES,), ACC)
    for start in range(0, dim, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        inside = real[:, None] & (column < dim)
        g = tl.load(grad + (b * width + slot)[:, None] * dim + column, inside, other=0.0).to(ACC)
        row = tl.load(x + (token * x_row)[:, None] + column, inside, other=0.0).to(ACC)
        base = tl.load(x + (stays * x_row)[:, None] + column, inside, other=0.0).to(ACC)
        total += tl.sum(g * (row - base), 1)
    tl.store(products + b * merged + n, total, real)


@triton.jit(do_not_specialize=["tokens", "width", "merged"])
def sizes_gradient_kernel(
    assignment,
    source,
    sizes,
    totals,
    grad_totals,
    products,
    out,
    tokens,
    width,
    merged,
    ACC: tl.constexpr,
    TOKENS: tl.constexpr,
    SOURCES: tl.constexpr,
):
    """out[b, t] = grad_totals[b, o] + (P_t - sum_a s_a P_a / totals[b, o]) / totals[b, o], P the products, 0 elsewhere.

    Grid: (batch * cdiv(tokens, TOKENS),).  A program owns TOKENS tokens of one sample; o is the slot of its token.
    Bytes: the plan and the products once for every TOKENS tokens, from the second-level cache; out once.
    """
    strips = tl.cdiv(tokens, TOKENS)
    b = (tl.program_id(0) // strips).to(tl.int64)
    mine = tl.program_id(0) % strips * TOKENS + tl.arange(0, TOKENS)
    exists = mine < tokens
    slot = tl.load(assignment + b * tokens + mine, exists, other=0)
    own, pull = tl.zeros((TOKENS,), ACC), tl.zeros((TOKENS,), ACC)
    for first in range(0, merged, SOURCES):
        n = first + tl.arange(0, SOURCES)
        token = tl.load(source + b * merged + n, n < merged, other=0)
        into = tl.load(assignment + b * tokens + token, n < merged, other=-1)
        product = tl.load(products + b * merged + n, n < merged, other=0.0)
        weighted = product * tl.load(sizes + b * tokens + token, n < merged, other=0.0)
        pull += tl.sum(tl.where(into[None, :] == slot[:, None], weighted[None, :], 0.0), 1)
        own += tl.sum(tl.where(token[None, :] == mine[:, None], product[None, :], 0.0), 1)
    total = tl.load(totals + b * width + slot, exists, other=1.0)
    change = (own - pull / total) / total
    tl.store(out + b * tokens + mine, tl.load(grad_totals + b * width + slot, exists, other=0.0) + change, exists)


def merge_config(width: int, merged: int, dim: int) -> Config:
    """2048 elements of output a program, and as many comparisons at a time at most."""
    columns = _triton.bucket(dim, 16, 1024)
    slots = _triton.bucket(width, 1, max(1, 2048 // columns))
    return Config({"SLOTS": slots, "COLUMNS": columns, "SOURCES": _triton.bucket(merged, 16, min(256, 2048 // slots))})


def rows_config(dim: int) -> Config:
    """4096 elements a program."""
    columns = _triton.bucket(dim, 16, 1024)
    return Config({"TOKENS": 4096 // columns, "COLUMNS": columns})


def products_config(merged: int, dim: int) -> Config:
    """2048 elements at a time of each of three matrices."""
    columns = _triton.bucket(dim, 16, 512)
    return Config({"SOURCES": _triton.bucket(merged, 1, 2048 // columns), "COLUMNS": columns})


def sizes_config(tokens: int, merged: int) -> Config:
    """32 tokens a program, compared with up to 64 merged ones at a time."""
    return Config({"TOKENS": _triton.bucket(tokens, 16, 32), "SOURCES": _triton.bucket(merged, 16, 64)})


def specimens(architecture: str) -> list[Specimen]:
    """What is compiled ahead of time: ToMe's rounds in a ViT-L, halving, without sizes."""
    types = dict.fromkeys(("keep", "assignment", "source"), "*i64") | dict.fromkeys(("x_batch", "x_row"), "i64")
    types |= dict.fromkeys(("sizes", "totals", "grad_totals", "products"), "*fp32")
    found, acc = [], {"ACC": tl.float32}
    for dtype, dim, merged in (("bf16", 1024, 23), ("fp32", 1024, 288)):
        inputs = types | dict.fromkeys(("x", "grad", "out"), f"*{dtype}")
        label = f"{dtype} dim {dim} merging {merged}"
        configs = (
            (merge_kernel, merge_config(577 - merged, merged, dim)),
            (rows_gradient_kernel, rows_config(dim)),
            (products_kernel, products_config(merged, dim)),
        )
        found += [Specimen(label, kernel, inputs, config, acc, aligned=("dim",)) for kernel, config in configs]
    inputs = types | dict.fromkeys(("x", "out"), "*bf16")
    found.append(Specimen("without sizes", merge_kernel, inputs, merge_config(554, 23, 1024), acc | {"sizes": None}))
    found.append(Specimen("577 tokens", sizes_gradient_kernel, types | {"out": "*fp32"}, sizes_config(577, 23), acc))
    return found
