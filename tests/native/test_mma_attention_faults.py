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


@pytest.mark.slow  # compiles the kernels once per fault
@pytest.mark.parametrize("fault", FAULTS)
def test_a_named_check_catches(fault, tmp_path):
    file, old, new, check = FAULTS[fault]
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    changed = tmp_path / "csrc/cpu" / file
    text = changed.read_text()
    if old:
        assert text.count(old) == 1, f"{file} has {text.count(old)} lines with {old!r}"
        changed.write_text(text.replace(old, new))
    (tmp_path / "others.cpp").write_text(_other_levels("baseline"))
    words = _build.build_list(ROOT)
    common = [*_build.find_compiler(), *words["MMK_FLAGS"], "-O1", f"-I{tmp_path / 'csrc'}", "-w"]
    objects = []
    for kernel in KERNELS:
        objects.append(tmp_path / f"{kernel}.o")
        level = ["-DMMK_ISA_NS=baseline", *words["MMK_FLAGS_baseline"]]
        subprocess.run([*common, *level, "-c", tmp_path / "csrc/cpu" / kernel, "-o", objects[-1]], check=True)
    once = [tmp_path / "csrc/common/isa.cpp", tmp_path / "csrc/common/scratch.cpp", tmp_path / "others.cpp"]
    program = tmp_path / "alone"
    driver = HERE / "mma_attention_alone.cpp"
    subprocess.run([*common, *once, driver, *objects, "-o", program], check=True)
    done = subprocess.run([str(program), "baseline"], capture_output=True, text=True, check=False)
    said = done.stdout.strip().split(":")[0]
    assert said == check, f"{fault}: {done.stdout}{done.stderr[-1000:]}"
    assert (done.returncode == 0) == (check == "ok")
