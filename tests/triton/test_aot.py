"""Triton kernels compiled for GPUs that this machine does not have: budgets and offsets, and the checks of those."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmkernels.testing import aot

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
# Nothing of the interpreter may reach the compiler: a process of its own.
COMPILING = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}


def survey(tmp_path, *arguments):
    out = tmp_path / "budgets.json"
    command = [sys.executable, "-m", "mmkernels.testing.aot", "--json", str(out), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=COMPILING, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    return [aot.Budget(**entry) for entry in json.loads(out.read_text())]


def test_every_file_of_kernels_is_surveyed():
    files = {p for p in (ROOT / "mmkernels").rglob("_triton_*.py") if "@triton.jit" in p.read_text()}
    names = {".".join(p.relative_to(ROOT).with_suffix("").parts) for p in files}
    assert names == set(aot.MODULES)


# (every, first): all specimens for the least shared memory, each for one of the other three, half for the other vendor.
# The committed table has all of all.
SHARE = {"sm_120": (1, 0), "sm_80": (3, 0), "sm_90": (3, 1), "sm_100": (3, 2), "gfx942": (2, 0)}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", aot.ARCHITECTURES)
def test_budgets(tmp_path, architecture):
    every, first = SHARE[architecture]
    budgets = survey(tmp_path, "--arch", architecture, "--every", str(every), "--first", str(first))
    assert len(budgets) >= len(aot.MODULES) // every
    assert not [fault for budget in budgets for fault in budget.faults]


def test_the_shared_kernels_compile_for_both_vendors(tmp_path):
    budgets = survey(tmp_path, "--arch", "sm_90", "gfx942", "--only", "column_sums")
    assert {b.architecture for b in budgets} == {"sm_90", "gfx942"}
    assert all(b.registers > 0 and b.shared > 0 for b in budgets)
    assert not [fault for budget in budgets for fault in budget.faults]


def test_what_is_over_budget_is_said():
    fine = {"op": "op", "kernel": "k", "label": "l", "config": "", "warps": 4, "spilled": 0, "narrow_offsets": []}
    over = aot.Budget(architecture="sm_120", shared=100 * 1024, registers=256, **fine)
    assert len(over.faults) == 2
    assert "102400 bytes of shared memory" in over.faults[0]
    assert not aot.Budget(architecture="sm_90", shared=100 * 1024, registers=255, **fine).faults


PLANTED = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mmkernels.testing.aot import narrow_offsets

@triton.jit
def kernel(x, y, rows, stride, WIDE: tl.constexpr, CARRIED: tl.constexpr):
    row = tl.program_id(0) * 4 + tl.arange(0, 4)
    column = tl.arange(0, 16)
    if WIDE:
        row = row.to(tl.int64)
    if CARRIED:
        at = row * 0
        for _ in range(rows):
            at += stride * rows if not WIDE else rows.to(tl.int64) * stride
    else:
        at = row * stride
    tl.store(y + row[:, None] * 16 + column[None, :], tl.load(x + at[:, None] + column[None, :]))

for wide in (False, True):
    for carried in (False, True):
        types = {"x": "*fp32", "y": "*fp32", "rows": "i32", "stride": "i32"}
        types |= {"WIDE": "constexpr", "CARRIED": "constexpr"}
        source = ASTSource(kernel, types, {(4,): wide, (5,): carried})
        ttir = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ttir"]
        print(len(narrow_offsets(ttir)))
"""


def test_an_offset_multiplied_in_32_bits_is_found(tmp_path):
    script = tmp_path / "planted.py"  # Triton reads the source of what it compiles
    script.write_text(PLANTED)
    env = {**COMPILING, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1", "1", "0", "0"]
