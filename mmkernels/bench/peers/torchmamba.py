"""torchmamba's `ssd_chunkwise`, a port of the paper's listing to plain PyTorch."""

import torch.nn.functional as F
from torch import Tensor

from mmkernels.bench.peers import fetched
from mmkernels.bench.problems import Prepared, Problem


def scan(problem: Problem, *, chunk: int = 64) -> Prepared:
    """`ssd_chunkwise`; step size and skip are the caller's."""
    function = fetched.module("torchmamba", "torchmamba.mamba2.core").ssd_chunkwise
    a, dtype = problem.args, problem.args["x"].dtype

    def run() -> Tensor:
        dt = F.softplus(a["dt"] + a["dt_bias"])
        y = function(a["x"] * dt[..., None].to(dtype), dt * a["A"], a["B"], a["C"], chunk)[0]
        return y + a["x"] * a["D"][:, None].to(dtype)

    return Prepared(run)
