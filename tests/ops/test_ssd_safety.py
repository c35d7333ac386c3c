"""The scan under abuse: extreme values, planted faults, bad input.  Its mathematics is tested in test_ssd.py."""

import math

import pytest
import torch

from mmkernels import DeviceError, DtypeError, ShapeError, ssd_scan, ssd_update
from mmkernels.ops.ssd import _torch
from mmkernels.testing import error_of
from mmkernels.testing.cases_ssd import TOKENWISE, cast, leaves, ssd_inputs, tokens

MIXER = {"skip": "head", "gate": True, "softplus": True}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def torch_scan(args, **options):
    return ssd_scan(**{**args, **options}, backend="torch")


def reference_scan(args, **options):
    return ssd_scan(**{**args, **options}, backend="reference")


# --- extreme values, and the safeguards that make them harmless ------------------------------------------------------


def extreme(dtype=torch.float32):
    """|A| dt from 0 to 1000 per step, in any order, and pre-activations over the whole of [-30, 30]."""
    made = ssd_inputs(generator(11), 1, 200, 3, 4, 5, **MIXER, states=1, return_final_states=True)
    made["A"] = torch.tensor([-1e-3, -1.0, -33.0], dtype=torch.float64)
    made["dt"] = torch.empty(1, 200, 3, dtype=torch.float64).uniform_(-30, 30, generator=generator(12))
    made["dt_bias"] = torch.zeros(3, dtype=torch.float64)
    return cast(made, dtype)


def check_extremes():
    args, inputs = leaves(extreme())
    y, final = torch_scan(args)
    grads = torch.autograd.grad(y.sum() + final.sum(), list(inputs.values()))
    for name, value in zip(("y", "final", *inputs), (y, final, *grads), strict=True):
        assert torch.isfinite(value).all(), name
    y64, final64 = reference_scan(extreme(torch.float64))
    assert error_of(y, y64) < 1e-6
    assert error_of(final, final64) < 1e-6


def check_small_steps():
    # A step of softplus(-20) = 2e-9 is far below float32 resolution around 1, and must keep its relative precision.
    args = {"x": torch.ones(1, 1, 1, 1), "dt": torch.full((1, 1, 1), -20.0), "A": -torch.ones(1)}
    y = torch_scan({**args, "B": torch.ones(1, 1, 1, 1), "C": torch.ones(1, 1, 1, 1)}, dt_softplus=True)
    assert abs(y.item() / math.log1p(math.exp(-20.0)) - 1) < 1e-6


def check_mild_decays():
    # A forgetful step of 1e3 followed by decays near 1: float32 prefix sums would lose the latter's digits.
    made = ssd_inputs(generator(13), 1, 64, 1, 4, 4)
    made.update(A=-torch.ones(1, dtype=torch.float64), dt=torch.full((1, 64, 1), 1e-3, dtype=torch.float64))
    made["dt"][:, ::8] = 1e3
    made = {k: v.float() for k, v in made.items()}
    assert error_of(torch_scan(made), reference_scan({k: v.double() for k, v in made.items()})) < 1e-6


def check_packing():
    made = ssd_inputs(generator(14), 1, 12, 2, 3, 2, chunk_size=5)
    ids = torch.tensor([[0] * 3 + [1] * 9])
    torch.testing.assert_close(
        torch_scan(made, seq_idx=ids)[:, 3:], torch_scan(tokens(made, slice(3, None)))
    )  # default tolerance of float64: the scans differ in order only


def check_recurrence():
    made = ssd_inputs(generator(17), 2, 11, 4, 3, 2, 2, **MIXER, chunk_size=4)
    torch.testing.assert_close(torch_scan(made), reference_scan(made))


