"""What Triton kernels share: activations to the last digits, products of tiles, sums in a fixed order."""

import pytest
import torch

from mmkernels import _triton

if _triton.probe() is not None:
    pytest.skip(_triton.probe(), allow_module_level=True)

import triton
import triton.language as tl

from mmkernels import _triton_math
from mmkernels._triton_math import column_sums, dot, inverse_root, sigmoid, silu, silu_derivative, softplus

DEVICE = "cpu" if _triton.interpreting() else "cuda"


@triton.jit
def elementwise_kernel(x, y, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value = tl.load(x + at)
    if FUNCTION == "softplus":
        value = softplus(value)
    elif FUNCTION == "silu":
        value = silu(value)
    elif FUNCTION == "sigmoid":
        value = sigmoid(value)
    elif FUNCTION == "silu_derivative":
        value = silu_derivative(value)
    else:
        value = inverse_root(value)
    tl.store(y + at, value)


@triton.jit
def dot_kernel(a, b, c, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(c + at, dot(tl.load(a + at), tl.load(b + at)))


TRUTH = {
    "softplus": torch.nn.functional.softplus,
    "silu": torch.nn.functional.silu,
    "sigmoid": torch.sigmoid,
    "silu_derivative": lambda x: torch.sigmoid(x) * (1 + x * (1 - torch.sigmoid(x))),
    "inverse_root": torch.rsqrt,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", TRUTH)
def test_activations(name, dtype):
    # Step sizes of 1e-3 and far less come from arguments of -7 to -80: there log(1 + e^x) must not lose its digits.
    x = torch.cat([torch.linspace(-80, 30, 960), torch.logspace(-30, 1.5, 32), -torch.logspace(-30, 0, 32)]).to(
        DEVICE, dtype
    )
    x = x.abs() + 1e-30 if name == "inverse_root" else x
    y = torch.empty_like(x)
    elementwise_kernel[(1,)](x, y, FUNCTION=name, BLOCK=x.numel())
    truth = TRUTH[name](x.double())
    # exp of a rounded argument is |x| roundings off, and the interpreter's double is numpy's: a handful more.
    allowed = (4 + x.abs().double()) * torch.finfo(dtype).eps * truth.abs() + torch.finfo(dtype).tiny
    if name == "silu_derivative":  # it crosses zero at -1.28: an absolute error there
        allowed = allowed + 4 * torch.finfo(dtype).eps * (x.abs() < 2)
    assert ((y.double() - truth).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_of_tiles(dtype):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(32, 32, generator=generator).to(DEVICE, dtype) for _ in range(2))
    c = torch.empty(32, 32, device=DEVICE)
    dot_kernel[(1,)](a, b, c, SIZE=32)
    # Exact products, 32 of them added in float32: never TF32, and bfloat16 right in the interpreter as well.
    torch.testing.assert_close(
        c.double(), a.double() @ b.double(), rtol=0, atol=32 * torch.finfo(torch.float32).eps * 8
    )


@pytest.mark.parametrize("shape", [(1, 5), (70, 130), (3, 4, 6)])
def test_sums_are_the_same_every_time(shape):
    generator = torch.Generator().manual_seed(0)
    partial = torch.randn(*shape, generator=generator).to(DEVICE)
    like = torch.empty(shape[1:], dtype=torch.float16, device=DEVICE)
    sums = column_sums(partial, like)
    torch.testing.assert_close(sums, partial.double().sum(0).half())
    assert torch.equal(sums, column_sums(partial, like))
    assert column_sums(None, like).shape == (0,)


def test_names_of_dtypes():
    assert _triton_math.dtype(torch.float32) == tl.float32
    assert _triton_math.dtype(torch.float64) == tl.float64


def test_buckets():
    assert [_triton.bucket(n) for n in (0, 1, 2, 3, 64, 65)] == [1, 1, 2, 4, 64, 128]
    assert _triton.bucket(3, 16, 64) == 16
    assert _triton.bucket(1000, 16, 64) == 64


@triton.jit
def convert_kernel(x, y, z, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    low = tl.load(x + at).to(tl.bfloat16)
    tl.store(y + at, low)
    tl.store(z + at, low.to(tl.float32))


def test_bfloat16_is_rounded_to_the_nearest():
    # Halves between two neighbours, both ways; a carry into the exponent; what becomes infinite; both kinds of NaN.
    bits = [0x3F808000, 0x3F818000, 0x3F818001, 0x3F817FFF, 0x3FFFFFFF, 0x7F7FFFFF, 0xFF800000, 0x7FC00000, 0x7F800001]
    edges = torch.tensor([b - (1 << 32) if b >> 31 else b for b in bits], dtype=torch.int32).view(torch.float32)
    values = torch.randn(64 - len(bits), generator=torch.Generator().manual_seed(0))
    x = torch.cat([edges, values]).to(DEVICE)
    y, z = torch.empty_like(x, dtype=torch.bfloat16), torch.empty_like(x)
    convert_kernel[(1,)](x, y, z, BLOCK=64)
    torch.testing.assert_close(y, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(z, x.bfloat16().float(), rtol=0, atol=0, equal_nan=True)
