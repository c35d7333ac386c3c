"""The line of torch one writes without any package: for the ops where torch itself has the main part."""

import torch.nn.functional as F
from torch import Tensor

from mmkernels.bench.problems import Prepared, Problem


def norm(problem: Problem) -> Prepared:
    """`F.rms_norm` before or after the gate."""
    a, size = problem.args, problem.args["weight"].shape

    def gate_first() -> Tensor:
        return F.rms_norm(a["x"] * F.silu(a["z"]), size, a["weight"], 1e-5)

    def norm_first() -> Tensor:
        return F.rms_norm(a["x"], size, a["weight"], 1e-5) * F.silu(a["z"])

    return Prepared(norm_first if problem.cell.sizes.norm_per_head else gate_first)
