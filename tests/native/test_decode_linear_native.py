"""The C++ decode_linear: every ISA level, dtype and thread count; gradients; opcheck; the kernel alone."""

import pytest
import torch

import mmkernels
from mmkernels import _native
from mmkernels.testing import assert_within, poisoned_allocations
from mmkernels.testing.cases_decode_linear import linear_inputs

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ops = torch.ops.mmkernels


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request):
    if request.param not in _native.isa_levels():
        pytest.skip(f"this CPU has no {request.param}")
    with _native.use_isa(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 17])
def test_error_bar(isa, dtype, rows):
    # Inner sizes around one and two vectors of 4, 8 and 16 and one past the reach of L1; outputs around blocks of 4, 8.
    for inner, out in ((1, 1), (7, 3), (16, 4), (31, 5), (33, 8), (64, 9), (71, 12), (4100, 11)):
        made = linear_inputs(torch.Generator().manual_seed(inner), (rows,), inner, out, bias=inner % 2 == 1)
        args = {k: None if v is None else v.to(dtype) for k, v in made.items()}
        truth = mmkernels.decode_linear(
            **{k: None if v is None else v.double() for k, v in args.items()}, backend="reference"
        )
        with poisoned_allocations():
            y = mmkernels.decode_linear(**args, backend="native")
        wide = dtype == torch.float64
        terms = 16 + inner**0.5 if wide else 1
        assert_within(f"{inner} to {out}", y, truth, dtype=dtype, terms=terms, summands=0 if wide else inner)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("rows", [1, 6])
def test_bits_do_not_depend_on_the_number_of_threads(isa, dtype, rows):
    made = linear_inputs(torch.Generator().manual_seed(0), (rows,), 300, 1003, bias=True)
    args = {k: v.to(dtype) for k, v in made.items()}
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(mmkernels.decode_linear(**args, backend="native"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_mixed_dtypes(weight_dtype):
    made = linear_inputs(torch.Generator().manual_seed(1), (3,), 40, 9, bias=True)
    made["weight"] = made["weight"].to(weight_dtype)
    results = {}
    for backend, dtype in (("reference", torch.float64), ("torch", None), ("native", None)):
        args = {
            k: (v.float() if k != "weight" else v).to(dtype or v.dtype if k == "weight" else dtype or torch.float32)
            for k, v in made.items()
        }
        args = {k: v.detach().requires_grad_() for k, v in args.items()}
        y = mmkernels.decode_linear(**args, backend=backend)
        results[backend] = torch.autograd.grad(y.square().sum(), list(args.values()))
    for name, truth, peer, got in zip(made, results["reference"], results["torch"], results["native"], strict=True):
        assert got.dtype == peer.dtype
        assert_within(name, got, truth, peer, summands=40)


def test_only_what_needs_a_gradient_gets_one():
    x, weight = torch.randn(2, 5, requires_grad=True), torch.randn(3, 5)
    y = mmkernels.decode_linear(x, weight, backend="native")
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, weight.sum(0).expand(2, 5))
    with torch.no_grad():
        assert not mmkernels.decode_linear(x, weight, backend="native").requires_grad


def test_opcheck():
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, bias = (torch.randn(*s).to(dtype) for s in ((2, 6), (5, 6), (5,)))
        torch.library.opcheck(ops.decode_linear.default, (x, weight, bias))
        args = tuple(t.requires_grad_() for t in (x, weight, bias))
        torch.library.opcheck(ops.decode_linear_fwd.default, args)
        torch.library.opcheck(ops.decode_linear_fwd.default, (*args[:2], None))


def test_float64_is_not_mixed_in_the_kernel():
    with pytest.raises(RuntimeError, match="float64 must be the dtype of every tensor or of none"):
        ops.decode_linear(torch.zeros(1, 3), torch.zeros(2, 3).double(), None)
