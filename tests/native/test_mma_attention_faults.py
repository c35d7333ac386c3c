"""Planted faults in the C++ attention: each changes one line, and a named check of the driver must fail."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from mmkernels import _build, _native

HERE = Path(__file__).resolve().parent
ROOT = _build.source_root()
FORWARD, FEW, BACKWARD = KERNELS = ("mma_attention_fwd.cpp", "mma_attention_few.cpp", "mma_attention_bwd.cpp")
TILE = "mma_attention_tile.h"
BF16 = "avx512_bf16"

# Where, what is replaced, by what, and which check must say so.  "pairs: ..." spoils what only pairs of bfloat16
# numbers go through, and needs a CPU that multiplies them.
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
    "pairs: none": (
        TILE,
        "",
        "",
        "ok",
    ),
    "pairs: last key of an odd number left out": (
        TILE,
        "depth_of<E>(to), first, last",
        "to / Factor<E>::depth, first, last",
        "out",
    ),
    "pairs: sums one pair of keys too short": (
        FORWARD,
        "depth_of<E>(n), p, 1",
        "depth_of<E>(n), p + kQueryTile, 1",
        "out",
    ),
    "pairs: exponents not scaled": (
        FORWARD,
        "fma(score, by, -base)",
        "score - base",
        "lse",
    ),
    "pairs: an even key's value for the odd one's": (
        FORWARD,
        "value(j), value(j + 1)",
        "value(j), value(j)",
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


def _other_levels(built: tuple[str, ...]) -> str:
    """Empty kernels for the levels that are not built here: nothing calls them."""
    header = (ROOT / "csrc/cpu/mma_attention.h").read_text()
    kernels = re.findall(r"MMK_KERNEL(_BF16)?\((\w+), (\w+)\)", header)
    levels = [name for name in _build.build_list(ROOT)[f"MMK_LEVELS_{_build.machine()}"] if name not in built]
    bodies = [
        f"namespace mmkernels::{name} {{ void {kernel}(const {struct}&) {{}} }}"
        for name in levels
        for bf16, kernel, struct in kernels
        if bf16 or name != BF16
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
    # avx512_bf16 has the kernels of avx512 for everything but bfloat16.
    built = ("avx512", BF16) if fault.startswith("pairs: ") else ("baseline",)
    if built[-1] not in _native.isa_levels():
        pytest.skip(f"this CPU has no {built[-1]}")
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    changed = csrc / "cpu" / file
    text = changed.read_text()
    if old:
        assert text.count(old) == 1, f"{file} has {text.count(old)} lines with {old!r}"
        changed.write_text(text.replace(old, new))
    words = _build.build_list(ROOT)
    objects = [
        compiled(csrc, csrc / "cpu" / kernel, f"-DMMK_ISA_NS={level}", *words[f"MMK_FLAGS_{level}"])
        for level in built
        for kernel in KERNELS
        if f"csrc/cpu/{kernel}" in _build.kernel_sources(words, level)
    ]
    (tmp_path / "others.cpp").write_text(_other_levels(built))
    # What no fault touches is compiled against the sound headers, once.
    once = [ROOT / "csrc/common/isa.cpp", ROOT / "csrc/common/scratch.cpp", tmp_path / "others.cpp"]
    objects += [compiled(ROOT / "csrc", source) for source in (*once, HERE / "mma_attention_alone.cpp")]
    program = tmp_path / "alone"
    subprocess.run([*_build.find_compiler(), *map(str, objects), "-o", str(program)], check=True)
    done = subprocess.run([str(program), built[-1]], capture_output=True, text=True, check=False)
    said = done.stdout.strip().split(":")[0]
    assert said == check, f"{fault}: {done.stdout}{done.stderr[-1000:]}"
    assert (done.returncode == 0) == (check == "ok")
