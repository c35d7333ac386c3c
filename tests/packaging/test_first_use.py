"""Compiling at first use: once however many processes ask, whatever died before, and with a reason when it cannot be.

A stand-in compiler counts its calls and compiles a tiny source list with the real one, so that seconds suffice.
The real list is compiled by the set-up of the test run itself.
"""

import ctypes
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmkernels import _build, _native
from mmkernels._build import BuildError
from mmkernels._dispatch import BackendUnavailable

ROOT = Path(__file__).resolve().parents[2]
LIST = """
# ---- build list: begin ----
set(MMK_SOURCES csrc/once.cpp)      # a comment
set(MMK_KERNEL_SOURCES
  csrc/kernel.cpp)
set(MMK_LEVELS_x86_64 baseline)
set(MMK_LEVELS_aarch64 baseline)
set(MMK_FLAGS_baseline)
set(MMK_FLAGS -fPIC)
set(MMK_DEFINITIONS ANSWER=42)
set(MMK_TORCH_LIBRARIES torch_cpu)
set(MMK_LINK_FLAGS_Linux -shared)
set(MMK_LINK_FLAGS_Darwin -dynamiclib)
# ---- build list: end ----
"""
COMPILER = """#!{python}
import os, subprocess, sys, time
if "--version" in sys.argv:
    print("stand-in 1.0")
    sys.exit(0)
with open({log!r}, "a") as log:
    log.write("x")
time.sleep({pause})
sys.exit(subprocess.call([{real!r}, *sys.argv[1:]]))
"""
needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in _build.COMPILERS), reason="no C++ compiler on PATH"
)


CLIENT = """
import sys
from pathlib import Path
from mmkernels import _build, _native
print(_native._compile_once(_build.make_plan(Path(sys.argv[1])), _native._cache_folder()))
"""


