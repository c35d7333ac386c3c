"""Shared fixtures: one thread a process, NaN-poisoned allocations, and the report of backends that ran."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads it when it is imported, which torch alone does not do.  Compiled kernels cannot run here anyway.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from mmkernels import _triton
from mmkernels.testing import poisoned_allocations
from mmkernels.testing.interpreter import quicken, round_to_nearest

if _triton.interpreting() and _triton.probe() is None:
    quicken()
    round_to_nearest()

_RAN: dict[tuple[str, str], int] = {}


@pytest.fixture(scope="session", autouse=True)
def deterministic_threads():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the run itself is parallel (pytest -n auto); thread counts are varied where they matter


@pytest.fixture
def poison():
    """Every uninitialised allocation inside the test is NaN."""
    with poisoned_allocations():
        yield


# A compiler for tests of how a build goes, not of what it makes: nothing is optimised, and a kernel of a wide level
# is the object that the real build kept, if it was made of the same text.  All else is compiled.
_QUICK_COMPILER = """#!{python}
import os, shutil, sys
real, kept, arguments = {real!r}, {kept!r}, sys.argv[1:]
level = next((a.partition("=")[2] for a in arguments if a.startswith("-DMMK_ISA_NS=")), "")
source = next((a for a in arguments if a.endswith(".cpp")), "")
ours, ready = kept.get((os.path.basename(source), level), ("", ""))
if "-c" in arguments and ready and os.path.exists(ready) and open(ours).read() == open(source).read():
    out = arguments[arguments.index("-o") + 1]
    shutil.copyfile(ready, out)
    if "-MF" in arguments:
        open(arguments[arguments.index("-MF") + 1], "w").write(out + ": " + source + "\\n")
else:
    os.execvp(real[0], [*real, *arguments, *(["-O0"] if "-O3" in arguments else [])])
"""


@pytest.fixture(scope="session")
def quick_compiler(tmp_path_factory) -> Path:
    """The path of a program that is called as the C++ compiler is (_QUICK_COMPILER)."""
    from mmkernels import _build, _native

    try:
        plan = _build.make_plan(_build.source_root())
    except _build.BuildError as error:
        pytest.skip(str(error))
    objects = _native._cache_folder() / "objects"
    kept = {
        (Path(step.source).name, step.level): (
            str(plan.root / step.source),
            str(objects / f"{_build.object_key(plan, step)}.o"),
        )
        for step in plan.steps
        if step.level not in (None, "baseline")
    }
    script = tmp_path_factory.mktemp("compiler") / "c++"
    script.write_text(_QUICK_COMPILER.format(python=sys.executable, real=plan.compiler, kept=kept))
    script.chmod(0o755)
    return script


@pytest.fixture
def count_backend():
    """Call it with (op, backend) for each verified pair; the terminal summary prints the totals."""

    def count(op: str, backend: str) -> None:
        _RAN[op, backend] = _RAN.get((op, backend), 0) + 1

    return count


def pytest_sessionfinish(session):
    output = getattr(session.config, "workeroutput", None)
    if output is not None:  # a worker of pytest-xdist: hand the counts to the controller, which prints them
        output["backends"] = [[op, backend, count] for (op, backend), count in _RAN.items()]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    for op, backend, count in getattr(node, "workeroutput", {}).get("backends", []):
        _RAN[op, backend] = _RAN.get((op, backend), 0) + count


# Tests that run for a minute or wait for programs: begun last, one of them would leave the other workers idle.
_FIRST = (
    "tests/native/test_mutations.py",
    "tests/native/test_sources.py",
    "tests/triton/test_aot.py",
    "tests/triton/test_rehearsal.py",
    "tests/packaging/test_install.py",
)


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: not (item.get_closest_marker("slow") and item.nodeid.startswith(_FIRST)))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(
                    pytest.mark.skip(reason="no CUDA device on this machine; run `make gpu` on one that has")
                )


def pytest_terminal_summary(terminalreporter):
    import mmkernels
    from mmkernels._dispatch import registered

    terminalreporter.section("backends")
    table = mmkernels.backends()
    for op in registered():
        for backend, status in table[op].items():
            ran = _RAN.get((op, backend), 0)
            what = f"verified by {ran} contract checks" if ran else "no contract check ran"
            terminalreporter.write_line(f"{op:<25}{backend:<11}{what}" + ("" if status == "ready" else f" - {status}"))
