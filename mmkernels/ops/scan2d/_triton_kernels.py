"""Triton kernels of merged_gated_rms_norm, forward and backward; the formulas are (4) to (6) of README.md.

A line is one group of one token: `size` consecutive channels that are normalised together, in each of the directions.
The scan and the convolution of a grid are the one-dimensional kernels, which take an order of tokens.
"""

import triton
import triton.language as tl

from mmkernels import _triton
from mmkernels._triton import Config, Specimen
from mmkernels._triton_math import inverse_root, silu, silu_derivative

# Elements of a tile.  The backward keeps more tiles of them in registers.  No specimen spills.
_TILE = 2048
_LONGEST = 8192  # channels of a line that are kept in registers; longer lines are read twice,
_LONG_STEP = 2048  # in steps of this


@triton.jit
def _load(pointer, at, inside, ACC: tl.constexpr):
    return tl.load(pointer + at, inside, other=0.0).to(ACC)


@triton.jit
def _gate(z, at, inside, ACC: tl.constexpr):
    """silu(z), or 1 where there is no gate."""
    if z is not None:
        gate = silu(_load(z, at, inside, ACC))
    else:
        gate = tl.where(inside, 1.0, 0.0).to(ACC)
    return gate


@triton.jit
def _column_of(table, k, lane):
    """Column k of a table (lines, directions) in registers."""
    return tl.sum(tl.where(lane == k, table, 0.0), 1)


@triton.jit(do_not_specialize=["lines", "seqlen"])
def forward_kernel(
    y,
    z,
    weight,
    out,
    rstd,
    lines,
    seqlen,
    groups,
    size,
    directions,
    y_batch,
    y_direction,
    y_token,
    y_channel,
    z_batch,
    z_token,
    z_channel,
    w_group,
    EPS: tl.constexpr,
    SCALE: tl.constexpr,
    ACC: tl.constexpr,
    WHOLE: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK: tl.constexpr,
    DIRECTIONS: tl.constexpr,
):
    """out = SCALE * sum over directions of norm(y silu(z)) w, and 1 / rms of every line of every direction.

    Grid: (cdiv(lines, LINES),).  A program owns LINES lines in all directions and adds these first to last.
    WHOLE lines fit a tile: y and z are read once, out and rstd (batch, directions, seqlen, groups) written once.
    Longer lines are read twice, a step of them at a time.
    """
    line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    row, group = line // groups, line % groups
    batch, token = row // seqlen, row % seqlen
    known = (line < lines)[:, None]
    y_line = (batch * y_batch + token * y_token + group * size * y_channel)[:, None]
    z_line = (batch * z_batch + token * z_token + group * size * z_channel)[:, None]
    out_line, w_line = (line * size)[:, None], (group * w_group)[:, None]
    column = tl.arange(0, BLOCK).to(tl.int64)[None, :]
    lane = tl.arange(0, DIRECTIONS)[None, :]
    roots = tl.zeros((LINES, DIRECTIONS), ACC)
    if WHOLE:
        inside = known & (column < size)
        gate = _gate(z, z_line + column * z_channel, inside, ACC)
        total = tl.zeros((LINES, BLOCK), ACC)
        at = y_line + column * y_channel
        for k in range(0, directions):
            v = _load(y, at, inside, ACC) * gate
            r = inverse_root(tl.sum(v * v, 1) / size + EPS)
            total += v * r[:, None]
            roots = tl.where(lane == k, r[:, None], roots)
            at += y_direction
        total *= _load(weight, w_line + column, inside, ACC) * SCALE
        tl.store(out + out_line + column, total.to(out.dtype.element_ty), inside)
    else:
        walked = y_line
        for k in range(0, directions):
            squares = tl.zeros((LINES,), ACC)
            for start in range(0, size, BLOCK):
                c = column + start
                inside = known & (c < size)
                v = _load(y, walked + c * y_channel, inside, ACC) * _gate(z, z_line + c * z_channel, inside, ACC)
                squares += tl.sum(v * v, 1)
            roots = tl.where(lane == k, inverse_root(squares / size + EPS)[:, None], roots)
            walked += y_direction
        for start in range(0, size, BLOCK):
            c = column + start
            inside = known & (c < size)
            total = tl.zeros((LINES, BLOCK), ACC)
            at = y_line + c * y_channel
            for k in range(0, directions):
                total += _load(y, at, inside, ACC) * _column_of(roots, k, lane)[:, None]
                at += y_direction
            total *= _gate(z, z_line + c * z_channel, inside, ACC) * SCALE
            total *= _load(weight, w_line + c, inside, ACC)
            tl.store(out + out_line + c, total.to(out.dtype.element_ty), inside)
    if rstd is not None:
        at = ((batch * directions)[:, None] + lane) * seqlen + token[:, None]
        tl.store(rstd + at * groups + group[:, None], roots, known & (lane < directions))


