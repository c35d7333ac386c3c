"""`mmkernels bench` end to end on the smallest layer: report, results, pictures, going on after a stop, mistakes."""

import json

import pytest
import torch

from mmkernels.bench import plans, run
from mmkernels.bench.shapes import Cell
from mmkernels.bench.worker import Worker
from mmkernels.cli import main

SMALL = ["bench", "--quick", "--shapes", "training", "--lengths", "20", "--threads", "1"]


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_small_race_end_to_end_and_again(tmp_path, capsys):
    arguments = [*SMALL, "--ops", "causal_conv1d,ssd_update", "--out", str(tmp_path)]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    report = (tmp_path / "report.md").read_text()
    assert report in said
    for part in ("mmkernels bench --quick --ops", "| transformers, tuned malloc |", "limit: copying", "## ssd_update"):
        assert part in report
    assert (tmp_path / "ratios.png").read_bytes().startswith(b"\x89PNG")
    first = json.loads((tmp_path / "results.json").read_text())
    conv = first["races"]["causal_conv1d/training/20/float32/1T/forward"]
    assert conv["entries"]["mmkernels"]["seconds"] > 0
    assert conv["entries"]["transformers, tuned malloc"]["error"] < 1e-5
    assert conv["limits"]["copy"]["rate"] > 0

    # a second run measures what is lacking, and only that
    assert main([*SMALL, "--ops", "gated_rms_norm,ssd_update", "--out", str(tmp_path)]) == 0
    second = json.loads((tmp_path / "results.json").read_text())
    assert {key: second["races"][key] for key in first["races"]} == first["races"]
    assert len(second["races"]) == len(first["races"]) + 1
    assert len(second["commands"]) == 2
    assert "## gated_rms_norm" in capsys.readouterr().out

    # --again measures what is asked for once more and keeps the rest
    assert main([*SMALL, "--ops", "gated_rms_norm", "--out", str(tmp_path), "--again"]) == 0
    third = json.loads((tmp_path / "results.json").read_text())
    changed = [key for key in second["races"] if third["races"][key] != second["races"][key]]
    assert third["races"].keys() == second["races"].keys()
    assert changed == ["gated_rms_norm/training/20/float32/1T/forward"]


def test_results_of_another_machine_are_not_mixed_in(tmp_path, capsys):
    results = run.Results(tmp_path)
    results.content["machine"]["processor"] = "another"
    results.save()
    arguments = [*SMALL, "--ops", "gated_rms_norm", "--out", str(tmp_path)]
    assert main(arguments) == 2
    assert "--again" in capsys.readouterr().err
    assert main([*arguments, "--again"]) == 0
    assert "another" not in (tmp_path / "results.json").read_text()


def test_damaged_results_are_a_clear_mistake(tmp_path, capsys):
    (tmp_path / "results.json").write_text("{")
    assert main([*SMALL, "--ops", "gated_rms_norm", "--out", str(tmp_path)]) == 2
    assert "results.json must hold results; got no JSON" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ops", "ssd_scam"], "ssd_scan"),
        (["--shapes", "7b"], "2.7b"),
        (["--ops", "mixer", "--shapes", "training"], "something to do"),
    ],
)
def test_a_mistake_ends_with_status_2_and_no_folder(arguments, said, tmp_path, capsys):
    assert main(["bench", "--quick", *arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mmkernels bench: ")
    assert said in error
    assert not (tmp_path / "out").exists()


def test_a_peer_that_breaks_is_a_row_and_our_own_failure_is_not_hidden(monkeypatch):
    cell = Cell("gated_rms_norm", "training", 20)
    plan = plans.Plan((cell,), without=frozenset({"transformers, tuned malloc"}), rounds=1, shortest=0.0)
    whole, breaking = run.prepare, "F.rms_norm and silu"

    def prepare(cell, contestant):
        if contestant.name == breaking:
            raise RuntimeError("no such instruction\nand more")
        return whole(cell, contestant)

    monkeypatch.setattr(run, "prepare", prepare)
    entries = run.run_race(cell, plan, [])["entries"]
    assert entries[breaking] == {"why": "failed: RuntimeError: no such instruction"}
    assert entries["mmkernels, torch backend"]["seconds"] > 0
    breaking = "mmkernels"
    with pytest.raises(RuntimeError, match="no such instruction"):
        run.run_race(cell, plan, [])


def test_memory_and_first_call_in_fresh_processes():
    memory = run.peak_memory(Cell("ssd_scan", "130m", 2048), ["mmkernels, torch backend", "nobody"])
    output = 2048 * 24 * 64 * 4
    used = memory["entries"]["mmkernels, torch backend"]["bytes"]
    assert 0.9 * output < used < 30 * output  # the output at least: freed memory of the check must not hide it
    assert "must be known" in memory["entries"]["nobody"]["why"]
    first = run.first_call(Cell("gated_rms_norm", "training", 20))
    assert "why" in first or 0 < first["second"] < first["first"] < 60


def test_a_worker_that_dies_or_cannot_says_so():
    worker = Worker()
    cell = Cell("ssd_scan", "130m", 64, "bfloat16")
    with pytest.raises(run.Unavailable, match="takes float32 only"):
        worker.ask("prepare", cell=vars(cell), contestant="ggml_ssm_scan")
    worker._process.kill()
    with pytest.raises(run.Unavailable, match="died with status"):
        worker.ask("sample", contestant="x", shortest=0.0)
