"""The benchmark of pruning at real shapes: it runs, its FLOPs are the published ones, its checks can fail."""

import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "models"


@pytest.fixture
def speed(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import pruning_speed

    return pruning_speed


def test_a_quick_run_writes_table_and_plot(speed, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pruning_speed.py", "--quick", "--threads", "1", "--results", str(tmp_path)])
    threads = torch.get_num_threads()
    try:
        speed.main()
    finally:
        torch.set_num_threads(threads)
    table = (tmp_path / "pruning_speed.md").read_text()
    for row in ("the official way", "VTC-CLS with K = 3", "| 36 |", "| 9 |", "within 10 %", "(at most 1/20)"):
        assert row in table
    assert (tmp_path / "pruning_speed.png").stat().st_size > 10_000
    assert {path.name for path in tmp_path.iterdir()} == {"pruning_speed.md", "pruning_speed.png"}


def test_flops_are_the_published_ones(speed):
    """LLaVA-1.5-7B, visual tokens only; FastV's convention: 2.99, 1.31, 0.98, 0.65, 0.32 T."""
    shapes = speed.Shapes()
    published = {576: 2.99, 256: 1.31, 192: 0.98, 128: 0.65, 64: 0.32}
    true = {576: 7.63, 256: 3.35, 192: 2.51, 128: 1.67, 64: 0.83}
    for count in shapes.visual:
        assert round(speed.flops(shapes, count, fastv=True) / 1e12, 2) == published[count]
        assert round(speed.flops(shapes, count) / 1e12, 2) == true[count]


def test_wrong_scores_stop_it_before_anything_is_timed(speed, monkeypatch):
    with torch.no_grad():
        on = speed.build_encoders(speed.QUICK)
        speed.check_encoders(on)
        monkeypatch.setattr(speed, "official", lambda on: (torch.rand(1, 36), None))
        with pytest.raises(AssertionError, match="scores differ"):
            speed.check_encoders(on)


def test_peaks_see_what_is_freed_again(speed, tmp_path):
    def two_at_once():
        kept = torch.ones(1000, dtype=torch.float64)
        return [(kept + i).sum() for i in range(3)]

    assert 16000 <= speed.peak_bytes(two_at_once, tmp_path) < 24000
