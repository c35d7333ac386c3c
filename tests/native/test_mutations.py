"""A fault planted in a kernel must fail the contract: what the checks are worth.

Each fault is one edit of a unit of csrc/, compiled for the level this CPU chooses and linked with the sound objects of
all other units.  That library must fail the error bar of the named case, which the sound one passes.  A library carries
several faults at once, of ops that share no kernel.
"""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmkernels import _build, _native

ROOT = _build.source_root()
KERNELS = ROOT / "csrc" / "cpu"


@dataclasses.dataclass(frozen=True)
class Fault:
    what: str
    source: str
    text: str
    instead: str
    op: str
    case: str  # the one that must notice
    dtype: str = "float32"
    pairs: bool = False  # in what only pairs of bfloat16 numbers go through

    @property
    def check(self) -> str:
        """As CHECK takes it."""
        return f"{self.op}:{self.case}:{self.dtype}"


FAULTS = [
    Fault(
        "a later token leaks in", "ssd_fwd.cpp", "from_lane(row, diag", "from_lane(row - 1, diag", "ssd_scan", "plain"
    ),
    Fault("no decay between chunks", "ssd_fwd.cpp", ", update.scale = &decays.all;", ";", "ssd_scan", "mamba2"),
    Fault(
        "odd tokens do not reach the state",
        "ssd_fwd.cpp",
        "put(weighted_x, width, t, i, value * weight, next * next_weight)",
        "put(weighted_x, width, t, i, value * weight, V())",
        "ssd_scan",
        "mamba2",
        "bfloat16",
    ),
    Fault(
        "odd tokens do not reach dR",
        "ssd_bwd.cpp",
        "V::load(dy + (t + 1) * width + i) * next_grown : V()",
        "V() : V()",
        "ssd_scan",
        "mamba2",
        "bfloat16",
        pairs=True,
    ),
    Fault("D is forgotten", "ssd_fwd.cpp", "if (skips != nullptr)", "if (false)", "ssd_scan", "mixer"),
    Fault("dA loses the state", "ssd_bwd.cpp", "if (enters) after += r[k];", "", "ssd_scan", "states"),
    Fault(
        "dR is not carried",
        "ssd_bwd.cpp",
        "if (leaves) p.start = gradient(h)",
        "if (false) p.start = gradient(h)",
        "ssd_scan",
        "mamba2",
    ),
    Fault("ddt ignores softplus", "ssd_bwd.cpp", "none, grad * slope)", "none, grad)", "ssd_scan", "mixer"),
    Fault(
        "a step does not decay",
        "ssd_update.cpp",
        "V(dt * load_item<A>(a.A, 0, 0, head))",
        "V(A(0))",
        "ssd_update",
        "plain",
    ),
    Fault("D is ignored", "ssd_update.cpp", "if (a.D.data != nullptr) {", "if (false) {", "ssd_update", "mixer"),
    Fault(
        "the bias is forgotten",
        "causal_conv1d.cpp",
        "nullptr : static_cast<const A*>(a.bias) + at",
        "nullptr : nullptr",
        "causal_conv1d",
        "silu-bias",
    ),
    Fault(
        "d silu is sigmoid",
        "causal_conv1d.cpp",
        " * s * fma(out[r], V(A(1)) - s, V(A(1)))",
        " * s",
        "causal_conv1d",
        "silu-bias",
    ),
    Fault(
        "padding is not zero",
        "causal_conv1d.cpp",
        "if (piece.padding) {\n        for",
        "if (false) {\n        for",
        "causal_conv1d",
        "ids",
    ),
    Fault(
        "a window is not shifted",
        "causal_conv1d_step.cpp",
        "scratch.window + entering * n",
        "scratch.window",
        "causal_conv1d_update",
        "one-token",
    ),
    Fault("no bias", "decode_linear.cpp", "if (a.bias != nullptr) {", "if (false) {", "decode_linear", "one-row"),
    Fault(
        "the running sum is lost",
        "mamba2_step.cpp",
        "if (a.residual.data != nullptr) v +=",
        "if (false) v +=",
        "mamba2_step",
        "block",
    ),
    Fault("rates grow", "mamba2_step.cpp", "(-exp(V::load", "(exp(V::load", "mamba2_step", "block"),
    Fault("no eps", "gated_rms_norm.cpp", "A(n) + eps", "A(n)", "gated_rms_norm", "one-dim"),
    Fault(
        "the last keys are not scored",
        "token_pruning_scores.cpp",
        "j += whole ? kKeys : 1;",
        "j += kKeys;",
        "cls_attention_scores",
        "odd",
    ),
    Fault(
        "shared keys are taken in turn",
        "token_pruning_scores.cpp",
        "b, j, h / group)",
        "b, j, h % a.kv_heads)",
        "cls_attention_scores",
        "shared-keys",
    ),
    Fault(
        "the prefix is scored",
        "token_pruning_scores.cpp",
        "V::load(x + prefix + i, lanes)",
        "V::load(x + i, lanes)",
        "cls_attention_scores",
        "one-head",
    ),
    Fault(
        "rows see what comes later",
        "token_pruning_received.cpp",
        "r + a.keys - a.rows + 1",
        "r + a.keys - a.rows + 2",
        "attention_column_scores",
        "causal",
    ),
    Fault(
        "rows that do not count are averaged over",
        "token_pruning_received.cpp",
        "? a.rows : 0;",
        "? a.rows : 1;",
        "attention_column_scores",
        "masked",
    ),
    Fault(
        "masked keys take their share",
        "token_pruning_received.cpp",
        "sees ? A(0) : -static_cast<A>(__builtin_inf())",
        "A(0)",
        "attention_column_scores",
        "masked",
    ),
    Fault(
        "every tie is kept until the slots are full",
        "token_pruning_select.cpp",
        "tie && equal > 0",
        "tie",
        "prune_tokens",
        "ties",
    ),
    Fault(
        "places among those that may stay are taken for places among all",
        "token_pruning_select.cpp",
        "if (mask[i] && candidate++",
        "if (candidate++",
        "prune_tokens",
        "masked",
    ),
    Fault("-0 is below 0", "token_pruning_select.cpp", "value == 0 ? 0.0f : value", "value", "prune_tokens", "ties"),
    Fault(
        "negative is positive",
        "token_pruning_select.cpp",
        "bits < 0 ? bits ^ INT32_MAX : bits",
        "bits",
        "prune_tokens",
        "ties",
    ),
    Fault(
        "a lane keeps the last of equal cosines",
        "token_pruning_match.cpp",
        "above = value > most;",
        "above = ~(value < most);",
        "bipartite_soft_matching",
        "ties",
    ),
    Fault(
        "of equal cosines the later is merged first",
        "token_pruning_match.cpp",
        "values[from[right]] > values",
        "values[from[right]] >= values",
        "bipartite_soft_matching",
        "ties",
    ),
    Fault(
        "one token is merged into a slot",
        "token_pruning_merge.cpp",
        "i >= 0; i = next[i]) {",
        "i >= 0; i = -1) {",
        "merge_tokens",
        "many",
    ),
    Fault(
        "sizes do not pull at the mean",
        "token_pruning_merge.cpp",
        "grad_totals[slot] - pull[slot] / totals[slot]",
        "grad_totals[slot]",
        "merge_tokens",
        "plain",
    ),
    Fault(
        "the last direction stands for all",
        "merged_gated_rms_norm.cpp",
        "V(rstd[k]), sum);",
        "V(rstd[k]), V());",
        "merged_gated_rms_norm",
        "mean",
    ),
    Fault(
        "the gate hears of one direction only",
        "merged_gated_rms_norm.cpp",
        "fma(grad_v, value, V::load(grad_gate + i, lanes))",
        "(grad_v * value)",
        "merged_gated_rms_norm",
        "mean",
    ),
    Fault(
        "filters do not follow the scan",
        "causal_conv1d.cpp",
        "a.step * position : a.order[position]",
        "a.step * position : position",
        "causal_conv1d_2d",
        "paths",
    ),
    Fault("the mean is added", "gated_rms_norm.cpp", "V(-mean)", "V(mean)", "gated_rms_norm", "plain"),
]
COMPOSED = ("mamba2_step", "causal_conv1d_2d")  # made of other ops' kernels: their faults would be noticed for it
CHECK = """
import sys, torch
from pathlib import Path
from mmkernels import _native
torch.set_num_threads(1)
assert _native._load_cached(Path(sys.argv[1]))
from mmkernels.testing import CASES
from mmkernels.testing.contract import check_error_bar
for name in sys.argv[2:]:
    op, case, dtype = name.split(":")
    try:
        check_error_bar(next(c for c in CASES[op] if c.id == case), "native", getattr(torch, dtype))
    except AssertionError:
        print(name, "noticed")
    else:
        print(name, "passed")
"""


