"""Vec at every ISA level: accuracy of its functions over the whole range, conversions bit for bit, partial vectors."""

import ctypes
import mmap

import numpy as np
import pytest
import torch

# Largest errors in ulp, as documented in csrc/common/vec_math.h.
ULP = {"exp": 1.1, "log1p_unit": 2.0, "sigmoid": 2.5, "silu": 3.0, "softplus": 2.5}


def exact(name: str, x: np.ndarray) -> np.ndarray:
    """The function in float64: its own rounding is 2^-29 of a float's."""
    x = x.astype(np.float64)
    small = np.exp(-np.abs(x))
    sigmoid = np.where(x < 0, small, 1.0) / (1.0 + small)
    return {
        "exp": lambda: np.exp(x),
        "log1p_unit": lambda: np.log1p(x),
        "sigmoid": lambda: sigmoid,
        "silu": lambda: x * sigmoid,
        "softplus": lambda: np.where(x > 20, x, np.maximum(x, 0) + np.log1p(small)),
    }[name]()


def call(library: ctypes.CDLL, name: str, x: np.ndarray, out_dtype=None) -> np.ndarray:
    out = np.full(x.shape, 77, dtype=out_dtype or x.dtype)
    getattr(library, name)(ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(out.ctypes.data), ctypes.c_int64(x.size))
    return out


def sample(name: str) -> np.ndarray:
    """Two million floats: every exponent, both signs, and densely where the function bends."""
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 2**32, 1_000_000, dtype=np.uint32).view(np.float32)
    dense = generator.uniform(-110, 95, 1_000_000).astype(np.float32)
    x = np.concatenate([bits[np.isfinite(bits)], dense])
    return np.abs(dense) / np.float32(110) if name == "log1p_unit" else x


@pytest.mark.parametrize("name", ULP)
def test_error_in_ulp(vec, level, name):
    x = sample(name)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        truth = exact(name, x)
        rounded = truth.astype(np.float32)
        got = call(vec, f"{name}_f32", x)
        # Where float32 overflows both must be infinite (beyond the last half ulp either answer is a correct rounding).
        finite = np.isfinite(rounded)
        np.testing.assert_array_equal(got[np.abs(truth) > 3.41e38], rounded[np.abs(truth) > 3.41e38])
        ulp = np.spacing(np.abs(rounded[finite])).astype(np.float64)
        if name == "silu":  # below -87 the sigmoid is subnormal and its spacing is multiplied by x
            ulp = np.where(x[finite] < -87, -x[finite] * np.float32(1e-45), ulp)
        error = np.abs(got[finite].astype(np.float64) - truth[finite]) / ulp
    worst = int(np.argmax(error))
    assert error[worst] <= ULP[name], f"{name}({x[finite][worst]!r}) at {level}: {error[worst]:.2f} ulp"


def test_special_values(vec):
    x = np.array([-np.inf, np.inf, np.nan, 0.0, -0.0, -103.9, -105.0, 88.72, 88.73, 1e-45, -1e-45], dtype=np.float32)
    exp = call(vec, "exp_f32", x)
    np.testing.assert_array_equal(exp[:5], np.array([0, np.inf, np.nan, 1, 1], np.float32))
    assert exp[5] == np.float32(1.4e-45)  # the smallest subnormal, not flushed
    assert exp[6] == 0
    assert np.isfinite(exp[7])
    assert np.isinf(exp[8])
    np.testing.assert_array_equal(exp[9:], 1)
    np.testing.assert_array_equal(call(vec, "sigmoid_f32", x)[:5], np.array([0, 1, np.nan, 0.5, 0.5], np.float32))
    np.testing.assert_array_equal(call(vec, "softplus_f32", x)[:3], np.array([0, np.inf, np.nan], np.float32))
    np.testing.assert_array_equal(call(vec, "abs_f32", x)[:3], np.array([np.inf, np.inf, np.nan], np.float32))
    assert call(vec, "sigmoid_f32", np.full(3, -100, np.float32))[0] > 0


