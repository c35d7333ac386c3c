"""mma_attention in Triton: planted faults that the error bar must catch, determinism, rectangles in any order."""

import pytest
import torch

import mmkernels
from mmkernels import MMAMask, _triton
from mmkernels.ops.mma_attention import _triton as backend
from mmkernels.testing import CASES
from mmkernels.testing.contract import forward_backward

DEVICE = "cpu" if _triton.interpreting() else "cuda"
FAULTS = {
    "earlier values not rescaled": ("total * rescale[:, None])", "total)", "tiles"),
    "earlier weights not rescaled": (
        "return total, largest_now, sums * rescale",
        "return total, largest_now, sums",
        "tiles",
    ),
    "lse in base 2": ("tl.where(sums > 0, sums, 1.0))) * LN2", "tl.where(sums > 0, sums, 1.0)))", "causal-lse"),
    "sign in lse": ("(largest + tl.log2(", "(largest - tl.log2(", "causal-lse"),
    "scale": ("(SCALE * LOG2E)", "LOG2E", "window"),
    "key-value head": (
        "k += (wide * k_batch + kv * k_head)",
        "k += (wide * k_batch + (nkvheads - 1 - kv) * k_head)",
        "aki",
    ),
    "query head": ("head = kv * GROUP + packed % GROUP", "head = kv + packed % GROUP", "aki"),
    "batch element": ("v += (wide * v_batch", "v += (wide * 0 * v_batch", "causal"),
    "lse of a row without keys": ('* LN2, float("-inf"))', "* LN2, 0.0)", "padded-lse"),
    "full tiles dropped": ("tl.maximum(start, partial), tl.maximum(stop, partial)", "0, 0", "tiles"),
    "a tile in two splits": ("tl.minimum(split * share + share,", "tl.minimum(split * share + share + 1,", "decode"),
    "splits merged with equal weights": ("tl.exp(part - shift)", "tl.exp(part - part)", "decode"),
    "mass of every row": ("p * weight[:, None]", "p", "causal-lse"),
    "mass without lse": ("- (norm * LOG2E)[:, None]", "", "causal-lse"),
    "mass of another head": ("head // GROUP * k_head", "head * 0 * k_head", "aki"),
}
BACKWARD_FAULTS = {
    "gradient of lse dropped": ("total -= tl.load(grad_lse", "total -= 0.0 * tl.load(grad_lse", "causal-lse"),
    "sign of lse's gradient": ("total -= tl.load(grad_lse", "total += tl.load(grad_lse", "causal-lse"),
    "row sums of another head": ("at = (b * nheads + head) * qlen + row", "at = b * nheads * qlen + row", "aki"),
    "row sums missing in grad_q": ("- inner[:, None]", "", "causal"),
    "row sums missing in grad_k": ("- inner[None, :]", "", "causal"),
    "scale of grad_q": ("(total * SCALE)", "total", "causal"),
    "scale of grad_k": ("(of_keys * SCALE)", "of_keys", "causal"),
    "mask": ("p = tl.where(keep, p, 0.0)", "p = tl.where(keep, p, p)", "causal"),
    "one query head of the group": ("head = (packed % GROUP).to(tl.int64)", "head = (packed * 0).to(tl.int64)", "aki"),
    "group of another key-value head": ("q += (wide * q_batch + kv * GROUP * q_head)", "q += (wide * q_batch)", "aki"),
    "full tiles of rows": ("lists + (qtiles - 1 - n)", "lists + n", "tiles"),
    "full tiles of keys": ("lists + (ktiles - 1 - n)", "lists + n", "tiles"),
}
PLAN_FAULTS = {
    "last key of the interval": ("(key < end)", "(key <= end)", "causal"),
    "first key of the interval": ("(key >= begin) &", "(key > begin) &", "window"),
    "first row of a rectangle": ("((row >= q0)", "((row > q0)", "aki"),
    "last row of a rectangle": ("(row < q1))", "(row <= q1))", "aki"),
    "first key of a rectangle": ("((key >= k0)", "((key > k0)", "aki"),
    "last key of a rectangle": ("(key < k1)))", "(key <= k1)))", "aki"),
    "a rectangle dropped": ("range(first, last)", "range(first + 1, last)", "aki"),
    "rectangles of earlier batch elements": ("tl.load(before + b).to", "tl.load(before + b * 0).to", "aki"),
    "tile of an interval lost": ("(end > key[None, :])", "(end > (key + KEYS)[None, :])", "tiles"),
    "tile of a rectangle lost": ("live = tl.maximum(live, hit", "live = tl.maximum(live, 0 * hit", "tiles"),
    "full for one row": ("tl.min(holds", "tl.max(holds", "tiles"),
    "full for the rows of a rectangle": ("(key * 0 + q0 <= low)", "(key * 0 + q0 >= 0)", "tiles"),
    "full for the keys of a rectangle": ("whole = hit & (key >= k0) &", "whole = hit &", "tiles"),
    "a partial tile listed twice": ("- 1, other, found == 1)", "- 1, other * 0, found == 1)", "tiles"),
    "full tiles listed from the front": (
        "others - full - tl.cumsum(all_, 0)",
        "full + tl.cumsum(all_, 0) - 1",
        "tiles",
    ),
}


