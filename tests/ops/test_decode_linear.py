"""What is special to decode_linear: batch invariance, mixed dtypes, bad input (the rest: test_contract.py)."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import mmkernels
from mmkernels import DeviceError, DtypeError, ShapeError, decode_linear
from mmkernels.testing import assert_within, poisoned_allocations
from mmkernels.testing.cases_decode_linear import linear_inputs

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)
READY = [name for name in ("native", "torch") if mmkernels.backends()["decode_linear"][name] == "ready"]
every_backend = pytest.mark.parametrize("backend", [*READY, "reference"])
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("backend", READY)
@PROPERTY
@given(
    lead=st.lists(st.integers(0, 4), max_size=2),
    inner=st.integers(0, 70),
    out=st.integers(0, 20),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_equals_the_reference(backend, lead, inner, out, bias, seed):
    args = linear_inputs(torch.Generator().manual_seed(seed), tuple(lead), inner, out, bias=bias)
    with poisoned_allocations():
        y = decode_linear(**args, backend=backend)
    torch.testing.assert_close(y, decode_linear(**args, backend="reference"), rtol=1e-12, atol=1e-12)


@every_backend
def test_equals_torch(backend):
    args = linear_inputs(torch.Generator().manual_seed(0), (3, 2), 40, 9, bias=True)
    expected = F.linear(args["x"], args["weight"], args["bias"])
    torch.testing.assert_close(decode_linear(**args, backend=backend), expected, rtol=1e-12, atol=1e-12)


@every_backend
@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
def test_every_mixture_of_dtypes(backend, x_dtype, weight_dtype):
    args = linear_inputs(torch.Generator().manual_seed(1), (2,), 129, 7, bias=True)
    mixed = {
        "x": args["x"].to(x_dtype),
        "weight": args["weight"].to(weight_dtype),
        "bias": args["bias"].to(torch.bfloat16),
    }
    truth = decode_linear(**{k: v.double() for k, v in mixed.items()}, backend="reference")
    y = decode_linear(**mixed, backend=backend)
    assert y.dtype == x_dtype
    # 129 products summed in float32, in any order, unless one operand is float64 or the output is coarser.
    accumulated = 0 if torch.float64 in (x_dtype, weight_dtype) else 129
    terms = 16 if x_dtype == torch.float64 else 1
    assert_within("y", y, truth, dtype=x_dtype, terms=terms, summands=accumulated)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_are_float32(dtype):
    # In the storage type a sum of 4096 ones would stop at 256 (bfloat16).
    for backend in (*READY, "reference"):
        y = decode_linear(torch.ones(1, 4096, dtype=dtype), torch.ones(3, 4096, dtype=dtype), backend=backend)
        assert (y == 4096).all()


@pytest.mark.skipif("native" not in READY, reason="needs the native library")
@pytest.mark.parametrize("weight_dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("inner", [200, 4200])  # in reach of L1, and not
def test_a_row_does_not_depend_on_its_batch(weight_dtype, inner):
    args = linear_inputs(torch.Generator().manual_seed(2), (11,), inner, 37, bias=True)
    x, weight, bias = args["x"].float(), args["weight"].to(weight_dtype), args["bias"].float()
    whole = decode_linear(x, weight, bias, backend="native")
    for rows in (1, 2, 3, 4, 7):
        for start in range(0, 11 - rows + 1, 3):
            part = decode_linear(x[start : start + rows], weight, bias, backend="native")
            assert torch.equal(part, whole[start : start + rows])


@every_backend
def test_infinities_and_nan_pass_through(backend):
    x = torch.tensor([[1.0, 2.0, 3.0]])
    weight = torch.tensor([[float("inf"), 0, 0], [float("nan"), 0, 0], [1.0, 1.0, 1.0]]).bfloat16()
    y = decode_linear(x, weight, backend=backend)
    assert y[0, 0] == float("inf")
    assert y[0, 1].isnan()
    assert y[0, 2] == 6


@every_backend
def test_weights_may_be_views(backend):
    wide = torch.randn(20, 50, generator=torch.Generator().manual_seed(3))
    x = torch.randn(2, 12, generator=torch.Generator().manual_seed(4))
    for weight in (
        wide[3:17, 5:17],
        wide[:, :12].t().contiguous().t(),
        wide[::2, ::4][:, :12],
        wide[:1, :12].expand(5, 12),
    ):
        torch.testing.assert_close(
            decode_linear(x, weight, backend=backend), decode_linear(x, weight.contiguous(), backend=backend)
        )


def test_a_verified_call_is_checked_again_when_it_changes():
    x, weight = torch.zeros(2, 6), torch.zeros(4, 6)
    for _ in range(2):
        assert decode_linear(x, weight).shape == (2, 4)
    for bad, error in (
        (torch.zeros(4, 5), ShapeError),
        (weight.int(), DtypeError),
        (weight.to("meta"), DeviceError),
        ([[0.0] * 6], DtypeError),
    ):
        for _ in range(2):
            with pytest.raises(error):
                decode_linear(x, bad)


X, W = torch.zeros(2, 6), torch.zeros(4, 6)
BAD = [
    ({"x": torch.tensor(1.0)}, ShapeError, "x must have shape"),
    ({"x": X.int()}, DtypeError, "x must be float32"),
    ({"x": [1.0]}, DtypeError, "x must be a tensor"),
    ({"weight": torch.zeros(6)}, ShapeError, "weight must have shape"),
    ({"weight": torch.zeros(6, 4)}, ShapeError, r"weight must have shape \(out, in=6\)|weight must have shape"),
    ({"weight": None}, DtypeError, "weight must be a tensor"),
    ({"bias": torch.zeros(6)}, ShapeError, "bias must have shape"),
    ({"weight": W.to("meta")}, DeviceError, "weight must be on cpu"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message) as caught:
        decode_linear(**{"x": X, "weight": W, **change})
    assert str(caught.value).startswith("decode_linear: ")
