"""mamba_ssm's plain PyTorch functions, the ones its CUDA kernels are tested against."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from mmkernels.bench.peers import fetched
from mmkernels.bench.problems import Prepared, Problem, Unavailable


def _module(name: str) -> Any:
    return fetched.module("mamba-ssm", name, stand_ins=("selective_scan_cuda",))


def combined(problem: Problem, *, chunk: int = 64) -> Prepared:
    """`ssd_chunk_scan_combined_ref`."""
    a, function = problem.args, _module("mamba_ssm.ops.triton.ssd_combined").ssd_chunk_scan_combined_ref

    def run() -> Tensor:
        D = a["D"].to(a["x"].dtype)
        return function(a["x"], a["dt"], a["A"], a["B"], a["C"], chunk, D=D, dt_bias=a["dt_bias"], dt_softplus=True)

    return Prepared(run)


def minimal(problem: Problem, *, chunk: int = 64) -> Prepared:
    """`ssd_minimal_discrete`: listing 1 of the paper; step size, skip and the groups' expansion are the caller's."""
    a, function = problem.args, _module("mamba_ssm.modules.ssd_minimal").ssd_minimal_discrete
    heads, dtype = problem.cell.sizes.nheads, a["x"].dtype
    if problem.cell.seqlen % chunk:
        raise Unavailable(f"takes lengths divisible by its chunk of {chunk} only")

    def run() -> Tensor:
        dt = F.softplus(a["dt"] + a["dt_bias"])
        B, C = (a[n].repeat_interleave(heads // a[n].shape[2], 2) if a[n].shape[2] > 1
                else a[n].expand(-1, -1, heads, -1) for n in "BC")  # fmt: skip
        y = function(a["x"] * dt[..., None].to(dtype), (dt * a["A"]).to(dtype), B, C, chunk)[0]
        return y + a["x"] * a["D"][:, None].to(dtype)

    return Prepared(run)


def selective(problem: Problem) -> Prepared:
    """`selective_scan_ref`: Mamba-1's step-by-step recurrence, given one rate per head."""
    a, s = problem.args, problem.cell.sizes
    function = _module("mamba_ssm.ops.selective_scan_interface").selective_scan_ref

    def run() -> Tensor:
        u = a["x"].flatten(2).transpose(1, 2)
        dt = a["dt"].repeat_interleave(s.headdim, 2).transpose(1, 2)
        A = a["A"].repeat_interleave(s.headdim)[:, None].expand(-1, s.dstate)
        B, C = (a[n].permute(0, 2, 3, 1) for n in "BC")  # (batch, groups, dstate, seqlen)
        B, C = (B[:, 0], C[:, 0]) if s.ngroups == 1 else (B, C)
        D, bias = a["D"].repeat_interleave(s.headdim), a["dt_bias"].repeat_interleave(s.headdim)
        return function(u, dt, A, B, C, D=D, delta_bias=bias, delta_softplus=True)

    return Prepared(run, lambda y: y.transpose(1, 2).unflatten(2, (s.nheads, s.headdim)))
