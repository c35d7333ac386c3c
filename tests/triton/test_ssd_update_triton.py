"""ssd_update in Triton: planted faults that the error bar must catch, and slots that do not exist."""

import pytest
import torch

import mmkernels
from mmkernels import _triton
from mmkernels.ops.ssd import _triton_update as backend

DEVICE = "cpu" if _triton.interpreting() else "cuda"
FAULTS = {
    "sign of the decay": ("tl.exp(decay * step)", "tl.exp(-decay * step)", "plain"),
    "softplus": ("step = softplus(step)", "step = tl.exp(step)", "mixer"),
    "lower limit": ("tl.maximum(step, low)", "step", "D-channel"),
    "upper limit": ("tl.minimum(tl.maximum(step, low), high)", "tl.maximum(step, low)", "D-channel"),
    "bias of the step": ("step += tl.load(dt_bias + head)", "step += tl.load(dt_bias + head * 0)", "mixer"),
    "group of a head": ("group = head // heads_a_group", "group = head * 0", "mixer"),
    "skip per channel": ("row * D_row, row < headdim", "row * 0, row < headdim", "D-channel"),
    "gate": ("out *= silu(", "out *= (", "mixer"),
    "order of two tokens": ("C + token * C_token", "C + (tokens - 1 - token) * C_token", "several-tokens"),
    "state of the last token": ("at = slot * s_slot + head * s_head", "at = slot * s_slot + 0 * head", "plain"),
    "slot": ("slot = tl.load(indices + batch)", "slot = batch + 0 * tl.load(indices + batch)", "slots"),
    "padding": ("tl.where(slots < 0, 0.0,", "tl.where(slots < 0, 1.0,", "slots"),
}


def test_without_a_fault_nothing_is_caught(plant, caught):
    plant(backend, "kernels", "decay * step", "decay * step")
    assert not caught("ssd_update", "mixer")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_kernel_is_caught(plant, caught, fault):
    old, new, case = FAULTS[fault]
    plant(backend, "kernels", old, new)
    assert caught("ssd_update", case)


def test_a_slot_that_is_none_is_nan_and_touches_nothing():
    state = torch.ones(2, 1, 3, 2, device=DEVICE)
    x, dt, A, B = (torch.ones(*size, device=DEVICE) for size in ((3, 1, 3), (3, 1), (1,), (3, 1, 2)))
    slots = torch.tensor([1, 2, -1], device=DEVICE)
    y = mmkernels.ssd_update(state, x, dt, -A, B, B, state_indices=slots, backend="triton")
    assert y.isnan().all(2).flatten().tolist() == [False, True, False]
    assert (y[2] == 0).all()
    assert (state[0] == 1).all()
    assert (state[1] != 1).all()


def test_the_state_may_have_any_dtype_and_strides():
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(2, 2, 4, 3, generator=generator).to(DEVICE)
    state = wide.to(torch.bfloat16).transpose(2, 3)  # (2, 2, 3, 4), its columns strided
    x, dt, A, B = (torch.randn(*size, generator=generator).to(DEVICE) for size in ((2, 2, 3), (2, 2), (2,), (2, 1, 4)))
    copy = state.clone()
    expected = mmkernels.ssd_update(copy, x, dt.exp(), -A.exp(), B, B, backend="torch")
    actual = mmkernels.ssd_update(state, x, dt.exp(), -A.exp(), B, B, backend="triton")
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(state, copy, rtol=2**-7, atol=1e-6)  # one rounding to bfloat16, either way