@triton.jit
def _means(y, z, y_at, z_at, y_direction, of_n, roots, means, lane, directions, size, inside, ACC: tl.constexpr):
    """means plus mean(n * of_n) of the channels at hand, n what each direction has normalised."""
    gate = _gate(z, z_at, inside, ACC)
    for k in range(0, directions):
        n = _load(y, y_at, inside, ACC) * gate * _column_of(roots, k, lane)[:, None]
        means += tl.where(lane == k, (tl.sum(n * of_n, 1) / size)[:, None], 0.0)
        y_at += y_direction
    return means


@triton.jit
def _gradients(
    y,
    z,
    grad_y,
    grad_z,
    y_at,
    z_at,
    to,
    z_to,
    y_direction,
    to_direction,
    of_n,
    roots,
    means,
    lane,
    directions,
    size,
    inside,
    ACC: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Store the gradients of y and z of the channels at hand; the sum over directions of what was normalised.

    WHOLE computes the means on the way, since a line is at hand; else they are given.
    """
    gate = _gate(z, z_at, inside, ACC)
    of_gate = tl.zeros(inside.shape, ACC)
    total = tl.zeros(inside.shape, ACC)
    for k in range(0, directions):
        value = _load(y, y_at, inside, ACC)
        r = _column_of(roots, k, lane)
        n = value * gate * r[:, None]
        if WHOLE:
            mean = tl.sum(n * of_n, 1) / size
        else:
            mean = _column_of(means, k, lane)
        of_v = (of_n - n * mean[:, None]) * r[:, None]
        tl.store(grad_y + to, (of_v * gate).to(grad_y.dtype.element_ty), inside)
        of_gate += of_v * value
        total += n
        y_at += y_direction
        to += to_direction
    if z is not None:
        of_gate *= silu_derivative(_load(z, z_at, inside, ACC))
        tl.store(grad_z + z_to, of_gate.to(grad_z.dtype.element_ty), inside)
    return total


@triton.jit(do_not_specialize=["rows", "seqlen", "steps"])
def backward_kernel(
    grad_out,
    y,
    z,
    weight,
    rstd,
    grad_y,
    grad_z,
    partial_weight,
    rows,
    seqlen,
    groups,
    size,
    steps,
    directions,
    g_batch,
    g_token,
    g_channel,
    y_batch,
    y_direction,
    y_token,
    y_channel,
    z_batch,
    z_token,
    z_channel,
    w_group,
    SCALE: tl.constexpr,
    ACC: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DIRECTIONS: tl.constexpr,
):
    """Gradients of y in every direction and of z, and every program's share of the weight's.

    Grid: (strips * groups,).  A program owns one group of steps * ROWS consecutive tokens, so that it alone writes its
    row of the partial sums (strips, groups, size): no atomics.  The gradient of z adds the directions first to last.
    Bytes: grad_out, y, z read once and grad_y, grad_z written once; lines that do not fit a tile (not WHOLE) are read
    twice, the second time from a cache, and have steps = 1.
    """
    strip, group = (tl.program_id(0) // groups).to(tl.int64), (tl.program_id(0) % groups).to(tl.int64)
    column = tl.arange(0, BLOCK).to(tl.int64)[None, :]
    lane = tl.arange(0, DIRECTIONS)[None, :]
    first = group * size
    partial_at = (strip * groups + group) * size + column
    to_direction = seqlen.to(tl.int64) * groups * size
    of_weight = tl.zeros((ROWS, BLOCK), ACC)
    for step in range(0, steps):
        row = (strip * steps + step) * ROWS + tl.arange(0, ROWS)
        known = (row < rows)[:, None]
        batch, token = (row // seqlen)[:, None], (row % seqlen)[:, None]
        g_line = batch * g_batch + token * g_token + first * g_channel
        y_line = batch * y_batch + token * y_token + first * y_channel
        z_line = batch * z_batch + token * z_token + first * z_channel
        z_to = row[:, None] * groups * size + first
        to = batch * directions * to_direction + token * groups * size + first
        at = (batch * directions + lane) * seqlen + token
        roots = tl.load(rstd + at * groups + group, known & (lane < directions), other=0.0)
        means = tl.zeros((ROWS, DIRECTIONS), ACC)
        if WHOLE:
            inside = known & (column < size)
            w = _load(weight, group * w_group + column, column < size, ACC)
            g = _load(grad_out, g_line + column * g_channel, inside, ACC) * SCALE
            total = _gradients(
                y, z, grad_y, grad_z, y_line + column * y_channel, z_line + column * z_channel, to + column,
                z_to + column, y_direction, to_direction, g * w,
                roots, means, lane, directions, size, inside, ACC, WHOLE,
            )  # fmt: skip
            of_weight += g * total
        else:
            for start in range(0, size, BLOCK):
                c = column + start
                inside = known & (c < size)
                w = _load(weight, group * w_group + c, c < size, ACC)
                g = _load(grad_out, g_line + c * g_channel, inside, ACC) * SCALE
                means = _means(
                    y, z, y_line + c * y_channel, z_line + c * z_channel, y_direction,
                    g * w, roots, means, lane, directions, size, inside, ACC,
                )  # fmt: skip
            for start in range(0, size, BLOCK):
                c = column + start
                inside = known & (c < size)
                w = _load(weight, group * w_group + c, c < size, ACC)
                g = _load(grad_out, g_line + c * g_channel, inside, ACC) * SCALE
                total = _gradients(
                    y, z, grad_y, grad_z, y_line + c * y_channel, z_line + c * z_channel, to + c, z_to + c,
                    y_direction, to_direction, g * w, roots, means, lane, directions, size, inside, ACC, WHOLE,
                )  # fmt: skip
                if partial_weight is not None:
                    tl.store(partial_weight + partial_at + start, tl.sum(g * total, 0)[None, :], c < size)
    if WHOLE:
        if partial_weight is not None:
            tl.store(partial_weight + partial_at, tl.sum(of_weight, 0)[None, :], column < size)


def forward_config(size: int, directions: int) -> tuple[Config, bool]:
    """The tile for lines of `size` channels, and whether a line fits one (WHOLE)."""
    block = _triton.bucket(size, 16, _LONGEST)
    if size > block:
        block = _LONG_STEP
    lines = max(1, min(16, _TILE // block))
    blocks = {"LINES": lines, "BLOCK": block, "DIRECTIONS": _triton.bucket(directions)}
    return Config(blocks, warps=_triton.bucket(lines * block // 512, 4, 16)), size <= block


def backward_config(size: int, directions: int) -> tuple[Config, bool]:
    """As forward_config, with fewer elements a thread: the backward keeps several tiles more."""
    block = _triton.bucket(size, 16, _LONGEST // 4)
    if size > block:
        block = _LONG_STEP // 2
    rows = max(1, min(16, _TILE // 4 // block))
    blocks = {"ROWS": rows, "BLOCK": block, "DIRECTIONS": _triton.bucket(directions)}
    return Config(blocks, warps=_triton.bucket(rows * block // 128, 4, 16)), size <= block


def specimens(architecture: str) -> list[Specimen]:
    """What is compiled ahead of time: both ways and four ways at ML-Mamba's width, groups, and a line beyond a tile."""
    found = []
    for label, pointer, size, directions, gated in (
        ("ML-Mamba bf16", "*bf16", 5120, 4, True),
        ("widest tile fp32", "*fp32", 2048, 2, True),
        ("groups bf16 ungated", "*bf16", 128, 8, False),
        ("long line fp32", "*fp32", 20480, 4, True),
    ):
        types = dict.fromkeys(("y", "z", "weight", "out", "grad_out", "grad_y", "grad_z"), pointer)
        types |= {"rstd": "*fp32", "partial_weight": "*fp32"}
        constants = {"ACC": tl.float32, "y_channel": 1, "z_channel": 1, "g_channel": 1, "EPS": 1e-5, "SCALE": 0.25}
        constants |= {} if gated else {"z": None, "grad_z": None}
        for kernel, (config, whole) in (
            (forward_kernel, forward_config(size, directions)),
            (backward_kernel, backward_config(size, directions)),
        ):
            aligned = ("size", *(f"{t}_{axis}" for t in "gyz" for axis in ("batch", "direction", "token")))
            found.append(Specimen(label, kernel, types, config, {**constants, "WHOLE": whole}, aligned))
    return found
