"""Which backend runs a call: order, overrides, refusals with reasons, and that the compiler sees through it."""

import subprocess
import sys
import threading
import timeit

import pytest
import torch

import mmkernels
from mmkernels import _dispatch
from mmkernels._dispatch import Backend, BackendUnavailable, Op
from mmkernels.errors import BackendError, MMKernelsError

CALLS: list[str] = []


def fast(x, k):
    CALLS.append("native")
    return x * k


def plain(x, k):
    CALLS.append("torch")
    return x * k


def oracle(x, k):
    CALLS.append("reference")
    return x * k


def at_most_three(x, k):
    return [f"k must be at most 3, it is {k}"] if k > 3 else []


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(_dispatch, "_OPS", _dispatch.registered())  # a copy: the toy is gone after the test
    here = __name__
    CALLS.clear()
    return Op(
        "toy",
        key="x",
        public=f"{here}.toy_function",
        backends=[
            Backend("native", f"{here}:fast", ("cpu",), at_most_three),
            Backend("torch", f"{here}:plain"),
            Backend("reference", f"{here}:oracle"),
        ],
    )


def run(op, k=2, backend=None):
    return op(backend, {"x": torch.ones(3), "k": k})


def test_automatic_order_takes_the_first_without_an_objection(toy):
    run(toy)
    run(toy, k=5)
    assert CALLS == ["native", "torch"]


def test_argument_beats_context_beats_environment(toy, monkeypatch):
    monkeypatch.setattr(_dispatch, "_FORCED", "torch")
    run(toy)
    with mmkernels.use_backend("reference"):
        run(toy)
        run(toy, backend="native")
        with mmkernels.use_backend(toy="torch"):
            run(toy)
        with mmkernels.use_backend("auto"):
            run(toy)
    run(toy)
    assert CALLS == ["torch", "reference", "native", "torch", "native", "torch"]


def test_a_named_backend_runs_or_raises_with_its_reasons(toy):
    with pytest.raises(BackendError, match=r"k must be at most 3, it is 5.*Leave backend out"):
        run(toy, k=5, backend="native")
    with pytest.raises(BackendError, match="has no triton backend"):
        run(toy, backend="triton")
    with pytest.raises(BackendError, match=r"got 'nativ'.*Did you mean 'native'"):
        run(toy, backend="nativ")
    assert CALLS == []


def test_an_override_lasts_for_its_block_and_its_thread(toy):
    seen = []
    with mmkernels.use_backend("reference"):
        thread = threading.Thread(target=lambda: (run(toy), seen.extend(CALLS)))
        thread.start()
        thread.join()
        with pytest.raises(RuntimeError, match="inside"), mmkernels.use_backend("torch"):
            raise RuntimeError("inside")
        run(toy)
    assert seen == ["native"]
    assert CALLS == ["native", "reference"]


def test_overrides_are_checked_when_they_are_made(toy):
    with pytest.raises(BackendError, match="Did you mean 'torch'"), mmkernels.use_backend("toch"):
        pass
    unknown = pytest.raises(BackendError, match=r"no op is called 'ssd_scn'.*Did you mean 'ssd_scan'")
    with unknown, mmkernels.use_backend(ssd_scn="torch"):
        pass


def test_when_nothing_can_run_every_reason_is_told(toy, monkeypatch):
    for entry in toy.entries.values():
        monkeypatch.setattr(entry, "declines", lambda x, k: ["not today"])
    with pytest.raises(BackendError) as caught:
        run(toy)
    message = str(caught.value)
    assert message.count("not today") == 3
    assert "x: (3,) float32 cpu" in message


def test_an_unavailable_backend_is_asked_once_and_its_reason_kept(toy, monkeypatch):
    asked = []

    def fails(source):
        asked.append(source)
        raise BackendUnavailable("no compiler on PATH")

    monkeypatch.setattr(_dispatch, "_imported", fails)
    entry = toy.entries["native"]
    assert [entry.unavailable(), entry.unavailable()] == ["no compiler on PATH"] * 2
    assert len(asked) == 1
    assert entry.status() == "no compiler on PATH"


def test_a_bug_in_a_backend_is_not_mistaken_for_unavailability(toy, monkeypatch):
    monkeypatch.setattr(toy.entries["native"], "source", f"{__name__}:no_such_function")
    with pytest.raises(AttributeError):
        run(toy)


def test_explain_tells_the_choice_and_every_objection_and_computes_nothing():
    x, w = torch.ones(2, 4), torch.ones(4)
    told = mmkernels.explain("gated_rms_norm", x, w)
    assert told.chosen in ("native", "torch")
    assert "x: (2, 4) float32 cpu" in repr(told)
    assert mmkernels.explain("gated_rms_norm", x, w, backend="reference").chosen == "reference"
    with pytest.raises(MMKernelsError, match="weight must have shape"):
        mmkernels.explain("gated_rms_norm", x, torch.ones(5))
    with pytest.raises(BackendError, match="Did you mean 'gated_rms_norm'"):
        mmkernels.explain("gated_rmsnorm", x, w)


def test_backends_prints_every_op_and_backend():
    table = mmkernels.backends()
    assert {"ssd_scan", "ssd_update", "causal_conv1d", "causal_conv1d_update", "gated_rms_norm"} <= set(table)
    assert all(row["torch"] == row["reference"] == "ready" for row in table.values())
    assert "ssd_scan" in repr(table)


def test_the_compiler_sees_through_the_choice_and_recompiles_when_it_changes(toy):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: toy(None, {"x": x, "k": 2}), fullgraph=True, backend="aot_eager")
    compiled(torch.ones(3))
    with mmkernels.use_backend("reference"):
        compiled(torch.ones(3))
    # one trace each: the choice is part of the graph, not a branch at run time
    assert CALLS[0] == "native"
    assert "reference" in CALLS


def test_the_environment_variable_forces_a_backend_and_typos_are_named():
    code = "import torch, mmkernels; print(mmkernels.explain('gated_rms_norm', torch.ones(2, 4), torch.ones(4)).chosen)"

    def child(value):
        import os

        env = {**os.environ, "MMKERNELS_BACKEND": value}
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)

    assert child("reference").stdout.strip() == "reference"
    assert "Did you mean 'reference'" in child("referense").stderr


def test_choosing_costs_microseconds(toy):
    args = {"x": torch.ones(3), "k": 2}
    toy.resolve(None, args)
    best = min(timeit.repeat(lambda: toy.resolve(None, args), number=1000, repeat=5)) / 1000
    assert best < 20e-6  # some 3 us on an idle machine; the design's budget is 10
