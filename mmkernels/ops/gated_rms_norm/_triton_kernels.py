"""Triton kernels of gated_rms_norm, forward and backward; the formulas are derived in README.md.

A line is one group of one row: `size` consecutive channels that are normalised together.
"""

import triton
import triton.language as tl

from mmkernels import _triton
from mmkernels._triton import Config, Specimen
from mmkernels._triton_math import inverse_root, silu, silu_derivative

# Elements of a tile; 4 to 8 tensors of it live in registers, with the 64-bit addresses of each.  No specimen spills.
_TILE = 2048
_LONGEST = 8192  # channels of a line that are kept in registers; longer lines are read twice,
_LONG_STEP = 4096  # in steps of this


@triton.jit
def _load(pointer, at, inside, ACC: tl.constexpr):
    return tl.load(pointer + at, inside, other=0.0).to(ACC)


@triton.jit
def _normalised_input(x, z, x_at, z_at, inside, NORM_FIRST: tl.constexpr, ACC: tl.constexpr):
    """What is normalised: x silu(z), or x where no gate comes before."""
    v = _load(x, x_at, inside, ACC)
    if z is not None:
        if not NORM_FIRST:
            v = v * silu(_load(z, z_at, inside, ACC))
    return v


@triton.jit
def _output(n, z, weight, bias, z_at, w_at, inside, NORM_FIRST: tl.constexpr, ACC: tl.constexpr):
    """y of normalised values n: weight, bias, and the gate where it comes last."""
    y = n * _load(weight, w_at, inside, ACC)
    if bias is not None:
        y = y + _load(bias, w_at, inside, ACC)
    if z is not None:
        if NORM_FIRST:
            y = y * silu(_load(z, z_at, inside, ACC))
    return y


