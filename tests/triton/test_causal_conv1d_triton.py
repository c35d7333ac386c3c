"""causal_conv1d in Triton: planted faults that the error bar must catch, wrong slots and offsets, long filters."""

import pytest
import torch

import mmkernels
from mmkernels import _triton
from mmkernels.ops.causal_conv1d import _triton as backend

DEVICE = "cpu" if _triton.interpreting() else "cuda"
FAULTS = {
    "taps in the wrong order": ("(WIDTH - 1 - s) * w_tap", "s * w_tap", "plain"),
    "direction": (
        "position, remaining = remaining, position",
        "position, remaining = position, remaining",
        "packed-reverse",
    ),
    "padding computed": ("own >= 0", "own >= -9", "ids"),
    "taps across a change of id": ("same_back, other=-1) == own", "same_back, other=-1) > -9", "ids"),
    "a run that returns": ("same_back = same_back & (position", "same_back = real & (position", "ids"),
    "state read by a later run": ("real & (own == 0) &", "real &", "short-ids"),
    "wrong entry of the state": (
        "entry = position + (HISTORY + OFFSET)",
        "entry = position * 0 + (HISTORY + OFFSET)",
        "states",
    ),
    "state of another sequence": ("(batch + row.to(tl.int64))[:, None] * i_row", "batch * i_row", "packed"),
    "sequence after an empty one": (
        "row = tl.where(after, middle + 1, row)",
        "row = tl.where(after, middle, row)",
        "packed",
    ),
    "gradient from another run": ("used = real & (o <= ahead)", "used = real & (o <= remaining)", "ids"),
    "derivative of silu": ("g *= silu_derivative(", "g *= silu(", "silu-bias"),
    "final state's gradient": (
        "kept = real & (remaining < WIDTH - 1)",
        "kept = real & (remaining < WIDTH - 2)",
        "states",
    ),
    "final state of another run": ("(ahead == remaining)", "(ahead <= remaining)", "ids"),
    "halo of the next tile": (
        "user = token + o",
        "user = tl.minimum(token + o, (tile % blocks) * TOKENS + TOKENS - 1)",
        "packed",
    ),
    "channels of the next slice": ("* CHANNELS + tl.arange(0, CHANNELS)", "* 0 + tl.arange(0, CHANNELS)", "mamba2"),
}
STATE_FAULTS = {
    "final state": ("last = real & (ahead == remaining)", "last = real & (ahead >= 0)", "causal_conv1d", "ids"),
    "state of a short sequence": ("(entry + stop - begin)", "entry", "causal_conv1d", "wide-short"),
    "state through a broken run": ("(last & leading)", "last", "causal_conv1d", "short-ids"),
    "gradient of the state": ("reads = (step <= k)", "reads = (step < k)", "causal_conv1d", "states"),
    "gradient through a short sequence": (
        "(k - (stop - begin))",
        "(k + (stop - begin) * 0)",
        "causal_conv1d",
        "wide-short",
    ),
    "shift": ("source = entry + tokens", "source = entry + 1", "causal_conv1d_update", "several-tokens"),
    "append": ("(source - length) * x_token", "(source - source) * x_token", "causal_conv1d_update", "several-tokens"),
    "old end of a long state": (
        "(length + source) * s_entry",
        "(WIDTH - 1 + source) * s_entry",
        "causal_conv1d_update",
        "long-state",
    ),
    "padding": ("tl.where(slots < 0, 0.0,", "tl.where(slots < 0, 1.0,", "causal_conv1d_update", "slots"),
    "slot": (
        "slot = tl.load(indices + row).to(tl.int64)",
        "slot = tl.load(indices + row).to(tl.int64) % 2",
        "causal_conv1d_update",
        "slots",
    ),
    "activation": ("total = silu(total)", "total = -silu(total)", "causal_conv1d_update", "one-token"),
}


def test_without_a_fault_nothing_is_caught(plant, caught):
    plant(backend, "kernels", "own >= 0", "own >= 0")
    plant(backend, "state_kernels", "step <= k", "step <= k")
    assert not caught("causal_conv1d", "ids")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_kernel_is_caught(plant, caught, fault):
    old, new, case = FAULTS[fault]
    plant(backend, "kernels", old, new)
    assert caught("causal_conv1d", case)


@pytest.mark.parametrize("fault", STATE_FAULTS)
def test_a_fault_in_a_kernel_of_states_is_caught(plant, caught, fault):
    old, new, op, case = STATE_FAULTS[fault]
    plant(backend, "state_kernels", old, new)
    assert caught(op, case)


def test_a_slot_that_is_none_is_nan_and_touches_nothing():
    state = torch.ones(2, 3, 3, device=DEVICE)
    x, weight = torch.ones(3, 3, device=DEVICE), torch.ones(3, 4, device=DEVICE)
    slots = torch.tensor([1, 2, -1], device=DEVICE)
    y = mmkernels.causal_conv1d_update(x, state, weight, state_indices=slots, backend="triton")
    assert y.isnan().all(1).tolist() == [False, True, False]
    assert (state == 1).all()
    assert (y[0] == 4).all()
    assert (y[2] == 0).all()


def test_wrong_offsets_stay_inside_x():
    # On a GPU nobody reads the offsets to check them; here that is what a GPU would do with these.
    x, weight = torch.ones(1, 9, 2, device=DEVICE), torch.ones(2, 3, device=DEVICE)
    offsets = torch.tensor([-5, 4, 1 << 20], dtype=torch.int32, device=DEVICE)
    y, final = torch.ops.mmkernels_triton.causal_conv1d(x, weight, None, None, None, offsets, False, False, True)
    assert y.isfinite().all()
    assert final.isfinite().all()


@pytest.mark.parametrize("width", [5, 9])
def test_wide_filters_store_the_gradient_of_the_sums(width, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, initial = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE).requires_grad_()
        for shape in ((2, 11, 3), (3, width), (3,), (2, 3, width - 1))
    )
    found = []
    for limit in (64, backend.kernels.WIDEST_RECOMPUTED):  # computed again, and stored
        monkeypatch.setattr(backend.kernels, "WIDEST_RECOMPUTED", limit)
        y, final = mmkernels.causal_conv1d(
            x, weight, bias, activation="silu", initial_states=initial, return_final_states=True, backend="triton"
        )
        loss = y.square().sum() + final.square().sum()
        found.append(torch.autograd.grad(loss, (x, weight, bias, initial)))
    for computed, stored in zip(*found, strict=True):
        torch.testing.assert_close(computed, stored)
