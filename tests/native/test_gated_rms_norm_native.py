"""The C++ gated RMS norm: every ISA level, dtype and thread count; gradients of gradients; opcheck; compile."""

import itertools
import re
import sys
from pathlib import Path

import pytest
import torch

import mmkernels
from mmkernels import _native
from mmkernels.testing import assert_within, poisoned_allocations

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
F32, F64 = torch.float32, torch.float64
ops = torch.ops.mmkernels


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request):
    if request.param not in _native.isa_levels():
        pytest.skip(f"this CPU has no {request.param}")
    with _native.use_isa(request.param):
        yield request.param


def inputs(dtype, shape=(3, 5, 70), *, group_size=35, gate=True, bias=True, shared=False, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    made = {
        name: torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
        for name, size, wanted in (
            ("x", shape, True),
            ("weight", (group_size if shared else shape[-1],), True),
            ("z", shape, gate),
            ("bias", (group_size if shared else shape[-1],), bias),
        )
        if wanted
    }
    return {**made, "group_size": group_size, **options}


def run(args, backend, dtype=None):
    """Output and gradients in every tensor, by name."""
    args = {
        k: v.detach().to(dtype or v.dtype).requires_grad_() if isinstance(v, torch.Tensor) else v
        for k, v in args.items()
    }
    y = mmkernels.gated_rms_norm(**args, backend=backend)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(
        args["x"].dtype
    )
    names = [k for k, v in args.items() if isinstance(v, torch.Tensor)]
    grads = torch.autograd.grad(y, [args[n] for n in names], cotangent.to(y.dtype))
    return {"y": y.detach(), **dict(zip(names, grads, strict=True))}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("gate", "last"), [(False, False), (True, False), (True, True)], ids=["plain", "first", "last"]
)
def test_error_bar(isa, dtype, gate, last):
    # Group sizes around the vector widths 4, 8 and 16, and one that is several vectors and a rest.
    for group_size, shared, bias in ((3, False, True), (7, True, True), (16, False, False), (35, True, False)):
        args = inputs(
            dtype,
            (2, 3, 2 * group_size),
            group_size=group_size,
            gate=gate,
            bias=bias,
            shared=shared,
            norm_before_gate=last,
        )
        truth, peer = run(args, "reference", torch.float64), run(args, "torch")
        with poisoned_allocations():
            got = run(args, "native")
        for name, value in got.items():
            assert value.dtype == dtype
            # In float64 the truth is rounded like the result: its own error, some ten roundings, is part of the band.
            terms = 16 if dtype == torch.float64 else 1
            assert_within(f"{name}, group {group_size}", value, truth[name], peer[name], dtype=dtype, terms=terms)


@pytest.mark.parametrize("rows", [33, 100, 5000])
def test_parameter_gradients_are_summed_over_all_rows(isa, rows):
    # Rows are summed in blocks of 32 or more, at most 64 of them: two blocks, an uneven last one, blocks of 79 rows.
    args = inputs(F32, (rows, 6), group_size=3, shared=rows == 100)
    truth, peer, got = run(args, "reference", F64), run(args, "torch"), run(args, "native")
    for name in ("weight", "bias"):
        # Random signs: a sum of n terms of size one has magnitude sqrt(n), and each of the block's and the blocks' sums
        # (at most 79 + 64 additions) may round once; errors of random sign add up to the root of their number.
        assert_within(name, got[name], truth[name], peer[name], terms=12)


