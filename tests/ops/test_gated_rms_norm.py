"""What is special to the norm: its invariances, peers, extreme values, bad input (the rest: test_contract.py)."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import mmkernels
from mmkernels import DeviceError, DtypeError, ShapeError, gated_rms_norm
from mmkernels.testing import assert_within, poisoned_allocations
from mmkernels.testing.cases_gated_rms_norm import norm_inputs

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)
EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64: the same few operations in another order
READY = [name for name in ("native", "torch") if mmkernels.backends()["gated_rms_norm"][name] == "ready"]
every_backend = pytest.mark.parametrize("backend", [*READY, "reference"])


@st.composite
def problems(draw):
    """Keyword arguments of a random small call."""
    lead = draw(st.lists(st.integers(0, 3), max_size=3))
    groups, size = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return norm_inputs(
        generator,
        (*lead, groups * size),
        gate=draw(st.booleans()),
        bias=draw(st.booleans()),
        group_size=size,
        shared=draw(st.booleans()),
        norm_before_gate=draw(st.booleans()),
        eps=draw(st.sampled_from([1e-6, 1e-2])),
    )


@pytest.mark.parametrize("backend", READY)
@PROPERTY
@given(args=problems())
def test_equals_the_reference(backend, args):
    with poisoned_allocations():
        actual = gated_rms_norm(**args, backend=backend)
    torch.testing.assert_close(actual, gated_rms_norm(**args, backend="reference"), **EXACT)


@every_backend
def test_equals_torch_rms_norm(backend):
    args = norm_inputs(torch.Generator().manual_seed(0), (2, 5, 24), gate=False, eps=1e-4)
    expected = F.rms_norm(args["x"], (24,), args["weight"], eps=1e-4)
    torch.testing.assert_close(gated_rms_norm(**args, backend=backend), expected, **EXACT)


@every_backend
@pytest.mark.parametrize("before", [False, True])
def test_the_two_orders_are_the_documented_ones(backend, before):
    args = norm_inputs(torch.Generator().manual_seed(1), (3, 12), bias=True, group_size=4, norm_before_gate=before)
    x, z, weight, bias = (args[name].reshape(-1, 3, 4) for name in ("x", "z", "weight", "bias"))
    gate = z / (1 + torch.exp(-z))
    v = x if before else x * gate
    v = v / (v.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias
    v = v * gate if before else v
    torch.testing.assert_close(gated_rms_norm(**args, backend=backend), v.reshape(3, 12), **EXACT)


@every_backend
def test_groups_do_not_see_each_other(backend):
    args = norm_inputs(torch.Generator().manual_seed(2), (4, 12), group_size=4)
    y = gated_rms_norm(**args, backend=backend)
    args["x"][:, 4:8] *= 100
    changed = gated_rms_norm(**args, backend=backend)
    assert torch.equal(y[:, :4], changed[:, :4])
    assert torch.equal(y[:, 8:], changed[:, 8:])
    assert not torch.allclose(y[:, 4:8], changed[:, 4:8], rtol=0, atol=1e-7)


@every_backend
def test_scale_of_the_input_cancels_without_eps(backend):
    args = norm_inputs(torch.Generator().manual_seed(3), (4, 12), eps=0.0)
    y = gated_rms_norm(**args, backend=backend)
    args["x"] *= 2**20
    torch.testing.assert_close(gated_rms_norm(**args, backend=backend), y, **EXACT)


@every_backend
def test_a_shared_weight_is_a_repeated_weight(backend):
    args = norm_inputs(torch.Generator().manual_seed(4), (4, 12), group_size=3, shared=True, bias=True)
    repeated = {**args, "weight": args["weight"].repeat(4), "bias": args["bias"].repeat(4)}
    torch.testing.assert_close(
        gated_rms_norm(**args, backend=backend), gated_rms_norm(**repeated, backend=backend), rtol=0, atol=0
    )


@every_backend
def test_extreme_gates_and_zero_rows(backend):
    x = torch.tensor([[1.0, -2.0, 3.0, 0.5], [0.0, 0.0, 0.0, 0.0]], requires_grad=True)
    z = torch.tensor([[-200.0, 200.0, 0.0, 1.0], [-90.0, 90.0, 0.0, 1.0]], requires_grad=True)
    for before in (False, True):
        y = gated_rms_norm(x, torch.ones(4), z=z, norm_before_gate=before, backend=backend)
        grads = torch.autograd.grad(y.sum(), [x, z])
        assert all(torch.isfinite(t).all() for t in (y, *grads))
        assert torch.equal(y[1], torch.zeros(4))


@every_backend
def test_the_mean_square_is_float32(backend):
    # In float16 the squares overflow (300^2 > 65504), in bfloat16 the sum stops growing at 256 equal squares.
    for dtype, value, size in ((torch.float16, 300.0, 64), (torch.bfloat16, 1.0, 4096)):
        x = torch.full((1, size), value, dtype=dtype)
        y = gated_rms_norm(x, torch.ones(size, dtype=dtype), backend=backend)
        assert torch.equal(y, torch.ones_like(y))


@every_backend
@pytest.mark.parametrize("before", [False, True])
def test_16_bit_error_is_one_rounding(backend, before):
    args = norm_inputs(torch.Generator().manual_seed(5), (16, 64), group_size=32, norm_before_gate=before)
    rounded = {k: v.bfloat16() if isinstance(v, torch.Tensor) else v for k, v in args.items()}
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in rounded.items()}
    truth = gated_rms_norm(**wide, backend="reference")
    assert_within("y", gated_rms_norm(**rounded, backend=backend), truth, dtype=torch.bfloat16)


@every_backend
def test_parameters_and_gate_may_have_another_dtype(backend):
    args = norm_inputs(torch.Generator().manual_seed(6), (4, 12))
    x, weight = args["x"].bfloat16(), args["weight"].float().requires_grad_()
    for z in (args["z"].float(), args["z"].bfloat16()):
        y = gated_rms_norm(x, weight, z=z, backend=backend)
        assert y.dtype == torch.bfloat16
        assert torch.autograd.grad(y.float().sum(), weight)[0].dtype == torch.float32


@every_backend
def test_any_strides(backend):
    generator = torch.Generator().manual_seed(7)
    wide = torch.randn(3, 20, 24, generator=generator, dtype=torch.float64)
    weight = torch.randn(6, generator=generator, dtype=torch.float64)
    views = [
        wide[..., 3:9],
        wide.transpose(0, 2)[:6].transpose(0, 2),
        wide[:, ::2, ::4],
        wide[:1, :, :6].expand(3, -1, -1),
    ]
    for x in views:
        z = x.flip(1).transpose(0, 1).contiguous().transpose(0, 1)
        torch.testing.assert_close(
            gated_rms_norm(x, weight, z=z, backend=backend),
            gated_rms_norm(x.contiguous(), weight, z=z.contiguous(), backend=backend),
            **EXACT,
        )


X, W = torch.zeros(2, 6), torch.zeros(6)
BAD = [
    ({"x": torch.tensor(1.0)}, ShapeError, "x must have shape"),
    ({"x": X.int()}, DtypeError, "x must be float32"),
    ({"x": [1.0]}, DtypeError, "x must be a tensor"),
    ({"weight": torch.zeros(5)}, ShapeError, "weight must have shape"),
    ({"weight": None}, DtypeError, "weight must be a tensor"),
    ({"z": torch.zeros(3, 6)}, ShapeError, "z must have shape"),
    ({"bias": torch.zeros(3)}, ShapeError, "bias must have shape"),
    ({"group_size": 4}, ShapeError, "group_size must divide dim"),
    ({"group_size": 0}, ShapeError, "group_size must divide dim"),
    ({"group_size": 3, "weight": torch.zeros(3), "bias": W}, ShapeError, "bias must have shape"),
    ({"eps": -1.0}, ShapeError, "eps must be >= 0"),
    ({"weight": W.to("meta")}, DeviceError, "weight must be on cpu"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message) as caught:
        gated_rms_norm(**{"x": X, "weight": W, **change})
    assert str(caught.value).startswith("gated_rms_norm: ")
