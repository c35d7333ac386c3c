"""Scans of a grid in Triton: planted faults that the error bar must catch, equal bits, no copies, long lines."""

import pytest
import torch

import mmkernels
from mmkernels import _triton
from mmkernels.ops.causal_conv1d import _triton as convolution
from mmkernels.ops.scan2d import _triton as backend
from mmkernels.ops.ssd import _triton_backward, _triton_forward
from mmkernels.testing import CASES
from mmkernels.testing.cases_ssd import leaves

DEVICE = "cpu" if _triton.interpreting() else "cuda"
FORWARD, BACKWARD = (_triton_forward, "kernels"), (_triton_backward, "kernels")
STEPS, STEPS_BACK = (_triton_forward, "kernels_steps"), (_triton_backward, "kernels_steps")
TAPS, MERGE = (convolution, "kernels"), (backend, "kernels")
ORDER = ("order += batch % directions * seqlen", "order += batch % directions * 0")
OP_OF = {convolution: "causal_conv1d_2d", backend: "merged_gated_rms_norm"}  # others: ssd_scan_2d
FAULTS = {
    "one order for all": (FORWARD, *ORDER, "both-ways"),
    "one order for all steps": (STEPS, *ORDER, "both-ways"),
    "one order for all gradients": (BACKWARD, *ORDER, "both-ways"),
    "one order for all step gradients": (STEPS_BACK, *ORDER, "both-ways"),
    "another direction's rates": (STEPS, "A += batch % directions *", "A += 0 *", "both-ways"),
    "another direction's bias": (STEPS_BACK, "dt_bias += batch % directions *", "dt_bias += 0 *", "both-ways"),
    "another direction's skip weight": (FORWARD, "* D_direction", "* 0", "both-ways"),
    "another direction's keys": (FORWARD, "B_batch, B_direction", "B_batch, 0", "own-keys"),
    "another direction's tokens in the state": (FORWARD, "u_batch, u_direction", "u_batch, 0", "cut"),
    "another direction's gradient": (BACKWARD, "dy_batch, dy_direction", "dy_batch, 0", "both-ways"),
    "another direction's step sizes": (STEPS, "dt_batch, dt_direction", "dt_batch, 0", "cross-own"),
    "pieces of da in raster order": (BACKWARD, "* seqlen + clock_at", "* seqlen + token", "both-ways"),
    "taps in raster order": (TAPS, "at = tl.load(order + token, known, other=0)", "at = token.to(tl.int64)", "paths"),
    "another direction's filters": (TAPS, "weight += batch % directions *", "weight += 0 *", "cross-own"),
    "another direction's filters' gradients": (TAPS, "= share % directions", "= share % 1", "both-ways"),
    "the first direction of every element": (TAPS, "batch * directions + direction", "batch * directions", "both-ways"),
    "the last direction only": (MERGE, "total += v * r[:, None]", "total = v * r[:, None]", "mean"),
    "one direction's root": (MERGE, "tl.where(lane == k, r[:, None], roots)", "roots + r[:, None]", "mean"),
    "the gate's gradient of one direction": (MERGE, "of_gate += of_v", "of_gate = of_v", "mean"),
    "sign in the backward": (MERGE, "(of_n - n * mean", "(of_n + n * mean", "sum-groups"),
    "mean over the tile": (MERGE, "tl.sum(v * v, 1) / size", "tl.sum(v * v, 1) / BLOCK", "views"),
    "not averaged": (MERGE, "inside, ACC) * SCALE", "inside, ACC)", "mean"),
    "rows of another strip": (MERGE, "strip * steps + step", "step", "mixer"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_kernel_is_caught(plant, caught, fault, monkeypatch):
    (module, name), old, new, case = FAULTS[fault]
    monkeypatch.setattr(backend, "_STRIPS", 4)  # several steps a strip, also in cases of few rows
    plant(module, name, old, new)
    assert caught(OP_OF.get(module, "ssd_scan_2d"), case)


def test_without_a_fault_nothing_is_caught(plant, caught, monkeypatch):
    monkeypatch.setattr(backend, "_STRIPS", 4)
    plant(backend, "kernels", "/ size", "/ size")
    assert not caught("merged_gated_rms_norm", "mixer")


@pytest.mark.parametrize("case", ["mean", "sum-groups", "ungated"])
def test_lines_longer_than_a_tile(caught, monkeypatch, case):
    monkeypatch.setattr(backend.kernels, "_LONGEST", 1)
    monkeypatch.setattr(backend.kernels, "_LONG_STEP", 4)
    assert not caught("merged_gated_rms_norm", case)


def test_a_fault_in_long_lines_is_caught(caught, monkeypatch, plant):
    planted = plant(backend, "kernels", "means += tl.where", "means = tl.where")
    monkeypatch.setattr(planted, "_LONGEST", 1)
    monkeypatch.setattr(planted, "_LONG_STEP", 4)
    assert caught("merged_gated_rms_norm", "mean")


def run(op, case):
    (chosen,) = [c for c in CASES[op] if c.id == case]
    args, wanted = leaves(chosen.args(torch.float32, DEVICE))
    outputs = chosen.run(args, "triton")
    return [*outputs, *torch.autograd.grad(sum(out.square().sum() for out in outputs), list(wanted.values()))]


@pytest.mark.parametrize(("op", "case"), [("conv_ssd_scan_2d", "own"), ("merged_gated_rms_norm", "mixer")])
def test_two_runs_are_equal_to_the_bit(op, case):
    for first, second in zip(run(op, case), run(op, case), strict=True):
        assert torch.equal(first, second)


def test_inputs_are_read_where_they_lie(monkeypatch):
    (case,) = [c for c in CASES["ssd_scan_2d"] if c.id == "views"]
    args = case.args(torch.float32, DEVICE)
    launch, read = _triton.launch, set()

    def watched(kernel, grid, config, *rest, **constants):
        read.update(t.untyped_storage().data_ptr() for t in rest if isinstance(t, torch.Tensor))
        launch(kernel, grid, config, *rest, **constants)

    monkeypatch.setattr(_triton, "launch", watched)
    y = mmkernels.ssd_scan_2d(**args, backend="triton")
    mine = {args[name].untyped_storage().data_ptr() for name in ("x", "dt", "B", "C", "A", "D", "dt_bias")}
    assert mine <= read
    # What else there is: y, the order and the clocks; no copy in another order.
    assert len(read - mine) == 3
    assert y.untyped_storage().data_ptr() in read