class Tiny:
    """A source tree of two one-line units, an empty cache, and a compiler that counts its calls."""

    def __init__(self, root: Path):
        self.root = root
        self.cache = root.parent / "cache" / "native"
        (root / "csrc").mkdir(parents=True)
        (root / "CMakeLists.txt").write_text(LIST)
        (root / "csrc" / "once.cpp").write_text('extern "C" int answer() { return ANSWER; }\n')
        (root / "csrc" / "kernel.cpp").write_text("namespace MMK_ISA_NS { int level() { return 1; } }\n")
        self.compiler(pause=0)

    def compiler(self, pause: float) -> None:
        real = next(filter(None, map(shutil.which, _build.COMPILERS)), "c++")
        script = self.root / "compiler"
        script.write_text(COMPILER.format(python=sys.executable, log=str(self.root / "log"), pause=pause, real=real))
        script.chmod(script.stat().st_mode | stat.S_IXUSR)

    def calls(self) -> int:
        log = self.root / "log"
        return len(log.read_text()) if log.exists() else 0

    def plan(self) -> _build.Plan:
        return _build.make_plan(self.root)

    def client(self) -> subprocess.Popen[str]:
        """Another process that wants the library."""
        return subprocess.Popen(
            [sys.executable, "-c", CLIENT, str(self.root)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    made = Tiny(tmp_path / "tiny")
    monkeypatch.setenv("CXX", str(made.root / "compiler"))
    monkeypatch.setenv("MMKERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MMKERNELS_BUILD", raising=False)
    return made


@pytest.fixture
def fresh(monkeypatch, tiny):
    """mmkernels._native as a new process sees it, looking at the tiny sources."""
    monkeypatch.setattr(_native, "_state", _native._State())
    monkeypatch.setattr(_build, "source_root", lambda: tiny.root)
    monkeypatch.setattr(_native, "_PACKAGE", tiny.root)
    return _native


@needs_compiler
def test_two_processes_compile_once(tiny):
    tiny.compiler(pause=0.5)
    clients = [tiny.client() for _ in range(2)]
    outputs = [c.communicate(timeout=120) for c in clients]
    assert [c.returncode for c in clients] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert tiny.calls() == 3  # two units and the link
    library = Path(outputs[0][0].strip())
    assert ctypes.CDLL(str(library)).answer() == 42
    assert json.loads(library.with_suffix(".json").read_text())["levels"] == ["baseline"]
    assert [p.name for p in tiny.cache.iterdir() if ".tmp." in p.name] == []


@needs_compiler
def test_a_killed_build_leaves_nothing_broken(tiny):
    tiny.compiler(pause=60)
    victim = tiny.client()
    deadline = time.monotonic() + 60
    while tiny.calls() == 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [p for p in tiny.cache.iterdir() if ".tmp." in p.name]
    os.kill(victim.pid, signal.SIGKILL)
    victim.communicate()
    assert not list(tiny.cache.glob("*.so"))
    # The same compiler in name and version, so the same key, lock and leftovers.
    tiny.compiler(pause=0)
    library = _native._compile_once(tiny.plan(), _native._cache_folder())
    assert ctypes.CDLL(str(library)).answer() == 42
    assert [p.name for p in tiny.cache.iterdir() if ".tmp." in p.name] == []


@needs_compiler
def test_keys_change_with_what_matters(tiny):
    before = tiny.plan().keys
    assert before == tiny.plan().keys
    (tiny.root / "csrc" / "once.cpp").write_text('extern "C" int answer() { return ANSWER + 1; }\n')
    changed = tiny.plan().keys
    assert changed[0] != before[0]
    assert changed[1] == before[1]
    (tiny.root / "CMakeLists.txt").write_text(LIST.replace("-fPIC", "-fPIC -O1"))
    assert tiny.plan().keys[0] not in (before[0], changed[0])
    script = tiny.root / "compiler"
    script.write_text(script.read_text().replace("stand-in 1.0", "stand-in 2.0"))
    assert tiny.plan().keys[1] != before[1]


@needs_compiler
def test_an_edit_compiles_one_unit_and_old_files_are_swept_out(tiny):
    first = _native._compile_once(tiny.plan(), _native._cache_folder())
    leftover = tiny.cache / "0123-4567.tmp.dead"
    leftover.mkdir()
    for path in (first, leftover):
        os.utime(path, (time.time() - 40 * 86400,) * 2)
    (tiny.root / "csrc" / "once.cpp").write_text('extern "C" int answer() { return ANSWER + 1; }\n')
    calls = tiny.calls()
    second = _native._compile_once(tiny.plan(), _native._cache_folder())
    assert tiny.calls() == calls + 2  # the edited unit and the link
    assert ctypes.CDLL(str(second)).answer() == 43
    assert not first.exists()
    assert not leftover.exists()
    # A header that nothing includes costs the link alone; one that a unit includes costs that unit.
    (tiny.root / "csrc" / "new.h").write_text("")
    calls = tiny.calls()
    _native._compile_once(tiny.plan(), _native._cache_folder())
    assert tiny.calls() == calls + 1
    once = tiny.root / "csrc" / "once.cpp"
    once.write_text('#include "new.h"\n' + once.read_text())
    _native._compile_once(tiny.plan(), _native._cache_folder())
    (tiny.root / "csrc" / "new.h").write_text("// edited\n")
    calls = tiny.calls()
    _native._compile_once(tiny.plan(), _native._cache_folder())
    assert tiny.calls() == calls + 2


@needs_compiler
def test_a_refusal_is_remembered_with_the_compilers_words(tiny, fresh):
    (tiny.root / "csrc" / "once.cpp").write_text("int broken( { }\n")
    assert fresh.probe() is None
    with pytest.raises(BackendUnavailable, match=r"compiling csrc/once.cpp failed: .*error"):
        fresh.require()
    calls = tiny.calls()
    assert "broken" in fresh.status()["compiler_output"]
    with pytest.raises(BackendUnavailable, match=r"compiling csrc/once.cpp failed"):
        fresh.require()
    # The next process does not try again either, for an hour.
    fresh._state.reason, fresh._state.output = None, ""
    assert "delete" in fresh.probe()
    with pytest.raises(BackendUnavailable, match="remembered for an hour"):
        fresh.require()
    assert tiny.calls() == calls
    (record,) = tiny.cache.glob("*.failed")
    os.utime(record, (time.time() - 7200,) * 2)
    fresh._state.reason = None
    assert fresh.probe() is None


@needs_compiler
def test_a_damaged_library_is_replaced(tiny, fresh):
    library = _native._compile_once(tiny.plan(), _native._cache_folder())
    calls = tiny.calls()
    library.write_bytes(b"not a library")
    fresh.require()
    assert tiny.calls() == calls + 1  # linked anew from the objects
    assert any("did not load" in remark for remark in fresh._state.remarks)


def test_build_off_is_honoured(tiny, fresh, monkeypatch):
    monkeypatch.setenv("MMKERNELS_BUILD", "off")
    assert "MMKERNELS_BUILD=off" in fresh.probe()
    with pytest.raises(BackendUnavailable, match="MMKERNELS_BUILD=off"):
        fresh.require()
    assert tiny.calls() == 0
    assert fresh.status()["state"] == "unavailable"


@needs_compiler
def test_what_was_compiled_before_serves_without_a_compiler(tiny, fresh, monkeypatch):
    fresh.require()
    fresh._state.library = None
    monkeypatch.setenv("CXX", str(tiny.root / "missing"))
    monkeypatch.setenv("MMKERNELS_BUILD", "off")
    assert fresh.probe() is None
    fresh.require()


def test_a_missing_compiler_is_named(tiny, fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler --fast")
    assert fresh.probe() == "the C++ compiler named by CXX was not found: 'no-such-compiler --fast'"
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert fresh.probe() == "no C++ compiler on PATH (looked for c++, g++, clang++; set CXX)"


def test_a_cache_that_cannot_be_written(tiny, monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("a file where the cache folder should be")
    monkeypatch.setenv("MMKERNELS_CACHE", str(blocked / "cache"))
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    private = _native._cache_folder()
    assert private.parent == temporary
    assert private.stat().st_mode & 0o077 == 0
    private.chmod(0o777)  # others could plant a library there
    with pytest.raises(BuildError, match=r"is not private\. Set MMKERNELS_CACHE"):
        _native._cache_folder()


def test_the_build_list_holds_only_words(tiny):
    words = _build.build_list(tiny.root)
    assert words["MMK_SOURCES"] == ["csrc/once.cpp"]
    assert words["MMK_FLAGS_baseline"] == []
    (tiny.root / "CMakeLists.txt").write_text(LIST.replace("set(MMK_FLAGS -fPIC)", "if(UNIX)\nendif()"))
    with pytest.raises(BuildError, match=r"only set\(NAME word"):
        _build.build_list(tiny.root)


def test_a_platform_without_a_list_is_said(tiny, monkeypatch):
    monkeypatch.setattr(_build, "machine", lambda: "riscv64")
    with pytest.raises(BuildError, match=r"not written for .* on riscv64"):
        tiny.plan()
