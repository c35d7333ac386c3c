"""What is special to mamba2_step: it equals its parts and the mixer's forward, when layers use it, bad input."""

import pytest
import torch
from torch import nn

import mmkernels
from mmkernels import DeviceError, DtypeError, ShapeError, mamba2_step
from mmkernels.layers import Mamba2Block, Mamba2Mixer
from mmkernels.testing import assert_within
from mmkernels.testing.cases_mamba2_step import step_inputs

READY = [name for name in ("native", "torch") if mmkernels.backends()["mamba2_step"][name] == "ready"]
every_backend = pytest.mark.parametrize("backend", [*READY, "reference"])
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OPTIONS = [
    {},
    {"ngroups": 4, "norm_before_gate": True},
    {"ngroups": 2, "rmsnorm": False, "D_has_hdim": True},
    {"bias": True, "conv_bias": False, "d_conv": 2, "dt_limit": (0.02, 0.05)},
]


def build_block(dtype, **options):
    torch.manual_seed(0)
    mixer = Mamba2Mixer(24, **{"headdim": 6, "d_state": 7, "dtype": dtype, **options})
    block = Mamba2Block(24, mixer=mixer, dtype=dtype).requires_grad_(False)
    for parameter in block.parameters():
        parameter += (0.1 * torch.randn_like(parameter, dtype=torch.float32)).to(parameter.dtype)
    return block


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "default")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_backend
def test_steps_equal_the_forward_pass(backend, dtype, options):
    """Token by token through two blocks, against one forward over the sequence in float64."""
    blocks = [build_block(dtype, **options) for _ in range(2)]
    x = torch.randn(2, 6, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)

    def forward(precision):
        hidden, residual = x.to(precision), None
        for block in blocks:
            copy = build_block(precision, **options)
            copy.load_state_dict(block.state_dict())
            hidden, residual = copy(hidden, residual)
        return hidden.double(), residual

    (truth, truth_sum), (peer, peer_sum) = forward(torch.float64), forward(dtype)
    states = [block.mixer.init_states(2) for block in blocks]
    outs, sums = [], []
    with mmkernels.use_backend(mamba2_step=backend):
        for t in range(x.shape[1]):
            hidden, residual = x[:, t], None
            for block, state in zip(blocks, states, strict=True):
                assert block.objections_to_one_call(hidden) == []
                hidden, residual = block.step(hidden, residual, *state)
            outs.append(hidden)
            sums.append(residual)
    out, total = torch.stack(outs, 1), torch.stack(sums, 1)
    assert out.dtype == dtype
    assert total.dtype == torch.promote_types(dtype, torch.float32)
    # In float64 the truth carries roundings of its own: some hundreds, through two layers of sums of up to 48.
    terms = 256 if dtype == torch.float64 else 2
    assert_within("out", out, truth, peer, dtype=dtype, terms=terms)
    assert_within("sum", total, truth_sum, peer_sum, dtype=dtype, terms=terms)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "default")
def test_one_call_equals_part_by_part(options, monkeypatch):
    block = build_block(torch.float32, **options)
    h, r = torch.randn(3, 24), torch.randn(3, 24)
    results = []
    for objections in ([], ["asked for by the test"]):
        for layer in (Mamba2Block, Mamba2Mixer):
            monkeypatch.setattr(layer, "objections_to_one_call", lambda self, u, o=objections: o)
        states = block.mixer.init_states(3)
        steps = [block.step(h * k, r, *states) for k in (1.0, -0.5)]
        results.append((*steps[0], *steps[1], block.mixer.step(h, *states), *states))
    for one, parts in zip(*results, strict=True):
        torch.testing.assert_close(one, parts, rtol=1e-5, atol=1e-5)


def test_states_of_other_dtypes():
    args = step_inputs(torch.Generator().manual_seed(0), 2, 12, 4, 3, 5)
    args = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in args.items()}
    args["conv_state"], args["ssm_state"] = args["conv_state"].bfloat16(), args["ssm_state"].half()
    results = {}
    for backend, dtype in (("reference", torch.float64), ("torch", None), ("native", None)):
        mine = {k: v.to(dtype or v.dtype, copy=True) if isinstance(v, torch.Tensor) else v for k, v in args.items()}
        out, total = mamba2_step(**mine, backend=backend)
        results[backend] = (out, total, mine["conv_state"], mine["ssm_state"])
    for truth, peer, got in zip(results["reference"], results["torch"], results["native"], strict=True):
        assert got.dtype == peer.dtype
        assert_within("result", got, truth, peer, summands=16)


def test_bfloat16_is_closer_than_the_chain():
    """The native step rounds once where the chain of parts rounds after each."""
    if "native" not in READY:
        pytest.skip("needs the native library")
    errors = {"native": 0.0, "torch": 0.0}
    for seed in range(8):
        made = step_inputs(torch.Generator().manual_seed(seed), 2, 64, 4, 16, 32)
        made = {k: v.bfloat16() if isinstance(v, torch.Tensor) else v for k, v in made.items()}

        def run(backend, dtype, made=made):
            args = {k: v.to(dtype, copy=True) if isinstance(v, torch.Tensor) else v for k, v in made.items()}
            return mamba2_step(**args, backend=backend)[0].double()

        truth = run("reference", torch.float64)
        for backend in errors:
            errors[backend] += (run(backend, torch.bfloat16) - truth).square().sum().item()
    assert errors["native"] < 0.7 * errors["torch"]


