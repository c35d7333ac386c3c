"""ssd_scan in Triton: planted faults that the error bar must catch, equal bits, cuts of every length."""

import pytest
import torch

import mmkernels
from mmkernels.ops.ssd import _triton_backward, _triton_forward
from mmkernels.testing import CASES
from mmkernels.testing.cases_ssd import leaves

OP = "ssd_scan"
FORWARD, BACKWARD = (_triton_forward, "kernels"), (_triton_backward, "kernels")
STEPS, STEPS_BACK = (_triton_forward, "kernels_steps"), (_triton_backward, "kernels_steps")
FAULTS = {
    "sign of the decay": (STEPS, "* step.to(tl.float64)\n", "* -step.to(tl.float64)\n", "D-channel"),
    "change of id forgotten": (STEPS, "(own != met)[:, None]", "(own != own)[:, None]", "ids-one-chunk"),
    "step size not limited": (STEPS, "limited(step, LOW, HIGH)", "step", "dt-limit"),
    "low half of a sum dropped": (STEPS, "plane, low, written", "plane, 0 * low, written", "steep"),
    "a token sees the next": (FORWARD, "lane[:, None] >= lane[None, :]", "lane[:, None] + 1 >= lane[None, :]", "plain"),
    "a token misses itself": (FORWARD, "lane[:, None] >= lane[None, :]", "lane[:, None] > lane[None, :]", "plain"),
    "padding read": (FORWARD, "without_padding(inside, ids, ids_token, token)", "inside", "ids-one-chunk"),
    "state of another span": (FORWARD, "kept = (number.to(tl.int64)", "kept = (0 * number.to(tl.int64)", "states"),
    "skip weight of another channel": (FORWARD, "p.to(tl.int64) * D_channel", "p.to(tl.int64) * 0", "D-channel"),
    "gate's derivative": (FORWARD, "silu_derivative(gate)", "silu(gate)", "one-chunk"),
    "group of another head": (FORWARD, "group = head // per_group", "group = head * 0", "groups"),
    "w: one pair too many": (BACKWARD, "lane[None, :] < lane[:, None]", "lane[None, :] <= lane[:, None]", "plain"),
    "gradient of the future": (
        BACKWARD,
        "lane[:, None] >= lane[None, :]",
        "lane[:, None] >= 0 * lane[None, :]",
        "plain",
    ),
    "sign of dx": (BACKWARD, "of_value * step[:, None] +", "of_value * -step[:, None] +", "plain"),
    "across forgotten": (BACKWARD, "across *= fading", "across *= 0 * fading", "states"),
    "dB without the state": (BACKWARD, "weighted = rounded(", "weighted = 0 * rounded(", "plain"),
    "sums not from the last": (STEPS_BACK, "tl.cumsum(read, 0, reverse=True)", "tl.cumsum(read, 0)", "states"),
    "q with its own token": (STEPS_BACK, "tl.cumsum(wrote, 0) - wrote", "tl.cumsum(wrote, 0)", "states"),
    "clamp's gradient": (STEPS_BACK, "(free >= LOW) & (free <= HIGH)", "(free >= LOW)", "dt-limit"),
    "padding's step gradient": (
        STEPS_BACK,
        "to = grad_dt + (batch * seqlen + token)",
        "to = grad_dt + (token)",
        "plain",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_kernel_is_caught(plant, caught, fault):
    (backend, name), old, new, case = FAULTS[fault]
    plant(backend, name, old, new)
    assert caught(OP, case)


def run(case, **changes):
    (chosen,) = [c for c in CASES[OP] if c.id == case]
    args, wanted = leaves({**chosen.args(torch.float32), **changes})
    outputs = chosen.run(args, "triton")
    grads = torch.autograd.grad(
        sum((out * out).sum() for out in outputs), list(wanted.values()), materialize_grads=True
    )
    return [*outputs, *grads]


@pytest.mark.parametrize("case", ["ids", "packed-chunks"])
def test_two_runs_are_equal_to_the_bit(case):
    for first, second in zip(run(case), run(case), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("chunk_size", [1, 5, None])
def test_the_cut_is_a_matter_of_speed(chunk_size):
    for cut, whole in zip(run("states", chunk_size=chunk_size), run("states", chunk_size=2), strict=True):
        torch.testing.assert_close(cut, whole, rtol=1e-5, atol=1e-5)


def test_what_padding_holds_stays_there():
    (chosen,) = [c for c in CASES[OP] if c.id == "ids-one-chunk"]
    args = chosen.args(torch.float32)
    padding = args["seq_idx"] < 0
    for name in ("x", "dt", "B", "C", "z"):
        args[name] = args[name].masked_fill(padding.view(*padding.shape, *[1] * (args[name].dim() - 2)), float("nan"))
    args, wanted = leaves(args)
    y = mmkernels.ssd_scan(**args, backend="triton")
    grads = torch.autograd.grad(y.square().sum(), list(wanted.values()))
    assert y[padding].eq(0).all()
    assert all(g.isfinite().all() for g in (y, *grads))


def test_one_head_a_share_equals_shared_heads(monkeypatch):
    from mmkernels.ops.ssd import _triton_call

    together = run("groups")
    monkeypatch.setattr(_triton_call, "SHARED_HEADS", 1)
    for apart, shared in zip(run("groups"), together, strict=True):
        torch.testing.assert_close(apart, shared, rtol=1e-5, atol=1e-5)
