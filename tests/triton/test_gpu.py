"""The error bar of the contract on a CUDA device (`make gpu`): every case, on every backend that runs there."""

import pytest
import torch

import mmkernels
from mmkernels import _triton
from mmkernels._dispatch import registered
from mmkernels.testing import CASES
from mmkernels.testing.contract import check_error_bar

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PAIRS = [
    pytest.param(case, backend, id=f"{op}-{backend}-{case.id}")
    for op, entry in registered().items()
    for backend in entry.entries
    if backend in ("triton", "torch") and (backend != "triton" or _triton.probe() is None)
    for case in CASES[op]
]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(("case", "backend"), PAIRS)
def test_error_bar_on_the_device(case, backend, dtype, count_backend):
    check_error_bar(case, backend, dtype, "cuda")
    count_backend(case.op, backend)


@pytest.mark.parametrize("op", [op for op, entry in registered().items() if "triton" in entry.entries])
def test_triton_is_the_automatic_choice(op):
    args = CASES[op][0].args(device="cuda")
    assert mmkernels.explain(op, **args).chosen == "triton"


@pytest.mark.parametrize("op", [op for op, entry in registered().items() if "triton" in entry.entries])
def test_the_compiler_keeps_it_in_one_graph(op):
    torch._dynamo.reset()
    case = CASES[op][0]
    args = case.args(device="cuda")
    copies = [{k: v.clone() if k in case.mutates else v for k, v in args.items()} for _ in range(2)]
    public = getattr(mmkernels, op)
    compiled = torch.compile(lambda args: public(**args, backend="triton"), fullgraph=True)
    torch.testing.assert_close(compiled(copies[0]), public(**copies[1], backend="triton"))