def test_every_kernel_has_a_fault():
    # An op with many faults of its own has a file for them: test_<op>_faults.py.
    own = [
        path.stem.removeprefix("test_").removesuffix("_faults") for path in Path(__file__).parent.glob("*_faults.py")
    ]
    sources = {path.name for path in KERNELS.glob("*.cpp") if not path.name.startswith(tuple(own))}
    lacking = sorted(sources - {fault.source for fault in FAULTS})
    assert not lacking, f"no fault is planted in {', '.join(lacking)}: add one to FAULTS"


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_the_text_of_a_fault_is_in_its_source_once(fault):
    assert (KERNELS / fault.source).read_text().count(fault.text) == 1


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """build(faults) -> the library with those faults, none for the sound one.  Sound objects are compiled once."""
    kept = tmp_path_factory.mktemp("objects")
    ready = _native._cache_folder() / "objects"
    if ready.is_dir():
        shutil.copytree(ready, kept, dirs_exist_ok=True)
    plan = _build.make_plan(ROOT)
    best = torch.ops.mmkernels.best_isa()

    def build_(faults: list[Fault]) -> Path:
        workspace = tmp_path_factory.mktemp("build")
        steps = {(step.source, step.level): step for step in plan.steps}
        for fault in faults:
            planted = workspace / fault.source
            planted.write_text((KERNELS / fault.source).read_text().replace(fault.text, fault.instead))
            paired = best == "avx512_bf16" and fault.dtype == "bfloat16"  # that level is for nothing else
            unit = (f"csrc/cpu/{fault.source}", best if paired else best.removesuffix("_bf16"))
            # -O1: the compiler is done in half the time, and a fault is none of the optimiser's business.
            steps[unit] = dataclasses.replace(steps[unit], source=str(planted), flags=(*steps[unit].flags, "-O1"))
        _build.compile_library(dataclasses.replace(plan, steps=tuple(steps.values())), workspace, kept)
        return workspace / _build.LIBRARY

    return build_


