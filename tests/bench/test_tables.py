"""Shapes, counts of useful work, plans and Markdown: arithmetic that can be checked by hand."""

import dataclasses

import pytest

from mmkernels.bench import plans, shapes, tables
from mmkernels.bench.ops import OPS
from mmkernels.bench.shapes import Cell
from mmkernels.errors import ConfigError

SCAN = Cell("ssd_scan", "130m", 2048, threads=2)


def entry(seconds, **changes):
    return {"seconds": seconds, "spread": 0.01, "samples": 5, "dropped": 0, "clean": True, "watched": True,
            "error": 1e-7, **changes}  # fmt: skip


def a_race(cell, entries):
    found = {name: entry(0.1, rate=rate) for name, rate in (("gemm", 200.0), ("read", 20.0), ("copy", 20.0))}
    limits = {name: found[name] for name in OPS[cell.op].limits}
    return {"cell": dataclasses.asdict(cell), "date": "2026-01-02", "limits": limits, "entries": entries}


def content(**sections):
    machine = {"processor": "a processor", "processors": 2, "versions": {"torch": "2"}}
    empty = {"machine": machine, "commands": ["mmkernels bench"], "races": {}, "memory": {}, "first_call": {}}
    return {**empty, **sections}


def test_useful_work():
    assert shapes.scan_flops(SCAN) == 2048 * 24 * (4 * 64 * 128 + 64 * 64) + 2048 * 64 * 128
    grouped = shapes.scan_flops(Cell("ssd_scan", "mmmamba", 512))
    assert grouped == 512 * 16 * (4 * 128 * 128 + 64 * 128) + 16 * 512 * 64 * 128
    assert shapes.conv_bytes(Cell("causal_conv1d", "2.7b", 2048, "bfloat16")) == 2 * 2048 * 5376 * 2
    assert shapes.norm_bytes(Cell("gated_rms_norm", "training", 20)) == 3 * 64 * 20 * 128 * 4
    assert shapes.update_bytes(Cell("ssd_update", "2.7b", 1)) == 2 * 80 * 64 * 128 * 4
    one, four = Cell("ssd_scan", "2.7b", 729), Cell("scan2d_cross", "2.7b", 729)
    assert OPS["scan2d_cross"].flops(four) == 4 * shapes.scan_flops(one)
    assert OPS["merge_tokens"].bytes(Cell("merge_tokens", "clip-l-x16", 576)) == 16 * (577 + 577 - 23) * 1024 * 4


def test_a_tiny_cell_keeps_what_matters():
    sizes = dataclasses.replace(Cell("ssd_scan", "mmmamba", 512), tiny=True).sizes
    assert (sizes.nheads, sizes.ngroups, sizes.headdim, sizes.dstate) == (2, 2, 128, 128)
    assert dataclasses.replace(SCAN, tiny=True).sizes.conv_dim == 2 * 64 + 2 * 128


@pytest.mark.parametrize(
    ("value", "text"), [(1234.5, "1,234"), (99.96, "100"), (11.24, "11.2"), (1.0, "1"), (0.0453, "0.045")]
)
def test_numbers_have_three_digits(value, text):
    assert tables.number(value) == text


def test_a_table_escapes_bars():
    assert tables.table(["a", "b"], [["x|y", "1"]]).splitlines() == ["| a | b |", "| --- | ---: |", "| x\\|y | 1 |"]


def test_ratios_are_against_baseline_and_fastest_peer_never_against_ourselves():
    race = a_race(
        SCAN,
        {
            "mmkernels": entry(1.0),
            "mmkernels, torch backend": entry(0.5),
            "ggml_ssm_scan": entry(4.0),
            "transformers, chunk 256": entry(20.0),
        },
    )
    assert tables.ratios(race, OPS["ssd_scan"].baseline) == {"baseline": 20.0, "fastest": 4.0, "peer": "ggml_ssm_scan"}
    alone = a_race(SCAN, {"mmkernels": entry(1.0)})
    assert tables.ratios(alone, OPS["ssd_scan"].baseline) == {"baseline": None, "fastest": None, "peer": None}