def test_groups_of_one_channel(isa):
    args = inputs(torch.float32, (4, 9), group_size=1)
    truth, peer = run(args, "reference", torch.float64), run(args, "torch")
    # The gradient in x and z is eps / rms^2 of what cancels, so only the other results have digits to compare.
    for name in ("y", "weight", "bias"):
        assert_within(name, run(args, "native")[name], truth[name], peer[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(isa, dtype):
    # 300 rows are ten blocks of parameter gradients and enough elements for two threads to be used.
    args = inputs(dtype, (300, 512), group_size=128, shared=True)
    results = {}
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results[threads] = run(args, "native")
    finally:
        torch.set_num_threads(before)
    for threads, name in itertools.product((2, 3), results[1]):
        assert torch.equal(results[1][name], results[threads][name]), f"{name} at {threads} threads"


def test_rows_are_read_through_their_strides(isa):
    wide = torch.randn(4, 6, 40)
    dense = {"x": wide[..., 3:23].contiguous(), "z": wide[:, ::2].repeat_interleave(2, 1)[..., 20:].contiguous()}
    views = {
        "columns of a projection": {"x": wide[..., 3:23], "z": dense["z"]},
        "transposed batch": {
            "x": dense["x"].transpose(0, 1).contiguous().transpose(0, 1),
            "z": dense["z"].transpose(0, 2).contiguous().transpose(0, 2),
        },
    }
    weight = torch.randn(20)
    want = mmkernels.gated_rms_norm(dense["x"], weight, z=dense["z"], backend="native")
    for name, view in views.items():
        got = mmkernels.gated_rms_norm(view["x"], weight, z=view["z"], backend="native")
        assert torch.equal(got, want), name
    row = torch.randn(20)
    got = mmkernels.gated_rms_norm(row.expand(5, 20), weight, backend="native")
    assert torch.equal(got, mmkernels.gated_rms_norm(row.repeat(5, 1), weight, backend="native"))


def test_a_gradient_that_is_one_number_expanded(isa):
    def gradient(backend, dtype):
        args = {k: v.to(dtype) if k != "group_size" else v for k, v in inputs(F32).items()}
        args["x"].requires_grad_()
        (grad,) = torch.autograd.grad(mmkernels.gated_rms_norm(**args, backend=backend).sum(), args["x"])
        return grad

    assert_within("grad of x", *(gradient(b, d) for b, d in (("native", F32), ("reference", F64), ("torch", F32))))


def test_mixed_dtypes():
    args = inputs(torch.float32)
    # Weights of a bfloat16 model are often kept in float32; a float32 gate must not be rounded to bfloat16 first.
    mixed = {**args, "x": args["x"].bfloat16()}
    got, peer, truth = run(mixed, "native"), run(mixed, "torch"), run(mixed, "reference", torch.float64)
    for name, value in got.items():
        assert value.dtype == peer[name].dtype == (torch.bfloat16 if name in ("x", "y") else torch.float32)
        assert_within(name, value, truth[name], peer[name])


@pytest.mark.skipif(sys.platform != "linux", reason="large pages are asked for on Linux")
def test_large_outputs_ask_for_large_pages():
    y = mmkernels.gated_rms_norm(torch.ones(2**11, 2**12), torch.ones(2**12), backend="native")
    address = y.data_ptr() + y.nbytes // 2
    mappings = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    for mapping in mappings[1:]:
        begin, end = (int(bound, 16) for bound in mapping.split(" ", 1)[0].split("-"))
        if begin <= address < end:
            assert " hg" in re.search(r"VmFlags:(.*)", mapping).group(1)
            return
    raise AssertionError("the output's memory is not among the mappings")


def test_no_rows():
    for shape in ((0, 8), (2, 0, 8)):
        got = run(inputs(torch.float32, shape, group_size=4), "native")
        assert got["y"].shape == got["x"].shape == got["z"].shape == shape
        assert torch.equal(got["weight"], torch.zeros(8))
        assert torch.equal(got["bias"], torch.zeros(8))


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_gradients_of_gradients(last):
    args = inputs(torch.float64, (2, 6), group_size=3, shared=True, norm_before_gate=last)
    names = [k for k, v in args.items() if isinstance(v, torch.Tensor)]
    tensors = tuple(args[n].requires_grad_() for n in names)

    def norm(*values):
        return mmkernels.gated_rms_norm(**{**args, **dict(zip(names, values, strict=True))}, backend="native")

    assert torch.autograd.gradcheck(norm, tensors)
    assert torch.autograd.gradgradcheck(norm, tensors)

    def gradients(*values):
        # The incoming gradient itself depends on the inputs: it must not be counted twice.
        return torch.autograd.grad(norm(*values).sin().sum(), values, create_graph=True)

    assert torch.autograd.gradcheck(gradients, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(gradients, tensors, fast_mode=True)


def test_a_second_derivative_in_one_tensor_only():
    args = inputs(torch.float64, (2, 6), group_size=3)
    weight = args["weight"].requires_grad_()
    hessians = []
    for backend in ("native", "torch"):
        y = mmkernels.gated_rms_norm(**args, backend=backend)
        (grad,) = torch.autograd.grad(y.pow(3).sum(), weight, create_graph=True)
        hessians.append(torch.autograd.grad(grad.pow(2).sum(), weight)[0])
    torch.testing.assert_close(*hessians)


def positional(args):
    return (
        args["x"],
        args["weight"],
        args.get("z"),
        args.get("bias"),
        1e-5,
        args["group_size"],
        args.get("norm_before_gate", False),
    )


@pytest.mark.parametrize(("gate", "grad"), [(True, True), (False, False)], ids=["gate-grad", "plain-nograd"])
def test_opcheck(gate, grad):
    args = positional(inputs(torch.float32, (2, 3, 8), group_size=4, gate=gate, bias=gate))
    _, rstd = ops.gated_rms_norm_fwd(*args)
    torch.library.opcheck(ops.gated_rms_norm.default, args)
    args = tuple(a.requires_grad_(grad) if isinstance(a, torch.Tensor) else a for a in args)
    torch.library.opcheck(ops.gated_rms_norm_fwd.default, args)
    grad_y = torch.randn(2, 3, 8, requires_grad=grad)
    torch.library.opcheck(ops.gated_rms_norm_bwd.default, (grad_y, *args[:4], rstd, *args[4:], True))


@pytest.mark.slow  # inductor compiles C++ for a quarter of a minute
def test_compiled_with_dynamic_shapes():
    def call(x, weight, z):
        return mmkernels.gated_rms_norm(x * 2, weight, z=z, backend="native").tanh()

    compiled = torch.compile(call, fullgraph=True, dynamic=True)
    for rows in (3, 5, 17):
        tensors = [torch.randn(2, rows, 16, requires_grad=True), torch.randn(16, requires_grad=True)]
        tensors.append(torch.randn(2, rows, 40)[..., 5:21].requires_grad_())
        got, want = (torch.autograd.grad(f(*tensors).sum(), tensors) for f in (compiled, call))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


def test_transforms_that_the_library_op_cannot_see_through_are_declined():
    x, weight, direction = torch.randn(3, 8), torch.randn(8), torch.randn(3, 8)

    def norm(x, backend=None):
        return mmkernels.gated_rms_norm(x, weight, backend=backend)

    with pytest.raises(mmkernels.BackendError, match=r"forward-mode|torch\.func"):
        torch.func.jvp(lambda x: norm(x, "native"), (x,), (direction,))
    _, tangent = torch.func.jvp(norm, (x,), (direction,))
    _, want = torch.func.jvp(lambda x: norm(x, "torch"), (x,), (direction,))
    torch.testing.assert_close(tangent, want)


def test_an_isa_level_must_exist():
    with pytest.raises(RuntimeError, match="baseline, avx2, avx512 or avx512_bf16"):
        ops.set_isa("sse9")
    assert ops.isa() == ops.best_isa() in _native.isa_levels()
