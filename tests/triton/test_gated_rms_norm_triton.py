"""gated_rms_norm in Triton: lines longer than a tile, and planted faults that the error bar must catch."""

import pytest

from mmkernels import _triton_math
from mmkernels.ops.gated_rms_norm import _triton as backend

OP = "gated_rms_norm"
FAULTS = {
    "gate added": ("v = v * silu(", "v = v + silu(", "gate-first"),
    "gate forgotten after": ("y = y * silu(", "y = y + 0 * (", "norm-first"),
    "mask of the line dropped": ("inside = known & (column < size)", "inside = known & (column < BLOCK)", "odd"),
    "mean over the tile": ("tl.sum(v * v, 1) / size", "tl.sum(v * v, 1) / BLOCK", "groups-gate-first"),
    "one weight for all groups": ("(group * w_group)[:, None]", "(group * 0)[:, None]", "groups-gate-first"),
    "sign in the backward": ("of_n - n * mean", "of_n + n * mean", "plain"),
    "derivative of the gate": ("x_value * silu_derivative(z_value)", "x_value * silu(z_value)", "gate-first"),
    "rows of other strips": ("strip * steps + step", "step", "mamba2"),
    "bias not in the gate's gradient": ("scaled += _load(bias", "scaled += 0 * _load(bias", "groups-norm-first-shared"),
}


def test_without_a_fault_nothing_is_caught(plant, caught):
    plant(backend, "kernels", "(column < size)", "(column < size)")
    assert not caught(OP, "groups-norm-first-shared")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_kernel_is_caught(plant, caught, fault, monkeypatch):
    old, new, case = FAULTS[fault]
    monkeypatch.setattr(backend, "_STRIPS", 8)  # several steps a strip, also in cases of few rows
    plant(backend, "kernels", old, new)
    assert caught(OP, case)


def test_a_fault_in_the_sum_of_shares_is_caught(caught, monkeypatch, plant):
    class Holder:
        math = _triton_math

    planted = plant(Holder, "math", "range(0, rows, ROWS)", "range(0, rows - 1, ROWS)")
    monkeypatch.setattr(backend, "_triton_math", planted)
    assert caught(OP, "one-dim")


@pytest.mark.parametrize("case", ["gate-first", "groups-norm-first-shared", "plain", "odd"])
def test_lines_longer_than_a_tile(caught, monkeypatch, case):
    monkeypatch.setattr(backend.kernels, "_LONGEST", 1)
    monkeypatch.setattr(backend.kernels, "_LONG_STEP", 16 if case == "odd" else 4)
    assert not caught(OP, case)


def test_a_fault_in_long_lines_is_caught(caught, monkeypatch, plant):
    planted = plant(backend, "kernels", "mean += tl.sum(of_n * n, 1)", "mean = tl.sum(of_n * n, 1)")
    monkeypatch.setattr(planted, "_LONGEST", 1)
    monkeypatch.setattr(planted, "_LONG_STEP", 4)
    assert caught(OP, "gate-first")