def check_identity_of_softplus():
    made = extreme(torch.float64)
    made["dt"] = made["dt"].abs() + 21
    y, _ = torch_scan(made)
    torch.testing.assert_close(y, torch_scan({**made, "dt_softplus": False})[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    "check",
    [check_extremes, check_small_steps, check_mild_decays, check_packing, check_recurrence, check_identity_of_softplus],
)
def test_safeguards_hold(check):
    check()


RIGHT_LOG_DECAY = _torch.log_decay
FAULTS = {
    "softplus without log1p": (_torch, "softplus", lambda v: torch.log(1 + torch.exp(v)), check_small_steps),
    "softplus that overflows": (_torch, "softplus", lambda v: torch.log1p(torch.exp(8 * v)) / 8, check_extremes),
    "softplus without identity": (_torch, "softplus", lambda v: torch.log1p(torch.exp(v)), check_identity_of_softplus),
    "no clamp before exp": (_torch, "decay", lambda e, work: e.to(work).exp(), check_extremes),
    "clamp after exp": (_torch, "decay", lambda e, work: e.to(work).exp().clamp(max=1.0), check_extremes),
    "float32 prefix sums": (_torch, "log_decay", lambda step, A: (step * A).clamp(min=-1024), check_mild_decays),
    "sequences not separated": (_torch.Tokens, "separate", lambda self, ids, reverse: self, check_packing),
    "reset too weak": (_torch, "RESET", 8, check_packing),
    "sign of the decay": (_torch, "log_decay", lambda step, A: -RIGHT_LOG_DECAY(step, A), check_recurrence),
    "a token does not see itself": (torch.Tensor, "tril", lambda t: torch.ops.aten.tril(t, -1), check_recurrence),
    "a token sees the next one": (torch.Tensor, "tril", lambda t: torch.ops.aten.tril(t, 1), check_recurrence),
    "no skip": (_torch, "skip_and_gate", lambda y, x, D, z: y, check_recurrence),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(monkeypatch, fault):
    where, name, faulty, check = FAULTS[fault]
    monkeypatch.setattr(where, name, faulty)
    with pytest.raises(AssertionError):
        check()


def test_bfloat16_training_stays_close_to_float32():
    made = ssd_inputs(generator(15), 2, 100, 4, 16, 16, **MIXER)
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        narrow = {k: v.to(torch.bfloat16).to(dtype) for k, v in made.items() if k in TOKENWISE}
        args, inputs = leaves(cast(made, torch.float32) | narrow)
        y = torch_scan(args)
        results[dtype] = (y, *torch.autograd.grad(y.float().square().mean(), list(inputs.values())))
    for narrow, wide in zip(results[torch.bfloat16], results[torch.float32], strict=True):
        # The tolerances upstream uses for its kernels, in units of the largest element.
        scale = wide.abs().max().item()
        torch.testing.assert_close(narrow.float() / scale, wide / scale, rtol=1e-2, atol=3e-3)


# --- bad input ------------------------------------------------------------------------------------------------------


def bad(**change):
    made = ssd_inputs(generator(), 2, 4, 4, 3, 2, 2, **MIXER, states=2)
    return {**made, **change}


SHAPE_ERRORS = {
    "x has 3 dimensions": (bad(x=torch.zeros(2, 4, 12)), "x must have shape", "got (2, 4, 12)"),
    "dt for other heads": (bad(dt=torch.zeros(2, 4, 3)), "dt must have shape (batch=2, seqlen=4, nheads=4)", "4, 3)"),
    "A with a state axis": (bad(A=torch.zeros(4, 2)), "A must have shape (nheads=4)", "got (4, 2)"),
    "C of other groups": (bad(C=torch.zeros(2, 4, 1, 2)), "C must have shape", "got (2, 4, 1, 2)"),
    "groups do not divide": (
        bad(B=torch.zeros(2, 4, 3, 2), C=torch.zeros(2, 4, 3, 2)),
        "ngroups must divide nheads; got ngroups=3, nheads=4",
        "Head h reads group",
    ),
    "D of another size": (bad(D=torch.zeros(3)), "D must have shape (nheads=4)", "D is (nheads,) or (nheads, headdim)"),
    "z of another size": (bad(z=torch.zeros(2, 4, 4, 2)), "z must have shape", "got (2, 4, 4, 2)"),
    "dt_bias per channel": (bad(dt_bias=torch.zeros(4, 3)), "dt_bias must have shape (nheads=4)", "got (4, 3)"),
    "states of another batch": (bad(initial_states=torch.zeros(1, 4, 3, 2)), "initial_states must have", "got (1,"),
    "states per sequence": (
        bad(**ssd_inputs(generator(), 1, 4, 4, 3, 2, 2, states=1), z=None, cu_seqlens=torch.tensor([0, 2, 4])),
        "initial_states must have shape (nseqs=2,",
        "got (1,",
    ),
    "ids of another length": (bad(seq_idx=torch.zeros(2, 5).int()), "seq_idx must have shape", "got (2, 5)"),
    "packing a batch of 2": (bad(cu_seqlens=torch.tensor([0, 4])), "x must have batch 1", "got batch 2"),
    "no offsets": (bad(cu_seqlens=torch.zeros(0).int()), "cu_seqlens must hold nseqs + 1 offsets", "Pass [0, seqlen]"),
    "packed twice": (
        bad(cu_seqlens=torch.tensor([0, 4]), seq_idx=torch.zeros(2, 4).int()),
        "cu_seqlens must be the only description of the packing; got seq_idx",
        "Pass cu_seqlens",
    ),
    "offsets that end early": (
        bad(**ssd_inputs(generator(), 1, 4, 4, 3, 2), z=None, initial_states=None, cu_seqlens=torch.tensor([0, 3])),
        "cu_seqlens must rise from 0 to seqlen=4; got [0, 3]",
        "running sum of the lengths",
    ),
    "offsets that fall": (
        bad(
            **ssd_inputs(generator(), 1, 4, 4, 3, 2), z=None, initial_states=None, cu_seqlens=torch.tensor([0, 3, 2, 4])
        ),
        "cu_seqlens must rise from 0 to seqlen=4; got [0, 3, 2, 4]",
        "running sum of the lengths",
    ),
    "chunk_size 0": (bad(chunk_size=0), "chunk_size must be at least 1; got 0", "Leave it out"),
    "limits in the wrong order": (bad(dt_limit=(1.0, 0.1)), "dt_limit must satisfy 0 <= low <= high", "got (1.0, 0.1)"),
    "negative limit": (bad(dt_limit=(-1.0, 0.1)), "dt_limit must satisfy 0 <= low <= high", "A negative step size"),
}
DTYPE_ERRORS = {
    "x is a list": (bad(x=[1.0]), "x must be a tensor; got list", ""),
    "x is integer": (bad(x=torch.zeros(2, 4, 4, 3).int()), "x must be float32, bfloat16, float16 or float64", "int32"),
    "B narrower than x": (bad(B=torch.zeros(2, 4, 2, 2)), "B must have the dtype of x", "B.to(x.dtype)"),
    "ids as floats": (bad(seq_idx=torch.zeros(2, 4)), "seq_idx must be int32 or int64", "seq_idx.int()"),
    "one limit": (bad(dt_limit=0.1), "dt_limit must be a pair of numbers", "got 0.1"),
}


@pytest.mark.parametrize("name", [*SHAPE_ERRORS, *DTYPE_ERRORS])
def test_bad_input_is_named(name):
    args, expectation, fact_or_remedy = (SHAPE_ERRORS | DTYPE_ERRORS)[name]
    with pytest.raises(ShapeError if name in SHAPE_ERRORS else DtypeError) as caught:
        ssd_scan(**args)
    message = str(caught.value)
    assert message.startswith(f"ssd_scan: {expectation}"), message
    assert fact_or_remedy in message
    assert message.endswith("."), message


def test_bad_input_of_the_update_is_named():
    made = ssd_inputs(generator(), 2, None, 4, 3, 2, **MIXER, states=3)
    state = made.pop("initial_states")
    with pytest.raises(ShapeError, match=r"state must have shape \(batch=2, .*got \(3, 4, 3, 2\).*Pass state_indices"):
        ssd_update(state, **made)
    with pytest.raises(
        ShapeError, match=r"x must have shape \(batch, nheads, headdim\); got \(2, 12\).*Several tokens"
    ):
        ssd_update(state, **{**made, "x": made["x"].flatten(1)})
    with pytest.raises(ShapeError, match="state_indices must have shape"):
        ssd_update(state, **made, state_indices=torch.tensor([0, 1, 2]))
    with pytest.raises(DtypeError, match="state must be float32"):
        ssd_update(state.int(), **made, state_indices=torch.tensor([0, 1]))
    with pytest.raises(DtypeError, match="state_indices must be int32 or int64"):
        ssd_update(state, **made, state_indices=torch.tensor([0.0, 1.0]))


def test_devices_must_agree():
    made = ssd_inputs(generator(), 1, 2, 2, 3, 2)
    with pytest.raises(DeviceError, match="A must be on cpu like x; got meta"):
        ssd_scan(**{**made, "A": made["A"].to("meta")})
