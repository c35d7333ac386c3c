"""Calls that go straight to the native library op (`Op.direct`): when they may, when not, and that nobody notices."""

import pytest
import torch

import mmkernels
from mmkernels import _dispatch
from mmkernels.errors import BackendError, ConfigError, DeviceError, DtypeError, ShapeError
from mmkernels.ops.causal_conv1d.api import CAUSAL_CONV1D_UPDATE
from mmkernels.ops.decode_linear import api as linear_api
from mmkernels.ops.decode_linear.api import DECODE_LINEAR
from mmkernels.ops.ssd.api import SSD_UPDATE

OPS = {op.name: op for op in (SSD_UPDATE, CAUSAL_CONV1D_UPDATE, DECODE_LINEAR)}
pytestmark = pytest.mark.skipif(
    SSD_UPDATE.entries["native"].unavailable() is not None, reason="the native library cannot be had here"
)


def arguments(name, dtype=torch.float32):
    """A good call: (names of arguments written in place, keyword arguments)."""
    make = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=make).to(dtype)

    if name == "ssd_update":
        sizes = {"state": (2, 4, 3, 5), "x": (2, 4, 3), "dt": (2, 4), "A": (4,), "B": (2, 2, 5), "C": (2, 2, 5)}
        args = {key: normal(*size) for key, size in {**sizes, "D": (4,), "z": (2, 4, 3)}.items()}
        return ("state",), {**args, "A": -args["A"].abs(), "dt_softplus": True}
    if name == "causal_conv1d_update":
        sizes = {"x": (2, 6), "conv_state": (2, 6, 3), "weight": (6, 4), "bias": (6,)}
        return ("conv_state",), {**{key: normal(*size) for key, size in sizes.items()}, "activation": "silu"}
    return (), {"x": normal(2, 6), "weight": normal(4, 6), "bias": normal(4)}


def run(name, args, **options):
    """(y, *arguments written in place), on copies."""
    written, _ = arguments(name)
    args = {**args, **{key: args[key].clone() for key in written}}
    y = getattr(mmkernels, name)(**args, **options)
    return (y, *(args[key] for key in written))


@pytest.fixture
def direct_calls(monkeypatch):
    """Names of the ops that computed a direct call, in order; every op is loaded and gradients are off."""
    calls = []
    with torch.no_grad():
        for name, op in OPS.items():
            run(name, arguments(name)[1])
            library_op = op.entries["native"].library_op

            def counted(*args, _name=name, _op=library_op):
                y = _op(*args)
                calls.append(_name)
                return y

            monkeypatch.setattr(op.entries["native"], "library_op", counted)
        yield calls


every_op = pytest.mark.parametrize("name", OPS)


@every_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", ["few", "all"])
def test_a_direct_call_gives_the_bits_of_an_ordinary_one(name, dtype, options, direct_calls):
    _, args = arguments(name, dtype)
    if options == "few":
        args = {key: value for key, value in args.items() if key not in ("z", "bias", "activation", "dt_softplus")}
    elif name == "ssd_update":
        args |= {"state_indices": torch.tensor([1, -1]), "dt_limit": (0.25, 0.5), "dt_bias": args["A"].to(dtype)}
    elif name == "causal_conv1d_update":
        args |= {"state_indices": torch.tensor([1, -1])}
    direct, named = run(name, args), run(name, args, backend="native")
    with torch.enable_grad():
        ordinary = run(name, args)
    assert direct_calls == [name, name]
    for a, b, c in zip(direct, named, ordinary, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, c)


@every_op
def test_what_forces_a_backend_takes_effect_after_direct_calls(name, direct_calls, monkeypatch):
    _, args = arguments(name)
    expected = run(name, args)
    calls = list(direct_calls)
    others = [run(name, args, backend="torch")]
    with mmkernels.use_backend("torch"):
        others.append(run(name, args))
    with mmkernels.use_backend(**{name: "reference"}):
        others.append(run(name, args))
    assert mmkernels.explain(name, **args).chosen == "native"
    with monkeypatch.context() as patch:
        patch.setattr(_dispatch, "_FORCED", "torch")
        others.append(run(name, args))
    with pytest.raises(BackendError, match="Did you mean 'native'"):
        run(name, args, backend="nativ")
    assert direct_calls == calls
    for other in others:
        for a, b in zip(other, expected, strict=True):
            torch.testing.assert_close(a, b)
    run(name, args)
    assert direct_calls == [*calls, name]


