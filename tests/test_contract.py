"""What every op owes its users, checked for every case and every backend.  A new op is tested here by registering it.

The truth is `reference` in float64.  A backend in a given dtype may be wrong by at most twice what its peer (the plain
implementation in the same dtype) is wrong, plus one rounding of the result.
"""

import inspect
from pathlib import Path

import pytest
import torch

import mmkernels
from mmkernels._dispatch import registered
from mmkernels.testing import CASES, assert_within, poisoned_allocations

ROOT = Path(__file__).resolve().parents[1]
OPS = registered()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PEER = {"native": "torch", "triton": "torch", "torch": "reference"}


def backends_of(op: str, *, testable=("native", "torch")) -> list[str]:
    ready = mmkernels.backends()[op]
    return [name for name in OPS[op].entries if name in testable and ready[name] == "ready"]


def pairs(small_only: bool = False, testable=("native", "torch"), pure_only: bool = False):
    # an op that updates its state in place has no gradients of its own: the scan it belongs to has them
    return [
        pytest.param(case, backend, id=f"{op}-{backend}-{case.id}")
        for op in OPS
        for backend in backends_of(op, testable=testable)
        for case in CASES.get(op, [])
        if (case.small or not small_only) and not (pure_only and case.mutates)
    ]


def differentiable(case, args):
    return {
        k: v for k, v in args.items() if isinstance(v, torch.Tensor) and v.is_floating_point() and k not in case.mutates
    }


def cotangents(outputs):
    """Fixed float64 directions, the same for every backend and dtype."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(out.shape, generator=generator, dtype=torch.float64) for out in outputs]


def forward_backward(case, backend, dtype, values):
    """Outputs and gradients of one run in `dtype` from the same float64 values (rounded once to dtype)."""
    args = {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in values.items()}
    if not case.mutates:
        for value in differentiable(case, args).values():
            value.requires_grad_()
    outputs = case.run(args, backend)
    if case.mutates:
        return outputs, {}
    used = [(o, c) for o, c in zip(outputs, cotangents(outputs), strict=True) if o.requires_grad]
    loss_terms = [
        (o * c.to(o.dtype)).sum(dtype=torch.float64 if dtype == torch.float64 else torch.float32) for o, c in used
    ]
    names = list(differentiable(case, args))
    wanted = [args[n] for n in names]
    # No dependence and a gradient of zeros are the same answer.
    grads = torch.autograd.grad(sum(loss_terms), wanted, materialize_grads=True) if used else []
    return outputs, {n: g for n, g in zip(names, grads, strict=False) if g is not None}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(("case", "backend"), pairs())
def test_error_bar(case, backend, dtype, count_backend):
    # Inputs are rounded to dtype first, so that only the arithmetic is judged.
    rounded = case.args(dtype)
    values = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in rounded.items()}
    truth_out, truth_grad = forward_backward(case, "reference", torch.float64, values)
    peer_out, peer_grad = forward_backward(case, PEER[backend], dtype, values)
    with poisoned_allocations():
        outputs, grads = forward_backward(case, backend, dtype, values)
    for i, (out, truth, peer) in enumerate(zip(outputs, truth_out, peer_out, strict=True)):
        assert_within(f"output {i}", out, truth, peer, dtype=dtype, summands=case.summands)
    assert set(grads) == set(truth_grad)
    for name, grad in grads.items():
        assert grad.dtype == dtype
        assert_within(f"grad of {name}", grad, truth_grad[name], peer_grad[name], dtype=dtype, summands=case.summands)
    count_backend(case.op, backend)


@pytest.mark.parametrize(
    ("case", "backend"), pairs(small_only=True, testable=("native", "torch", "reference"), pure_only=True)
)
def test_gradients_by_finite_differences(case, backend, count_backend):
    args = case.args(torch.float64, grad=True)
    names = list(differentiable(case, args))

    def function(*tensors):
        return case.run({**args, **dict(zip(names, tensors, strict=True))}, backend)

    tensors = tuple(args[n] for n in names)
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True, atol=1e-4)
    count_backend(case.op, backend)


@pytest.mark.parametrize(("case", "backend"), pairs(small_only=True))
def test_fullgraph_compile_with_dynamic_shapes(case, backend):
    torch._dynamo.reset()
    args = case.args(torch.float32)
    public = getattr(mmkernels, case.op)

    def call(args):
        return public(**args, backend=backend)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    copies = [{k: v.clone() if k in case.mutates else v for k, v in args.items()} for _ in range(2)]
    expected, actual = call(copies[0]), compiled(copies[1])
    for want, got in zip(_flat(expected, copies[0], case), _flat(actual, copies[1], case), strict=True):
        torch.testing.assert_close(got, want)


def _flat(out, args, case):
    return (*(out if isinstance(out, tuple) else (out,)), *(args[n] for n in case.mutates))


@pytest.mark.parametrize("op", OPS)
def test_an_op_is_complete(op):
    entry = OPS[op]
    folder = entry.public.split(".")[-3]
    lacking = [name for name in ("reference", "torch") if name not in entry.entries]
    lacking += [] if any(case.small for case in CASES.get(op, [])) else ["small test cases"]
    wanted = [
        f"mmkernels/ops/{folder}/README.md",
        f"tests/ops/test_{folder}.py",
        f"benchmarks/ops/bench_{folder}.py",
        f"docs/ops/{folder}.md",
    ]
    lacking += [path for path in wanted if not (ROOT / path).exists()]
    docstring = inspect.getdoc(getattr(mmkernels, op)) or ""
    lacking += [
        f"docstring section {s!r}"
        for s in ("Args:", "Returns:", "Raises:", "Numerics:", "Cost:", "Example:", "Source:")
        if s not in docstring
    ]
    assert not lacking, f"{op} lacks: {', '.join(lacking)}"