def test_a_peer_that_did_not_run_is_a_row_with_its_reason():
    short = dataclasses.replace(SCAN, seqlen=512)
    races = {
        c.id: a_race(
            c,
            {
                "mmkernels": entry(0.01),
                "ggml_ssm_scan": {"why": "llama-cpp-python is not installed"},
                "selective_scan_ref": entry(9.0, samples=1) if c is short else {"why": "too long"},
                "transformers, chunk 256": entry(0.2, clean=False, spread=0.5),
            },
        )
        for c in (short, SCAN)
    }
    text = tables.group_table([short, SCAN], races)
    assert "**forward, float32, 2 threads, milliseconds**" in text
    assert "| | 130m, 512 | 130m, 2048 |".replace("| |", "|  |") in text
    assert "| ggml_ssm_scan | not run: llama-cpp-python is not installed |  |" in text
    assert "| selective_scan_ref | 9,000? | - (a) |" in text  # 9,000 with the mark 1
    assert "(a) too long" in text
    assert "| transformers, chunk 256 | 200!~ | 200!~ |" in text
    assert "| **faster than transformers, chunk 256** | **20.0x** | **20.0x** |" in text
    # 1.83 GFLOP in 10 ms, of a matrix product at 200 GFLOP/s
    assert "| mmkernels, useful GFLOP/s | 45.7 | 183 |" in text
    assert "| mmkernels, share of the matrix product's rate | 23% | 91% |" in text


def test_a_report_has_every_part():
    one = dataclasses.replace(SCAN, threads=1)
    step = Cell("ssd_update", "130m", 1, threads=2)
    both = {"mmkernels": entry(20e-6), "transformers": {"why": "no"}}
    where = {"cell": dataclasses.asdict(SCAN), "date": "2026-01-03"}
    found = content(
        races={
            SCAN.id: a_race(SCAN, {"mmkernels": entry(0.01)}),
            one.id: a_race(one, {"mmkernels": entry(0.019)}),
            step.id: a_race(step, both),
        },
        memory={SCAN.id: {**where, "entries": {"mmkernels": {"bytes": 13 << 20}, "other": {"why": "died"}}}},
        first_call={
            step.id: {**where, "cell": dataclasses.asdict(step), "first": 0.0123, "processor": 0.02, "second": 0.001}
        },
    )
    text = tables.report(found)
    assert "a processor, 2 processors; torch 2; 2026-01-02 to 2026-01-03." in text
    assert "| 130m, 2048, float32, forward | 1 to 2 | 1.90x |" in text
    assert "| mmkernels | 20 |" in text  # microseconds of a decode step
    assert "| mmkernels | 13 |" in text
    assert "| other | - (a) |" in text
    assert "| ssd_update | 12.3 | 20 | 1 |" in text


def test_plans_are_made_of_known_cells():
    for plan in (plans.quick(2), plans.usual(2), plans.full(2), plans.full(1)):
        cells = (*plan.cells, *plan.memory, *plan.first_calls)
        assert len({c.id for c in plan.cells}) == len(plan.cells)
        assert all(c.shape in OPS[c.op].shapes and c.threads in (1, 2) for c in cells)
    ids = {c.id for c in plans.full(2).cells}
    for shape in shapes.LAYERS:
        for length in shapes.LENGTHS:
            assert f"ssd_scan/{shape}/{length}/float32/2T/forward" in ids
        assert f"ssd_update/{shape}/1/bfloat16/1T/forward" in ids
    assert "scan2d_bidirectional/2.7b/729/float32/1T/forward" in ids
    assert {"causal_conv1d/2.7b/2048/bfloat16/2T/forward", "mixer/1.3b/2048/float32/2T/forward"} <= ids


def test_a_plan_is_narrowed_to_what_is_asked():
    plan = plans.asked(plans.quick(2), parts=["ssd_scan", "first_call"], lengths=[64, 128], threads=[1])
    assert [c.id for c in plan.cells] == [f"ssd_scan/130m/{n}/float32/1T/forward" for n in (64, 128)]
    assert len(plan.first_calls) == 1
    assert plan.memory == ()
    cell = {"parts": ["ssd_scan"], "shapes": ["1.3b"], "lengths": [512], "threads": [2]}
    both = plans.asked(plans.full(2), **cell).cells
    for name, backward in (("forward", False), ("backward", True)):
        only = plans.asked(plans.full(2), **cell, passes=[name]).cells
        assert only == tuple(c for c in both if c.backward is backward) != ()


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"parts": ["ssd_scam"]}, "ssd_scan"),
        ({"shapes": ["130"]}, "130m"),
        ({"dtypes": ["float16"]}, "bfloat16"),
        ({"lengths": [0]}, "--lengths"),
        ({"passes": ["both"]}, "forward, backward"),
        ({"parts": ["mixer"], "shapes": ["mmmamba"]}, "something to do"),
    ],
)
def test_a_wrong_choice_is_refused(choice, said):
    with pytest.raises(ConfigError, match=said):
        plans.asked(plans.usual(2), **choice)


def test_first_come_names_are_unique():
    assert set(tables.TITLES) == set(OPS)
    for op in OPS.values():
        names = [c.name for c in op.contestants]
        assert len(set(names)) == len(names)
        assert names[0] == "mmkernels"
        assert op.baseline in names
