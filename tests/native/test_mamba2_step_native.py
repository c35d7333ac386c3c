"""The C++ mamba2_step: every ISA level, dtype and thread count; opcheck; views."""

import pytest
import torch

import mmkernels
from mmkernels import _native
from mmkernels.testing import assert_within, poisoned_allocations
from mmkernels.testing.cases_mamba2_step import step_inputs

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ops = torch.ops.mmkernels


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request):
    if request.param not in _native.isa_levels():
        pytest.skip(f"this CPU has no {request.param}")
    with _native.use_isa(request.param):
        yield request.param


def run(args, backend, dtype=None):
    args = {k: v.to(dtype or v.dtype, copy=True) if isinstance(v, torch.Tensor) else v for k, v in args.items()}
    out = mmkernels.mamba2_step(**args, backend=backend)
    outs = out if isinstance(out, tuple) else (out,)
    return dict(enumerate(outs)) | {name: args[name] for name in ("conv_state", "ssm_state")}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((1, 33, 2, 5, 17), {"biases": True}),
        ((3, 16, 4, 8, 16), {"groups": 2, "norm_before_gate": True, "from_module": True}),
        ((2, 70, 3, 16, 9), {"block": False, "gated_norm": False}),
        ((9, 48, 4, 16, 16), {"first": True, "width": 2}),
    ],
)
def test_error_bar(isa, dtype, sizes, options):
    made = step_inputs(torch.Generator().manual_seed(0), *sizes, **options)
    made = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in made.items()}
    truth, peer = run(made, "reference", torch.float64), run(made, "torch")
    with poisoned_allocations():
        got = run(made, "native")
    for name, value in got.items():
        assert value.dtype == peer[name].dtype
        wide = dtype == torch.float64
        terms = 64 if wide else 1  # in float64 the truth rounds as well
        assert_within(str(name), value, truth[name], peer[name], dtype=dtype, terms=terms, summands=0 if wide else 100)


def test_bits_depend_neither_on_threads_nor_on_the_batch(isa):
    made = step_inputs(torch.Generator().manual_seed(0), 3, 192, 6, 64, 64)
    made = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in made.items()}
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(made, "native"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(other[name], value) for name, value in results[0].items())
    rows = ("hidden", "residual", "conv_state", "ssm_state")
    alone = run({k: v[1:2] if k in rows else v for k, v in made.items()}, "native")
    assert all(torch.equal(alone[name], value[1:2]) for name, value in results[0].items())


def test_views_and_foreign_parameter_dtypes():
    made = step_inputs(torch.Generator().manual_seed(0), 2, 20, 4, 6, 8)
    made = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in made.items()}
    want = run(made, "native")
    view = dict(made)
    view["hidden"] = made["hidden"].t().contiguous().t()
    view["residual"] = torch.cat([made["residual"]] * 2, 1)[:, :20]
    view["A_log"] = made["A_log"].repeat_interleave(2)[::2]
    view["in_weight"] = torch.cat([made["in_weight"]] * 2, 1)[:, :20]
    view["conv_weight"] = made["conv_weight"].t().contiguous().t()
    view["gate_weight"] = made["gate_weight"].repeat_interleave(2)[::2]
    view["norm_weight"] = made["norm_weight"].repeat_interleave(2)[::2]
    cache = torch.full((2, 7, 10, 20), float("nan"))
    cache[:, 1:5, 2:8, 3:11] = made["ssm_state"]
    view["ssm_state"] = cache[:, 1:5, 2:8, 3:11]
    out = mmkernels.mamba2_step(**view, backend="native")
    assert torch.equal(out[0], want[0])
    assert torch.equal(out[1], want[1])
    assert torch.equal(view["ssm_state"], want["ssm_state"])
    assert cache[:, 0].isnan().all()
    mixed = {
        **made,
        "A_log": made["A_log"].double(),
        "D": made["D"].bfloat16(),
        "norm_weight": made["norm_weight"].half(),
    }
    truth, peer, got = run(mixed, "reference", torch.float64), run(mixed, "torch"), run(mixed, "native")
    for name in got:
        assert_within(str(name), got[name], truth[name], peer[name], summands=100)


def test_opcheck():
    names = [
        "hidden",
        "conv_state",
        "ssm_state",
        "in_weight",
        "conv_weight",
        "A_log",
        "dt_bias",
        "D",
        "out_weight",
        "residual",
        "norm_weight",
        "in_bias",
        "conv_bias",
        "gate_weight",
        "out_bias",
    ]
    for options in ({}, {"block": False, "gated_norm": False, "biases": True}):
        made = step_inputs(torch.Generator().manual_seed(0), 2, 6, 2, 3, 4, **options)
        tensors = [None if made.get(n) is None else made[n].float() for n in names]
        torch.library.opcheck(ops.mamba2_step.default, (*tensors, 1e-5, 1e-5, 0.0, float("inf"), False, True))