def test_the_rule_when_a_layer_is_one_call():
    block = build_block(torch.float32)
    h = torch.randn(2, 24)
    states = block.mixer.init_states(2)
    assert block.objections_to_one_call(h) == []
    assert block.objections_to_one_call(h.to("meta")) == ["the tensors are on meta"]
    explained = mmkernels.explain("mamba2_step", h, *states, **block.mixer.step_arguments())
    assert explained.chosen == READY[0]

    block.mixer.in_proj.weight.requires_grad_(True)
    assert block.objections_to_one_call(h) == ["a gradient is wanted"]
    assert block.step(h, None, *states)[0].requires_grad
    with torch.no_grad():
        assert block.objections_to_one_call(h) == []
    block.requires_grad_(False)

    handle = block.mixer.out_proj.register_forward_hook(lambda module, args, out: out + 1)
    assert block.objections_to_one_call(h) == ["a part has forward hooks"]
    handle.remove()

    class Adapter(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    adapter = Adapter(24, block.mixer.in_proj.out_features, bias=False).requires_grad_(False)
    adapter.load_state_dict(block.mixer.in_proj.state_dict())
    plain = block.step(h, None, *block.mixer.init_states(2))[0]
    block.mixer.in_proj = adapter
    assert block.objections_to_one_call(h) == ["a part was replaced by another module"]
    adapted = block.step(h, None, *block.mixer.init_states(2))[0]
    assert not torch.allclose(plain, adapted)


def test_a_mixture_with_float64_runs_elsewhere():
    args = step_inputs(torch.Generator().manual_seed(0), 2, 6, 2, 3, 4)
    args["conv_state"] = args["conv_state"].float()
    explained = mmkernels.explain("mamba2_step", **args)
    assert explained.chosen == "torch"
    assert "conv_state is torch.float32 and hidden torch.float64" in str(explained)


def good():
    made = step_inputs(torch.Generator().manual_seed(0), 2, 6, 4, 3, 5, groups=2)
    return {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in made.items()}


BAD = [
    ({"hidden": torch.zeros(2, 1, 6)}, ShapeError, "hidden must have shape"),
    ({"ssm_state": torch.zeros(3, 4, 3, 5)}, ShapeError, "ssm_state must have shape"),
    ({"conv_weight": torch.zeros(33, 4)}, ShapeError, r"conv_weight must have d_inner \+ 2 ngroups dstate rows"),
    ({"conv_weight": torch.zeros(12, 4)}, ShapeError, r"conv_weight must have d_inner \+ 2 ngroups dstate rows"),
    ({"conv_weight": torch.zeros(42, 4)}, ShapeError, "ngroups a divisor of nheads"),
    ({"conv_state": torch.zeros(2, 32, 2)}, ShapeError, "conv_state must hold at least width-1"),
    ({"in_weight": torch.zeros(47, 6)}, ShapeError, "in_weight must have shape"),
    ({"in_weight": None}, DtypeError, "in_weight must be a tensor"),
    ({"out_weight": torch.zeros(6, 12).bfloat16()}, DtypeError, "out_weight must have the dtype of in_weight"),
    ({"out_weight": torch.zeros(12, 6)}, ShapeError, "out_weight must have shape"),
    ({"A_log": torch.zeros(3)}, ShapeError, "A_log must have shape"),
    ({"D": torch.zeros(4, 2)}, ShapeError, "D must have shape"),
    ({"gate_weight": torch.zeros(6)}, ShapeError, "gate_weight must have shape"),
    ({"norm_weight": None}, ShapeError, "residual must come with norm_weight"),
    (
        {"norm_weight": None, "residual": None, "hidden": torch.zeros(2, 6).half()},
        DtypeError,
        "hidden must have the dtype of in_weight",
    ),
    ({"residual": torch.zeros(2, 6).int()}, DtypeError, "residual must be float32"),
    ({"dt_bias": torch.zeros(4, device="meta")}, DeviceError, "dt_bias must be on cpu"),
    ({"dt_limit": (0.5, 0.1)}, ShapeError, "dt_limit must satisfy"),
    ({"dt_limit": 0.1}, DtypeError, "dt_limit must be a pair"),
    ({"gate_eps": -1.0}, ShapeError, "gate_eps must be >= 0"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments_are_named(change, error, message):
    assert isinstance(mamba2_step(**good()), tuple)
    for _ in range(2):  # a call that failed once is not remembered as good
        with pytest.raises(error, match=message) as caught:
            mamba2_step(**{**good(), **change})
        assert str(caught.value).startswith("mamba2_step: ")
