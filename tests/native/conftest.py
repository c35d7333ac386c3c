"""Small C++ libraries compiled from csrc/ with the real flags, one level at a time."""

import ctypes
import subprocess

import pytest

from mmkernels import _build, _native
from mmkernels._dispatch import registered


@pytest.fixture(scope="session", autouse=True)
def native_ready():
    """These tests are about the native backend: where a compiler is and the build is broken they fail, not skip."""
    reason = _native.probe()
    if reason is not None and ("no C++ compiler" in reason or "MMKERNELS_BUILD=off" in reason):
        pytest.skip(reason)
    _native.require()
    for op in registered().values():  # fake kernels and gradients, for tests that call torch.ops.mmkernels themselves
        if "native" in op.entries:
            assert op.entries["native"].unavailable() is None


@pytest.fixture(scope="session")
def compile_cpp(tmp_path_factory):
    """compile_cpp(sources, level, *flags) -> path of a program, or of a library if -shared is among the flags."""
    root = _build.source_root()
    words = _build.build_list(root)

    def compile_(name: str, sources: list, level: str | None, *flags: str):
        out = tmp_path_factory.mktemp("cpp") / f"{name}-{level}"
        level_flags = [] if level is None else [f"-DMMK_ISA_NS={level}", *words[f"MMK_FLAGS_{level}"]]
        command = [*_build.find_compiler(), *words["MMK_FLAGS"], *level_flags, f"-I{root / 'csrc'}"]
        done = subprocess.run(
            [*command, *map(str, sources), "-o", str(out), *flags], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "warning" not in done.stderr, done.stderr
        return out

    return compile_


@pytest.fixture(scope="session", params=_build.build_list(_build.source_root())[f"MMK_LEVELS_{_build.machine()}"])
def level(request):
    """Every ISA level of this processor's family that this CPU can run."""
    if request.param not in _native.isa_levels():
        pytest.skip(f"this CPU has no {request.param}")
    return request.param


@pytest.fixture(scope="session")
def vec(level, compile_cpp):
    """The functions of vec_probe.cpp at one level."""
    from pathlib import Path

    source = Path(__file__).with_name("vec_probe.cpp")
    return ctypes.CDLL(str(compile_cpp("vec_probe", [source], level, "-shared")))