@triton.jit(do_not_specialize=["lines"])
def forward_kernel(
    x,
    z,
    weight,
    bias,
    y,
    rstd,
    lines,
    groups,
    size,
    x_row,
    x_column,
    z_row,
    z_column,
    w_group,
    EPS: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    ACC: tl.constexpr,
    WHOLE: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y and 1 / rms of every line.

    Grid: (cdiv(lines, LINES),).  A program owns LINES lines; WHOLE lines fit a tile and are read once, longer ones
    twice.  Bytes: x, z read and y written once (x, z twice if not WHOLE), rstd written; weight and bias stay in L2.
    """
    line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    row, group = line // groups, line % groups
    known = (line < lines)[:, None]
    x_line = (row * x_row + group * size * x_column)[:, None]
    z_line = (row * z_row + group * size * z_column)[:, None]
    y_line, w_line = (line * size)[:, None], (group * w_group)[:, None]
    column = tl.arange(0, BLOCK).to(tl.int64)[None, :]
    if WHOLE:
        inside = known & (column < size)
        v = _normalised_input(x, z, x_line + column * x_column, z_line + column * z_column, inside, NORM_FIRST, ACC)
        r = inverse_root(tl.sum(v * v, 1) / size + EPS)
        n = v * r[:, None]
        out = _output(n, z, weight, bias, z_line + column * z_column, w_line + column, inside, NORM_FIRST, ACC)
        tl.store(y + y_line + column, out.to(y.dtype.element_ty), inside)
    else:
        total = tl.zeros((LINES,), ACC)
        for start in range(0, size, BLOCK):
            at = column + start
            v = _normalised_input(
                x, z, x_line + at * x_column, z_line + at * z_column, known & (at < size), NORM_FIRST, ACC
            )
            total += tl.sum(v * v, 1)
        r = inverse_root(total / size + EPS)
        for start in range(0, size, BLOCK):
            at = column + start
            inside = known & (at < size)
            z_at = z_line + at * z_column
            n = _normalised_input(x, z, x_line + at * x_column, z_at, inside, NORM_FIRST, ACC) * r[:, None]
            out = _output(n, z, weight, bias, z_at, w_line + at, inside, NORM_FIRST, ACC)
            tl.store(y + y_line + at, out.to(y.dtype.element_ty), inside)
    tl.store(rstd + line, r, line < lines)


@triton.jit
def _gradient_of_normal(
    grad_y, x, z, weight, bias, y_at, x_at, z_at, w_at, r, inside, NORM_FIRST: tl.constexpr, ACC: tl.constexpr
):
    """n; the gradient of n w + b; x; and z (x again where there is no gate), gradient of a last gate (or x)."""
    of_scaled = _load(grad_y, y_at, inside, ACC)
    x_value = _load(x, x_at, inside, ACC)
    n = x_value
    z_value = x_value
    of_z = x_value
    if z is not None:
        z_value = _load(z, z_at, inside, ACC)
        if not NORM_FIRST:
            n = n * silu(z_value)
    n = n * r[:, None]
    if z is not None:
        if NORM_FIRST:
            scaled = n * _load(weight, w_at, inside, ACC)
            if bias is not None:
                scaled += _load(bias, w_at, inside, ACC)
            of_z = of_scaled * scaled * silu_derivative(z_value)
            of_scaled = of_scaled * silu(z_value)
    return n, of_scaled, x_value, z_value, of_z


@triton.jit
def _store_gradients(
    grad_x, grad_z, at, v_gradient, x_value, z_value, of_z, inside, HAS_Z: tl.constexpr, NORM_FIRST: tl.constexpr
):
    """Gradients of x and z, from that of the normalised input."""
    of_x = v_gradient
    if HAS_Z:
        if not NORM_FIRST:
            of_x = v_gradient * silu(z_value)
            of_z = v_gradient * x_value * silu_derivative(z_value)
        tl.store(grad_z + at, of_z.to(grad_z.dtype.element_ty), inside)
    tl.store(grad_x + at, of_x.to(grad_x.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["rows", "steps"])
def backward_kernel(
    grad_y,
    x,
    z,
    weight,
    bias,
    rstd,
    grad_x,
    grad_z,
    partial_weight,
    partial_bias,
    rows,
    groups,
    size,
    steps,
    g_row,
    g_column,
    x_row,
    x_column,
    z_row,
    z_column,
    w_group,
    NORM_FIRST: tl.constexpr,
    ACC: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of x and z, and every program's share of those of weight and bias.

    Grid: (strips * groups,).  A program owns one group of steps * ROWS consecutive rows, so that it alone writes its
    row of the partial sums (strips, groups, size): no atomics.  Lines that do not fit a tile (not WHOLE) are read
    twice and have steps = 1.  Bytes: grad_y, x, z read once (twice), grad_x, grad_z written once, partials written.
    """
    strip, group = (tl.program_id(0) // groups).to(tl.int64), (tl.program_id(0) % groups).to(tl.int64)
    column = tl.arange(0, BLOCK).to(tl.int64)[None, :]
    first = group * size
    partial_at = (strip * groups + group) * size + column
    if WHOLE:
        of_weight = tl.zeros((ROWS, BLOCK), ACC)
        of_bias = tl.zeros((ROWS, BLOCK), ACC)
        w_at = group * w_group + column
        for step in range(0, steps):
            row = (strip * steps + step) * ROWS + tl.arange(0, ROWS)
            inside = (row < rows)[:, None] & (column < size)
            at = row[:, None]
            r = tl.load(rstd + row * groups + group, row < rows, other=0.0)
            n, of_scaled, x_value, z_value, of_z = _gradient_of_normal(
                grad_y, x, z, weight, bias, at * g_row + first * g_column + column * g_column,
                at * x_row + first * x_column + column * x_column, at * z_row + first * z_column + column * z_column,
                w_at + at * 0, r, inside, NORM_FIRST, ACC,
            )  # fmt: skip
            of_n = of_scaled * _load(weight, w_at, column < size, ACC)
            mean = tl.sum(of_n * n, 1) / size
            of_v = (of_n - n * mean[:, None]) * r[:, None]
            out_at = (at * groups + group) * size + column
            _store_gradients(grad_x, grad_z, out_at, of_v, x_value, z_value, of_z, inside, z is not None, NORM_FIRST)
            of_weight += of_scaled * n
            of_bias += of_scaled
        if partial_weight is not None:
            tl.store(partial_weight + partial_at, tl.sum(of_weight, 0)[None, :], column < size)
        if partial_bias is not None:
            tl.store(partial_bias + partial_at, tl.sum(of_bias, 0)[None, :], column < size)
    else:
        row = strip * ROWS + tl.arange(0, ROWS)
        at = row[:, None]
        r = tl.load(rstd + row * groups + group, row < rows, other=0.0)
        mean = tl.zeros((ROWS,), ACC)
        for phase in tl.static_range(2):
            for start in range(0, size, BLOCK):
                c = column + start
                inside = (row < rows)[:, None] & (c < size)
                w_at = group * w_group + c
                n, of_scaled, x_value, z_value, of_z = _gradient_of_normal(
                    grad_y, x, z, weight, bias, at * g_row + first * g_column + c * g_column,
                    at * x_row + first * x_column + c * x_column, at * z_row + first * z_column + c * z_column,
                    w_at + at * 0, r, inside, NORM_FIRST, ACC,
                )  # fmt: skip
                of_n = of_scaled * _load(weight, w_at, c < size, ACC)
                if phase == 0:
                    mean += tl.sum(of_n * n, 1) / size
                else:
                    of_v = (of_n - n * mean[:, None]) * r[:, None]
                    out_at = (at * groups + group) * size + c
                    _store_gradients(
                        grad_x, grad_z, out_at, of_v, x_value, z_value, of_z, inside, z is not None, NORM_FIRST
                    )
                    if partial_weight is not None:
                        of_weight = tl.sum(of_scaled * n, 0)[None, :]
                        tl.store(partial_weight + partial_at + start, of_weight, c < size)
                    if partial_bias is not None:
                        tl.store(partial_bias + partial_at + start, tl.sum(of_scaled, 0)[None, :], c < size)


def forward_config(size: int) -> tuple[Config, bool]:
    """The tile for lines of `size` channels, and whether a line fits one (WHOLE)."""
    block = _triton.bucket(size, 16, _LONGEST)
    if size > block:
        block = _LONG_STEP
    lines = max(1, min(16, _TILE // block))
    return Config({"LINES": lines, "BLOCK": block}, warps=_triton.bucket(lines * block // 512, 4, 16)), size <= block


def backward_config(size: int, biased: bool) -> tuple[Config, bool]:
    """As forward_config, with fewer elements a thread: the backward keeps twice as many tiles, one more for a bias."""
    block = _triton.bucket(size, 16, _LONGEST // (8 if biased else 4))
    if size > block:
        block = _LONG_STEP // 2
    rows = max(1, min(16, _TILE // 4 // block))
    return Config({"ROWS": rows, "BLOCK": block}, warps=_triton.bucket(rows * block // 128, 4, 16)), size <= block


def specimens(architecture: str) -> list[Specimen]:
    """What is compiled ahead of time: a Mamba-2 mixer, an mmMamba mixer, and a line longer than a tile."""
    found = []
    for label, pointer, size, norm_first, shared, biased in (
        ("Mamba-2 bf16", "*bf16", 1536, False, False, False),
        ("Mamba-2 fp32", "*fp32", 2048, False, False, False),
        ("longest tile bf16", "*bf16", 5120, False, False, False),
        ("mmMamba bf16", "*bf16", 128, True, True, False),
        ("bias fp32", "*fp32", 1024, True, False, True),
        ("long line fp32", "*fp32", 20480, True, False, True),
    ):
        types = dict.fromkeys(("x", "z", "weight", "bias", "y", "grad_y", "grad_x", "grad_z"), pointer)
        types |= dict.fromkeys(("rstd", "partial_weight", "partial_bias"), "*fp32")
        constants = {"NORM_FIRST": norm_first, "ACC": tl.float32, "x_column": 1, "z_column": 1, "g_column": 1}
        constants |= {"EPS": 1e-5} | ({"w_group": 0} if shared else {})
        constants |= {} if biased else {"bias": None, "partial_bias": None}
        config, whole = forward_config(size)
        found.append(Specimen(label, forward_kernel, types, config, {**constants, "WHOLE": whole}))
        config, whole = backward_config(size, biased)
        found.append(Specimen(label, backward_kernel, types, config, {**constants, "WHOLE": whole}))
    return found