@pytest.fixture
def plant_plan(plant, monkeypatch):
    """As plant, in the module of the plan; the other modules use its functions too."""

    def plant_(old, new):
        planted = plant(backend, "plan_kernels", old, new)
        for module in (backend.kernels, backend.backward_kernels):
            for name in ("kept", "listed_rects"):
                monkeypatch.setattr(module, name, getattr(planted, name))

    return plant_


def test_without_a_fault_nothing_is_caught(plant, plant_plan, caught):
    plant(backend, "kernels", "SCALE", "SCALE")
    plant(backend, "backward_kernels", "SCALE", "SCALE")
    plant_plan("key < end", "key < end")
    assert not caught("mma_attention", "tiles")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_forward_kernel_is_caught(plant, caught, fault):
    old, new, case = FAULTS[fault]
    plant(backend, "kernels", old, new)
    assert caught("mma_attention", case)


@pytest.mark.parametrize("fault", BACKWARD_FAULTS)
def test_a_fault_in_a_backward_kernel_is_caught(plant, caught, fault):
    old, new, case = BACKWARD_FAULTS[fault]
    plant(backend, "backward_kernels", old, new)
    assert caught("mma_attention", case)


@pytest.mark.parametrize("fault", PLAN_FAULTS)
def test_a_fault_in_the_plan_is_caught(plant_plan, caught, fault):
    old, new, case = PLAN_FAULTS[fault]
    plant_plan(old, new)
    assert caught("mma_attention", case)


@pytest.mark.parametrize("name", ["tiles", "decode"])
def test_two_runs_agree_to_the_last_bit(name):
    (case,) = [case for case in CASES["mma_attention"] if case.id == name]
    values = case.args(torch.float64)
    runs = [forward_backward(case, "triton", torch.bfloat16, values, DEVICE) for _ in range(2)]
    for a, b in zip(*((*outputs, *grads.values()) for outputs, grads in runs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["tiles", "decode"])
def test_float64_is_float64(name):
    (case,) = [case for case in CASES["mma_attention"] if case.id == name]
    values = case.args(torch.float64)
    found, truth = (forward_backward(case, which, torch.float64, values) for which in ("triton", "reference"))
    for a, b in zip((*found[0], *found[1].values()), (*truth[0], *truth[1].values()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_rectangles_in_any_order():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 5, 1, 4, generator=generator).to(DEVICE) for _ in range(3))
    ends = torch.ones(3, 5, dtype=torch.int32)
    rects = torch.tensor([[2, 0, 2, 1, 4], [0, 1, 3, 2, 5], [2, 3, 5, 4, 5], [0, 0, 1, 4, 5]], dtype=torch.int32)
    mask = MMAMask(ends * 0, ends, rects, 5).to(DEVICE)
    found = mmkernels.mma_attention(q, k, v, mask, backend="triton")
    torch.testing.assert_close(found, mmkernels.mma_attention(q, k, v, mask, backend="reference"))


def test_a_gradient_of_lse_alone_leaves_values_alone():
    q, k, v = (torch.randn(1, 4, 2, 3, device=DEVICE, requires_grad=True) for _ in range(3))
    _, lse = mmkernels.mma_attention(q, k, v, return_lse=True, backend="triton")
    found = torch.autograd.grad(lse.sum(), (q, k, v))
    _, lse = mmkernels.mma_attention(q, k, v, return_lse=True, backend="reference")
    expected = torch.autograd.grad(lse.sum(), (q, k, v), materialize_grads=True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
