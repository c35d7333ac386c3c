"""gated_rms_norm against transformers' MambaRMSNormGated, and for the norm-first order against the plain torch formula.

Shapes: the closing norm of mamba2-130m and of an mmMamba layer (per head, gate afterwards), and a decode step.
"""

import pytest
import torch
import torch.nn.functional as F
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated

from mmkernels import gated_rms_norm

GATE_FIRST = {"prefill": (1, 2048, 1536), "decode": (1, 1, 1536), "training": (64, 20, 128)}
NORM_FIRST = {"prefill": (1, 1024, 16, 128), "decode": (1, 1, 16, 128), "training": (64, 20, 4, 32)}
DTYPES = [torch.float32, torch.bfloat16]
# The peers round after the norm and again after the weight or the gate: a few units in the last place of bfloat16.
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 4e-2, "atol": 4e-2}}


def problem(size, dtype):
    torch.manual_seed(0)
    return (
        torch.randn(size).to(dtype),
        torch.randn(size).to(dtype),
        torch.nn.Parameter(torch.ones(size[-1], dtype=dtype)),
    )


def ours(x, z, weight, before):
    return gated_rms_norm(x, weight, z=z, norm_before_gate=before)


def peer(x, z, weight, before):
    if before:
        return F.rms_norm(x, weight.shape, weight, 1e-5) * F.silu(z)
    norm = MambaRMSNormGated(weight.shape[0], group_size=weight.shape[0], eps=1e-5)
    norm.weight = weight
    return norm(x, z)


def forward_backward(function, x, z, weight, before):
    return torch.autograd.grad(function(x, z, weight, before).sum(), [x, z, weight])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("who", [ours, peer], ids=["mmkernels", "transformers"])
@pytest.mark.parametrize("before", [False, True], ids=["gate-first", "norm-first"])
@pytest.mark.parametrize("shape", GATE_FIRST)
def bench_forward(benchmark, shape, before, who, dtype):
    x, z, weight = problem((NORM_FIRST if before else GATE_FIRST)[shape], dtype)
    benchmark.group = f"gated_rms_norm forward {'norm' if before else 'gate'}-first {shape} {dtype}"
    with torch.no_grad():
        torch.testing.assert_close(ours(x, z, weight, before), peer(x, z, weight, before), **TOLERANCE[dtype])
        benchmark(who, x, z, weight, before)


@pytest.mark.parametrize("who", [ours, peer], ids=["mmkernels", "transformers"])
@pytest.mark.parametrize("before", [False, True], ids=["gate-first", "norm-first"])
@pytest.mark.parametrize("shape", ["prefill", "training"])
def bench_forward_backward(benchmark, shape, before, who):
    x, z, weight = problem((NORM_FIRST if before else GATE_FIRST)[shape], torch.float32)
    x, z = x.requires_grad_(), z.requires_grad_()
    benchmark.group = f"gated_rms_norm forward and backward {'norm' if before else 'gate'}-first {shape}"
    pairs = zip(forward_backward(ours, x, z, weight, before), forward_backward(peer, x, z, weight, before), strict=True)
    for got, want in pairs:
        # Weight gradients are sums over every row in another order: judged against their largest element.
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * want.abs().max().item())
    benchmark(forward_backward, who, x, z, weight, before)
