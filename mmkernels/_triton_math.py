"""What Triton kernels share: activations, products of tiles, deterministic sums.

Imports triton at the top, like every file of kernels, and is itself imported by those only.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels import _triton
from mmkernels._triton import Config, Specimen

# A constexpr, so that compiled kernels keep one branch only.
INTERPRETED = tl.constexpr(_triton.interpreting())


@triton.jit
def silu(x):
    """x / (1 + e^-x)."""
    return x * sigmoid(x)


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x), in x's dtype; 0 and 1 at the ends, without NaN."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def silu_derivative(x):
    """d silu(x) / dx = s (1 + x (1 - s)) with s = sigmoid(x)."""
    s = sigmoid(x)
    return s * (1.0 + x * (1.0 - s))


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, accurate where 1 + x rounds: log(u) x / (u - 1) with u = fl(1 + x) (Kahan)."""
    u = 1.0 + x
    low = u == 1.0
    return tl.where(low, x, tl.log(u) * (x / tl.where(low, 1.0, u - 1.0)))


@triton.jit
def softplus(x):
    """log(1 + e^x), the identity above 20 (where it is that to the last bit of float32)."""
    return tl.where(x > 20.0, x, log1p(tl.exp(tl.minimum(x, 20.0))))


@triton.jit
def inverse_root(x):
    """1 / sqrt(x), rounded correctly in both steps for float32."""
    if x.dtype == tl.float64:
        return 1.0 / tl.sqrt(x)
    else:
        return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), tl.sqrt_rn(x))


@triton.jit
def dot(a, b, acc=None, PRECISION: tl.constexpr = "ieee"):
    """a @ b (+ acc), accumulated in float32 (float64 for float64).

    The interpreter multiplies the bits of bfloat16 operands as integers, so they are widened there; products of
    bfloat16 are exact in float32, so the result is the tensor core's up to the order of the sum.  PRECISION says how
    float32 operands are multiplied: "ieee" (the default: never TF32 behind the caller's back), "tf32x3" or "tf32".
    """
    if INTERPRETED:
        if a.dtype == tl.bfloat16:
            a = a.to(tl.float32)
        if b.dtype == tl.bfloat16:
            b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def row_offset(row, directions, along_batch, along_direction, order):
    """Where a 64-bit row begins in a tensor (batch, ...) or, if there are orders, (batch, directions, ...)."""
    if order is not None:
        offset = row // directions * along_batch + row % directions * along_direction
    else:
        offset = row * along_batch
    return offset


@triton.jit(do_not_specialize=["rows"])
def column_sums_kernel(x, out, rows, columns, ACC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sum the rows of dense x (rows, columns) into out (columns,), in a fixed order.

    Grid: (cdiv(columns, COLUMNS),).  A program owns COLUMNS columns and reads every row of them once.
    Bytes: rows * columns * sizeof(x) read, columns * sizeof(out) written.
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), ACC)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        total += tl.load(x + row[:, None].to(tl.int64) * columns + column[None, :], inside, other=0.0).to(ACC)
    tl.store(out + column, tl.sum(total, 0).to(out.dtype.element_ty), column < columns)


def column_sums_config(columns: int) -> Config:
    """Tiles of 32 rows by up to 64 columns: a few hundred programs for the widths of models."""
    return Config({"ROWS": 32, "COLUMNS": _triton.bucket(columns, 16, 64)})


def column_sums(partial: Tensor | None, like: Tensor) -> Tensor:
    """Sum all but the last axes of a dense tensor into one shaped and typed like `like`; None gives an empty one.

    `like` has as many elements as one or more trailing axes of `partial`, e.g. (dim,) of (strips, groups, size).
    """
    if partial is None:
        return like.new_empty((0,))
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    columns = out.numel()
    config = column_sums_config(columns)
    grid = (-(-columns // config.blocks["COLUMNS"]),)
    rows = partial.numel() // max(columns, 1)
    _triton.launch(column_sums_kernel, grid, config, partial, out, rows, columns, ACC=dtype(partial.dtype))
    return out


def dtype(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of a torch dtype."""
    return {torch.float32: tl.float32, torch.float64: tl.float64}[dtype]


def specimens(architecture: str) -> list[Specimen]:
    """What is compiled ahead of time."""
    types = {"x": "*fp32", "out": "*bf16"}
    return [Specimen("fp32 to bf16", column_sums_kernel, types, column_sums_config(1536), {"ACC": tl.float32})]
