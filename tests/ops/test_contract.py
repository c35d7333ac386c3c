"""What every op owes its users, checked for every case and every backend.  A new op is tested here by registering it.

The truth is `reference` in float64.  A backend in a given dtype may be wrong by at most twice what its peer (the plain
implementation in the same dtype) is wrong, plus one rounding of the result.
"""

import inspect
from pathlib import Path

import pytest
import torch

import mmkernels
from mmkernels import _triton
from mmkernels._dispatch import registered
from mmkernels.testing import CASES
from mmkernels.testing.contract import check_error_bar, differentiable

ROOT = Path(__file__).resolve().parents[2]
OPS = registered()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ("native", "triton", "torch")


def backends_of(op: str, *, testable=BACKENDS) -> list[str]:
    # Compiled Triton kernels want CUDA tensors: tests/triton/test_gpu.py.  Here they run in the interpreter or not.
    ready = {**mmkernels.backends()[op], **({} if _triton.interpreting() else {"triton": "compiled"})}
    return [name for name in OPS[op].entries if name in testable and ready[name] == "ready"]


def pairs(small_only: bool = False, testable=BACKENDS, pure_only: bool = False):
    # an op that updates its state in place has no gradients of its own: the scan it belongs to has them
    return [
        pytest.param(case, backend, id=f"{op}-{backend}-{case.id}")
        for op in OPS
        for backend in backends_of(op, testable=testable)
        for case in CASES.get(op, [])
        if (case.small or not small_only) and not (pure_only and case.mutates)
        if not (case.heavy and backend == "triton" and _triton.interpreting())
    ]


FIRST = {op: next(case for case in cases if case.small) for op, cases in CASES.items()}


def once_interpreted(chosen):
    # For checks of how an op is registered, not of its numbers: those the error bar has judged, gradients included, and
    # finite differences take Triton's interpreter up to a minute a case.  There it does one case an op.
    slow = "triton" if _triton.interpreting() else None
    return [p for p in chosen if p.values[1] != slow or p.values[0] is FIRST[p.values[0].op]]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(("case", "backend"), pairs())
def test_error_bar(case, backend, dtype, count_backend):
    check_error_bar(case, backend, dtype)
    count_backend(case.op, backend)


@pytest.mark.parametrize(
    ("case", "backend"),
    once_interpreted(pairs(small_only=True, testable=(*BACKENDS, "reference"), pure_only=True)),
)
def test_gradients_by_finite_differences(case, backend, count_backend):
    args = case.args(torch.float64, grad=True)
    names = list(differentiable(case, args))

    def function(*tensors):
        outs = case.run({**args, **dict(zip(names, tensors, strict=True))}, backend)
        return tuple(out for out in outs if out.is_floating_point())  # indices and masks have no differences to take

    tensors = tuple(args[n] for n in names)
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True, atol=1e-4)
    count_backend(case.op, backend)


@pytest.mark.parametrize(("case", "backend"), once_interpreted(pairs(small_only=True)))
def test_fullgraph_compile_with_dynamic_shapes(case, backend):
    torch._dynamo.reset()
    args = case.args(torch.float32)
    public = getattr(mmkernels, case.op)

    def call(args):
        return public(**args, backend=backend)

    # AOTAutograd asks for what we register: fakes, gradients, mutation.  The torch backend registers nothing, so one
    # case an op goes all the way, and the others show that they are one graph with dynamic shapes.
    through = "eager" if backend == "torch" and case is not FIRST[case.op] else "aot_eager"
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=through)
    copies = [{k: v.clone() if k in case.mutates else v for k, v in args.items()} for _ in range(2)]
    expected, actual = call(copies[0]), compiled(copies[1])
    for want, got in zip(_flat(expected, copies[0], case), _flat(actual, copies[1], case), strict=True):
        torch.testing.assert_close(got, want)


def test_cases_go_to_a_device_with_all_they_are_made_of():
    for case in (case for cases in CASES.values() for case in cases):
        for name, value in case.args(device="meta").items():
            device = getattr(value, "device", None)  # a mask has one too
            assert device is None or device.type == "meta", f"{case.op} {case.id}: {name} stays on {device}"


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
