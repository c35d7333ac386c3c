"""Planted faults in the C++ attention: each changes one line, and a named check of the driver must fail."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from mmkernels import _build

HERE = Path(__file__).resolve().parent
ROOT = _build.source_root()
FORWARD, FEW, BACKWARD = KERNELS = ("mma_attention_fwd.cpp", "mma_attention_few.cpp", "mma_attention_bwd.cpp")
TILE = "mma_attention_tile.h"

# Where, what is replaced, by what, and which check must say so.
FAULTS = {
    "none": (
        TILE,
        "",
        "",
        "ok",
    ),
    "mask one key too far": (
        TILE,
        "(key < to)",
        "~(to < key)",
        "out",
    ),
    "mask one key too late": (
        TILE,
        "~(key < from)",
        "(from < key)",
        "out",
    ),
    "rectangles forgotten in partial tiles": (
        TILE,
        "added[j] |= lanes",
        "(void)lanes",
        "out",
    ),
    "old sums not rescaled": (
        FORWARD,
        "sums.scale = decay, ",
        "",
        "out",
    ),
    "another head's keys": (
        FORWARD,
        "at<T>(a.k, task.batch, key, task.kv_head)",
        "at<T>(a.k, task.batch, key, 0)",
        "out",
    ),
    "last live key left out": (
        TILE,
        "to = most(to, hi[r])",
        "to = most(to, hi[r] - 1)",
        "out",
    ),
    "few: old sums not rescaled": (
        FEW,
        "(V::load(o + i) * decay)",
        "V::load(o + i)",
        "out of few",
    ),
    "few: mask forgotten": (
        FEW,
        "if (!sees(r, j)) s[j] = none;",
        "",
        "out of few",
    ),
    "few: another head's values": (
        FEW,
        "at<T>(a.v, task.batch, key, task.kv_head + h)",
        "at<T>(a.v, task.batch, key, task.kv_head)",
        "out of few",
    ),
    "stretches joined without shares": (
        FEW,
        "V(weight(s) * inverse)",
        "V(inverse)",
        "out of stretches",
    ),
    "lse in base 2": (
        FORWARD,
        "lse * static_cast<A>(kLn2)",
        "lse",
        "lse",
    ),
    "mass of rows without weight": (
        BACKWARD,
        "weight[r] = of_row",
        "weight[r] = 1",
        "mass",
    ),
    "gradient without its row's mean": (
        BACKWARD,
        "V::load(at_ds) : V()) - inner)",
        "V::load(at_ds) : V()) - V())",
        "grad_q",
    ),
    "gradient of lse with the wrong sign": (
        BACKWARD,
        "delta[r] = -static_cast",
        "delta[r] = static_cast",
        "grad_q",
    ),
    "last live query left out": (
        TILE,
        "from = least(from, r), to = r + 1",
        "from = least(from, r), to = r",
        "grad_k",
    ),
    "grad_k of scaled queries": (
        BACKWARD,
        "write(grad_k, a.klen, a.scale,",
        "write(grad_k, a.klen, 1,",
        "grad_k",
    ),
    "grad_v of one query head": (
        BACKWARD,
        "      clear(grad_q, a.qlen);",
        "      clear(grad_q, a.qlen), clear(grad_v, a.klen);",
        "grad_v",
    ),
}


def _other_levels(level: str) -> str:
    """Empty kernels for the levels that are not built here: nothing calls them."""
    header = (ROOT / "csrc/cpu/mma_attention.h").read_text()
    kernels = re.findall(r"MMK_KERNEL\((\w+), (\w+)\)", header)
    levels = [name for name in _build.build_list(ROOT)[f"MMK_LEVELS_{_build.machine()}"] if name != level]
    bodies = [
        f"namespace mmkernels::{name} {{ void {kernel}(const {struct}&) {{}} }}"
        for name in levels
        for kernel, struct in kernels
    ]
    return "\n".join(['#include "cpu/mma_attention.h"', *bodies])


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """compiled(csrc, source, *flags) -> its object; one that was made from the same text before is used again."""
    folder, kept = tmp_path_factory.mktemp("objects"), {}
    words = _build.build_list(ROOT)

    def compile_(csrc: Path, source: Path, *flags: str) -> Path:
        headers = [path.read_bytes() for path in sorted(csrc.rglob("*.h"))]
        key = (source.name, source.read_bytes(), *headers, *flags)
        if key not in kept:
            kept[key] = folder / f"{len(kept)}.o"
            command = [*_build.find_compiler(), *words["MMK_FLAGS"], "-O0", f"-I{csrc}", "-w", *flags]
            subprocess.run([*command, "-c", str(source), "-o", str(kept[key])], check=True)
        return kept[key]

    return compile_


@pytest.mark.slow  # compiles a kernel once per fault
@pytest.mark.parametrize("fault", FAULTS)
def test_a_named_check_catches(fault, tmp_path, compiled):
    file, old, new, check = FAULTS[fault]
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    changed = csrc / "cpu" / file
    text = changed.read_text()
    if old:
        assert text.count(old) == 1, f"{file} has {text.count(old)} lines with {old!r}"
        changed.write_text(text.replace(old, new))
    level = ["-DMMK_ISA_NS=baseline", *_build.build_list(ROOT)["MMK_FLAGS_baseline"]]
    objects = [compiled(csrc, csrc / "cpu" / kernel, *level) for kernel in KERNELS]
    (tmp_path / "others.cpp").write_text(_other_levels("baseline"))
    # What no fault touches is compiled against the sound headers, once.
    once = [ROOT / "csrc/common/isa.cpp", ROOT / "csrc/common/scratch.cpp", tmp_path / "others.cpp"]
    objects += [compiled(ROOT / "csrc", source) for source in (*once, HERE / "mma_attention_alone.cpp")]
    program = tmp_path / "alone"
    subprocess.run([*_build.find_compiler(), *map(str, objects), "-o", str(program)], check=True)
    done = subprocess.run([str(program), "baseline"], capture_output=True, text=True, check=False)
    said = done.stdout.strip().split(":")[0]
    assert said == check, f"{fault}: {done.stdout}{done.stderr[-1000:]}"
    assert (done.returncode == 0) == (check == "ok")