BAD = [
    ("ssd_update", {"x": torch.zeros(2, 4)}, ShapeError, "x must have shape"),
    ("ssd_update", {"x": torch.zeros(2, 4, 3).int()}, DtypeError, "x must be float32"),
    ("ssd_update", {"x": None}, DtypeError, "x must be a tensor"),
    ("ssd_update", {"dt": torch.zeros(2, 5)}, ShapeError, "dt must have shape"),
    ("ssd_update", {"dt": torch.zeros(2, 1, 4)}, ShapeError, "dt must have shape"),
    ("ssd_update", {"A": torch.zeros(4, 1)}, ShapeError, "A must have shape"),
    ("ssd_update", {"A": torch.zeros(4).int()}, DtypeError, "A must be float32"),
    ("ssd_update", {"A": [0.0] * 4}, DtypeError, "A must be a tensor"),
    ("ssd_update", {"B": torch.zeros(2, 3, 5)}, ShapeError, "must divide|must have shape"),
    ("ssd_update", {"B": torch.zeros(2, 2, 5).bfloat16()}, DtypeError, "B must have the dtype of x"),
    ("ssd_update", {"C": torch.zeros(2, 2, 5).half()}, DtypeError, "C must have the dtype of x"),
    ("ssd_update", {"C": torch.zeros(2, 2, 6)}, ShapeError, "C must have shape"),
    ("ssd_update", {"z": torch.zeros(2, 4, 3).half()}, DtypeError, "z must have the dtype of x"),
    ("ssd_update", {"z": torch.zeros(2, 4, 1)}, ShapeError, "z must have shape"),
    ("ssd_update", {"D": torch.zeros(4, 2)}, ShapeError, "D must have shape"),
    ("ssd_update", {"D": torch.zeros(())}, ShapeError, "D must have shape"),
    ("ssd_update", {"dt_bias": torch.zeros(1)}, ShapeError, "dt_bias must have shape"),
    ("ssd_update", {"dt_limit": (1.0, 0.5)}, ShapeError, "dt_limit must satisfy"),
    ("ssd_update", {"dt_limit": (-1.0, 0.5)}, ShapeError, "dt_limit must satisfy"),
    ("ssd_update", {"dt_limit": (float("nan"), 0.5)}, ShapeError, "dt_limit must satisfy"),
    ("ssd_update", {"dt_limit": (0.0, 0.5, 1.0)}, DtypeError, "dt_limit must be a pair"),
    ("ssd_update", {"dt_limit": ()}, DtypeError, "dt_limit must be a pair"),
    ("ssd_update", {"state": torch.zeros(3, 4, 3, 5)}, ShapeError, "state must have shape"),
    ("ssd_update", {"state": torch.zeros(2, 4, 3, 5).int()}, DtypeError, "state must be float32"),
    ("ssd_update", {"state_indices": torch.zeros(2)}, DtypeError, "state_indices must be int32"),
    ("ssd_update", {"state_indices": torch.zeros(3).int()}, ShapeError, "state_indices must have shape"),
    ("ssd_update", {"dt": torch.zeros(2, 4, device="meta")}, DeviceError, "dt must be on cpu"),
    ("causal_conv1d_update", {"x": torch.zeros(6)}, ShapeError, "x must have shape"),
    ("causal_conv1d_update", {"x": torch.zeros(2, 6).bool()}, DtypeError, "x must be float32"),
    ("causal_conv1d_update", {"weight": torch.zeros(6, 0)}, ShapeError, "width >= 1"),
    ("causal_conv1d_update", {"weight": torch.zeros(6, 1, 4)}, ShapeError, "weight must have shape"),
    ("causal_conv1d_update", {"weight": torch.zeros(6, 5)}, ShapeError, "conv_state must hold"),
    ("causal_conv1d_update", {"bias": torch.zeros(6).int()}, DtypeError, "bias must be float32"),
    ("causal_conv1d_update", {"bias": torch.zeros(1)}, ShapeError, "bias must have shape"),
    ("causal_conv1d_update", {"conv_state": torch.zeros(3, 6, 3)}, ShapeError, "conv_state must have shape"),
    ("causal_conv1d_update", {"activation": "relu"}, ConfigError, "activation must be None or 'silu'"),
    ("causal_conv1d_update", {"state_indices": torch.zeros(2, 1).int()}, ShapeError, "state_indices must have shape"),
    ("causal_conv1d_update", {"weight": torch.zeros(6, 4, device="meta")}, DeviceError, "weight must be on cpu"),
    ("decode_linear", {"x": torch.tensor(1.0)}, ShapeError, "x must have shape"),
    ("decode_linear", {"weight": torch.zeros(4, 5)}, ShapeError, "weight must have shape"),
    ("decode_linear", {"weight": torch.zeros(4, 6).int()}, DtypeError, "weight must be float32"),
    ("decode_linear", {"bias": torch.zeros(5)}, ShapeError, "bias must have shape"),
    ("decode_linear", {"bias": torch.zeros(4).int()}, DtypeError, "bias must be float32"),
    ("decode_linear", {"bias": torch.zeros(4, device="meta")}, DeviceError, "bias must be on cpu"),
]


