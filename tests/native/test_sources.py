"""What must hold of csrc/ itself: one list of sources, levels that stay apart, memory that is written and in bounds."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmkernels import _build, _native
from mmkernels.testing import poisoned_allocations

HERE = Path(__file__).resolve().parent
ROOT = _build.source_root()
WORDS = _build.build_list(ROOT)
LEVELS = WORDS[f"MMK_LEVELS_{_build.machine()}"]
WIDE = [(source, level) for level in LEVELS[2:] or LEVELS[-1:] for source in _build.kernel_sources(WORDS, level)]


def test_every_source_is_on_the_build_list():
    listed = set(WORDS["MMK_SOURCES"] + WORDS["MMK_KERNEL_SOURCES"])
    present = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.cpp")}
    assert present == listed


def test_every_schema_is_in_registration():
    for path in (ROOT / "csrc").rglob("*.cpp"):
        if path.name != "registration.cpp":
            assert "m.def(" not in path.read_text(), f"{path} defines a schema; put it in csrc/registration.cpp"
    schemas = re.findall(r'm\.def\(\s*"(\w+)\(', (ROOT / "csrc" / "registration.cpp").read_text())
    assert schemas, "no schema found"
    for name in schemas:
        assert hasattr(torch.ops.mmkernels, name)


def test_an_edit_costs_the_units_that_include_it(tmp_path):
    csrc = tmp_path / "csrc"
    (csrc / "common").mkdir(parents=True)
    (csrc / "cpu").mkdir()
    (csrc / "common" / "a.h").write_text('#pragma once\n#include "common/b.h"\n#include <vector>\n')
    (csrc / "common" / "b.h").write_text("#pragma once\n")
    (csrc / "common" / "other.h").write_text("#pragma once\n")
    (csrc / "cpu" / "near.h").write_text("#pragma once\n")
    (csrc / "cpu" / "op.cpp").write_text('#include "near.h"\n  #  include "common/a.h"\n')
    read = [path.relative_to(csrc).as_posix() for path in _build.included_files(tmp_path, "csrc/cpu/op.cpp")]
    assert read == ["common/a.h", "common/b.h", "cpu/near.h", "cpu/op.cpp"]


def test_only_the_stable_abi_is_included():
    for path in (ROOT / "csrc").rglob("*.*"):
        for header in re.findall(r"#include <((?:torch|ATen|c10|Python)[^>]*)>", path.read_text()):
            assert header.startswith("torch/csrc/stable/"), f"{path} includes {header}"


@pytest.fixture(scope="module")
def objects():
    """(source, level) -> the object file that is in the library, where the build kept it."""
    plan = _build.make_plan(ROOT)
    kept = _native._cache_folder() / "objects"
    return {(step.source, step.level): kept / f"{_build.object_key(plan, step)}.o" for step in plan.steps}


@pytest.mark.slow  # compiles each kernel once more where its object was not kept
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) lists symbols; it is not on PATH")
@pytest.mark.parametrize(("source", "level"), WIDE)
def test_kernels_of_a_level_share_no_code_with_other_levels(source, level, compile_cpp, objects):
    # A weak symbol outside the level's namespace is an inline function that the linker merges across levels: the
    # baseline could get the copy made of wide instructions.
    compiled = objects[source, level]
    if not compiled.exists():
        compiled = compile_cpp(Path(source).stem, [ROOT / source], level, "-c")
    symbols = subprocess.run(["nm", "-C", str(compiled)], capture_output=True, text=True, check=True).stdout
    weak = [line for line in symbols.splitlines() if re.search(r" [WVu] ", line) and f"::{level}::" not in line]
    assert not weak, weak


def test_poison_reaches_memory_allocated_in_cpp(compile_cpp):
    folder, _ = _build.find_torch()
    flags = ["-shared", "-isystem", folder / "include", f"-L{folder / 'lib'}", "-ltorch_cpu"]
    flags += [f"-D{d}" for d in WORDS["MMK_DEFINITIONS"]]
    torch.ops.load_library(str(compile_cpp("poison_probe", [HERE / "poison_probe.cpp"], None, *map(str, flags))))
    with poisoned_allocations():
        assert torch.ops.mmkernels_probe.unwritten(9).isnan().all()
        assert torch.ops.mmkernels.poison(True)
    assert not torch.ops.mmkernels.poison(False)
    assert torch.ops.mmkernels_probe.unwritten_by_us(9).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_every_kernel_has_a_driver():
    ops = tuple(path.stem.removesuffix("_alone") for path in HERE.glob("*_alone.cpp"))
    lacking = [source for source in WORDS["MMK_KERNEL_SOURCES"] if not Path(source).stem.startswith(ops)]
    assert not lacking, f"no <op>_alone.cpp runs {', '.join(lacking)} under the sanitizers"


def _empty_kernels(op: str, level: str) -> str:
    """The kernels of an op at a level that is not built: nothing calls them."""
    lines = []
    for header in sorted((ROOT / "csrc/cpu").glob(f"{op}*.h")):
        kernels = re.findall(r"MMK_KERNEL(?:_BF16)?\((\w+), (\w+)\)", header.read_text())
        lines += [f'#include "cpu/{header.name}"'] if kernels else []
        lines += [
            f"namespace mmkernels::{level} {{ void {kernel}(const {struct}&) {{}} }}" for kernel, struct in kernels
        ]
    return "\n".join(lines) + "\n"


@pytest.mark.slow  # the sanitizers multiply the compiler's work
@pytest.mark.parametrize("driver", sorted(HERE.glob("*_alone.cpp")), ids=lambda path: path.stem)
def test_kernels_under_sanitizers(driver, tmp_path):
    """<op>_alone.cpp runs the kernels of csrc/cpu/<op>*.cpp without torch."""
    compiler = _build.find_compiler()
    flags = [*WORDS["MMK_FLAGS"], "-O0", f"-I{ROOT / 'csrc'}", "-DMMK_POISON_SCRATCH"]
    flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    if "Free Software" in subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout:
        flags += [
            "--param",
            "asan-instrumentation-with-call-threshold=0",
        ]  # checks as calls: gcc is done in half the time
    op = driver.stem.removesuffix("_alone")
    units = [(source, level) for level in LEVELS for source in _build.kernel_sources(WORDS, level)]
    # avx2 is baseline with wider vectors: the same lines for partial ones.  It is left to CPUs that have no more.
    left_out = "avx2" if "avx512" in _native.isa_levels() else ""
    units = [(source, level) for source, level in units if Path(source).stem.startswith(op) and level != left_out]
    assert units, f"no kernel of csrc/cpu belongs to {driver.name}"
    objects = []
    for source, level in units:
        objects.append(tmp_path / f"{Path(source).stem}-{level}.o")
        extra = [f"-DMMK_ISA_NS={level}", *WORDS[f"MMK_FLAGS_{level}"], "-c", str(ROOT / source)]
        subprocess.run([*compiler, *flags, *extra, "-o", str(objects[-1])], check=True)
    (tmp_path / "left_out.cpp").write_text(_empty_kernels(op, left_out) if left_out else "")
    once = [ROOT / "csrc/common/isa.cpp", ROOT / "csrc/common/scratch.cpp", tmp_path / "left_out.cpp", driver]
    program = tmp_path / driver.stem
    subprocess.run([*compiler, *flags, *map(str, once), *map(str, objects), "-o", str(program)], check=True)
    for level in _native.isa_levels():
        if level == left_out:
            continue
        done = subprocess.run([str(program), level], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout.strip()) == (0, "ok"), f"{level}: {done.stdout}{done.stderr[-3000:]}"


@pytest.mark.slow  # a whole build
@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not on PATH")
def test_cmake_builds_a_library_that_runs(tmp_path, quick_compiler):
    folder, _ = _build.find_torch()
    configure = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), f"-DMMKERNELS_TORCH_DIR={folder}"]
    configure.append(f"-DCMAKE_CXX_COMPILER={quick_compiler}")
    for command in (configure, ["cmake", "--build", str(tmp_path)]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    script = (
        "import sys, torch; torch.ops.load_library(sys.argv[1]); x = torch.ones(2, 8); "
        "print(torch.ops.mmkernels.gated_rms_norm(x, torch.ones(8), None, None, 0.0, 8, False).sum().item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / _build.LIBRARY)], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "16.0", done.stderr