@pytest.mark.parametrize("name", ULP)
def test_double_is_as_good_as_libm(vec, name):
    x = sample(name)[::200].astype(np.float64)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        np.testing.assert_allclose(call(vec, f"{name}_f64", x), exact(name, x), rtol=1e-15, atol=5e-324)


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_every_16_bit_value_widens_exactly(vec, kind, dtype):
    bits = np.arange(2**16, dtype=np.uint16)
    got = call(vec, f"widen_{kind}", bits, np.float32)
    want = torch.from_numpy(bits.view(np.int16)).view(dtype).float().numpy()
    number = ~np.isnan(want)
    np.testing.assert_array_equal(got[number].view(np.uint32), want[number].view(np.uint32))
    assert np.isnan(got[~number]).all()


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_narrowing_rounds_as_torch_does(vec, kind, dtype):
    generator = np.random.default_rng(1)
    wide = torch.from_numpy(np.arange(2**16, dtype=np.uint16).view(np.int16)).view(dtype).float()
    halves = ((wide + wide.roll(-1)) / 2).numpy()  # ties between neighbours
    around = np.concatenate([np.nextafter(halves, np.float32(np.inf)), np.nextafter(halves, np.float32(-np.inf))])
    anything = generator.integers(0, 2**32, 500_000, dtype=np.uint32).view(np.float32)
    x = np.concatenate([wide.numpy(), halves, around, anything]).astype(np.float32)
    got = torch.from_numpy(call(vec, f"narrow_{kind}", x, np.uint16).view(np.int16)).view(dtype)
    want = torch.from_numpy(x).to(dtype)
    number = ~torch.isnan(want)
    assert torch.equal(got.view(torch.int16)[number], want.view(torch.int16)[number])
    assert torch.isnan(got[~number]).all()


def test_arithmetic_of_lanes(vec):
    size = vec.size_f32()
    a, b, c = (np.arange(1, size + 1, dtype=np.float32) * k for k in (1, 2, 3))
    out = np.zeros(5, np.float32)
    vec.lanes_f32(*(ctypes.c_void_p(v.ctypes.data) for v in (a, b, c, out)))
    np.testing.assert_array_equal(out, np.array([size * (size + 1) / 2, size, 5, 1, 0], np.float32))
    a[:] = np.nan
    vec.lanes_f32(*(ctypes.c_void_p(v.ctypes.data) for v in (a, b, c, out)))
    assert np.isnan(out).all()  # max(0, nan) and min(0, nan) keep the NaN


@pytest.mark.parametrize(
    ("kind", "dtype"), [("f32", np.float32), ("f64", np.float64), ("bf16", np.uint16), ("f16", np.uint16)]
)
def test_partial_vectors_stay_inside_their_buffers(vec, kind, dtype):
    # Each buffer ends at the end of a mapping with nothing behind it that could be read or written by mistake.
    page = mmap.PAGESIZE
    width = vec.size_f32() // (2 if kind == "f64" else 1)
    size = np.dtype(dtype).itemsize
    for lanes in range(width + 1):
        whole_in, whole_out = (np.frombuffer(mmap.mmap(-1, page), dtype=dtype) for _ in range(2))
        whole_in[:] = np.arange(page // size) % 7 + 1
        guard = whole_out[: page // size - lanes]
        guard[:] = 9
        source = whole_in.ctypes.data + page - lanes * size
        target = whole_out.ctypes.data + page - lanes * size
        getattr(vec, f"partial_{kind}")(ctypes.c_void_p(source), ctypes.c_void_p(target), ctypes.c_int(lanes))
        np.testing.assert_array_equal(whole_out[len(guard) :], whole_in[len(guard) :])
        assert (guard == 9).all()


def test_lanes_beyond_a_partial_load_are_zero(vec):
    size = vec.size_f32()
    source = np.full(size, 5, np.float32)
    for lanes in range(size + 1):
        whole = np.full(size, np.nan, np.float32)
        vec.padding_f32(ctypes.c_void_p(source.ctypes.data), ctypes.c_void_p(whole.ctypes.data), ctypes.c_int(lanes))
        np.testing.assert_array_equal(whole, np.where(np.arange(size) < lanes, 5, 0))