@pytest.mark.parametrize(("name", "change", "error", "message"), BAD)
def test_bad_input_after_a_good_call_is_named_and_changes_nothing(name, change, error, message, direct_calls):
    written, args = arguments(name)
    run(name, args)
    bad = {**args, **change}
    before = {key: bad[key].clone() for key in written}
    for _ in range(2):
        with pytest.raises(error, match=message) as caught:
            getattr(mmkernels, name)(**bad)
        assert str(caught.value).startswith(f"{name}: ")
    for key, value in before.items():
        assert torch.equal(bad[key], value)


@pytest.mark.parametrize("name", ["ssd_update", "causal_conv1d_update"])
def test_a_call_the_library_op_refuses_is_computed_once(name, direct_calls):
    (written,), args = arguments(name, torch.float64)
    exact = run(name, args)
    assert direct_calls == [name]
    mixed = run(name, {**args, written: args[written].float()})  # float64 with a float32 state: in Python
    torch.testing.assert_close(mixed, tuple(t.to(m.dtype) for t, m in zip(exact, mixed, strict=True)))


def test_slots_out_of_range_are_refused(direct_calls):
    _, args = arguments("ssd_update")
    with pytest.raises(RuntimeError, match="state_indices must be below 2; got 2"):
        run("ssd_update", {**args, "state_indices": torch.tensor([0, 2])})


@every_op
def test_gradients_transforms_modes_subclasses_and_fakes_go_the_ordinary_way(name, direct_calls):
    class Wrapped(torch.Tensor):
        pass

    _, args = arguments(name)
    expected = run(name, args)[0]
    del direct_calls[:]
    assert torch.equal(run(name, {**args, "x": args["x"].as_subclass(Wrapped)})[0], expected)
    with torch.enable_grad():
        y = run(name, {**args, "x": args["x"].clone().requires_grad_()})[0]
        assert y.requires_grad
    _, tangent = torch.func.jvp(lambda x: run(name, {**args, "x": x})[0], (args["x"],), (torch.ones_like(args["x"]),))
    assert tangent.abs().sum() > 0
    meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in args.items()}
    assert run(name, meta)[0].device.type == "meta"
    with torch._subclasses.FakeTensorMode() as mode:
        fake = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in args.items()}
        assert run(name, fake)[0].shape == expected.shape
        with pytest.raises(ShapeError):
            run(name, {**fake, "x": torch.zeros(2, 7)})
    assert direct_calls == []
    parameter = "A" if name == "ssd_update" else "weight"  # a subclass elsewhere is the library op's affair
    assert torch.equal(run(name, {**args, parameter: args[parameter].as_subclass(Wrapped)})[0], expected)


def test_a_lazily_negated_tensor_is_read_with_its_sign(direct_calls):
    _, args = arguments("decode_linear")
    negated = torch.complex(torch.zeros(2, 6), args["x"]).conj().imag
    assert negated.is_neg()
    y, expected = (run("decode_linear", {**args, "x": x})[0] for x in (negated, -args["x"]))
    assert torch.equal(y, expected)
    assert direct_calls == ["decode_linear"] * 2


def test_the_compiler_traces_a_call_that_has_gone_directly(direct_calls):
    torch._dynamo.reset()
    _, args = arguments("causal_conv1d_update")
    expected = run("causal_conv1d_update", args)
    del direct_calls[:]
    compiled = torch.compile(mmkernels.causal_conv1d_update, fullgraph=True, backend="aot_eager")
    state = args.pop("conv_state").clone()
    y = compiled(args.pop("x"), state, **args)
    assert torch.equal(y, expected[0])
    assert torch.equal(state, expected[1])
    assert direct_calls == []


def test_signatures_of_ordinary_calls_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(linear_api._verified, "LIMIT", 4, raising=False)
    weight = torch.zeros(4, 6)
    for rows in range(12):
        mmkernels.decode_linear(torch.zeros(rows, 6), weight)
        assert len(linear_api._verified._known) <= 4