def verdicts(library: Path, names: list[str]) -> dict[str, str]:
    """What the contract says of each "op:case" with this library."""
    command = [sys.executable, "-c", CHECK, str(library), *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(line.split(" ", 1) for line in done.stdout.splitlines())


def rounds(chosen: list[Fault]) -> list[list[Fault]]:
    """The faults in as few libraries as can be: one fault of each op, composed ops by themselves."""
    made: list[list[Fault]] = []
    for fault in chosen:
        alone = fault.op in COMPOSED
        fitting = (r for r in made if fault.op not in [f.op for f in r] and alone == (r[0].op in COMPOSED))
        room = next(fitting, None)
        if room is None:
            made.append([fault])
        else:
            room.append(fault)
    return made


@pytest.mark.slow  # compiles a unit for each fault
def test_faults_are_noticed(build):
    here = [fault for fault in FAULTS if not fault.pairs or torch.ops.mmkernels.best_isa() == "avx512_bf16"]
    names = list(dict.fromkeys(fault.check for fault in here))
    assert verdicts(build([]), names) == dict.fromkeys(names, "passed")
    missed = []
    for faults in rounds(here):
        said = verdicts(build(faults), [fault.check for fault in faults])
        missed += [fault for fault in faults if said[fault.check] != "noticed"]
    assert not missed
