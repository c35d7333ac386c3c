"""Real launches, compiled for a GPU that is not there; and that the rehearsal notices what does not compile."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmkernels._dispatch import registered

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}


def run(*command):
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


# conv_ssd_scan_2d launches what its parts launch.
OPS = [op for op, entry in registered().items() if "triton" in entry.entries and op != "conv_ssd_scan_2d"]


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_every_launch_of_the_contract_compiles(op):
    code, out, err = run("-m", "mmkernels.testing.rehearsal", "--only", op)
    assert code == 0, out + err
    assert int(out.split()[-5]) > 0, out  # "12 kernels compiled, 0 faults"


PLANTED = """
import torch, triton, triton.language as tl
from mmkernels._triton import Config
from mmkernels.testing.rehearsal import Rehearsal

@triton.jit
def kernel(x, y, rows, stride, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = row.to(tl.int64) * stride if WIDE else row * stride
    tl.store(y + row, tl.load(x + at, row < rows), row < rows)

x = torch.ones(64)
for block, wide in ((16, True), (16, False), (12, True)):
    rehearsal = Rehearsal("sm_90")
    rehearsal.launch(kernel, (1,), Config({"BLOCK": block}), x, x, 5, 7, WIDE=wide)
    print(len(rehearsal.compiled), [f.split(": ")[1][:22] for f in rehearsal.faults])
rehearsal.launch(kernel, (1,), Config({"BLOCKS": 16}), x, x, 5, 7, WIDE=wide)
print("BLOCK" in rehearsal.faults[-1])
"""


def test_what_does_not_compile_is_noticed(tmp_path):
    script = tmp_path / "planted.py"  # Triton reads the source of what it compiles
    script.write_text(PLANTED)
    code, out, err = run(str(script))
    assert code == 0, err
    assert out.splitlines() == [
        "1 []",
        "1 ['kernel']",
        "0 ['kernel does not compil']",
        "True",
    ]
