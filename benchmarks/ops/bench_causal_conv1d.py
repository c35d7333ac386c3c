"""causal_conv1d against what transformers runs on a CPU: its Mamba-2 functions, F.conv1d over channels-first data.

Shapes: the prefill of mamba2-130m and of an mmMamba layer, a training batch of a small model, and one decode step.
"""

import pytest
import torch
from torch import nn
from transformers.models.mamba2 import modeling_mamba2

from mmkernels import causal_conv1d, causal_conv1d_update

SHAPES = {  # batch, seqlen, dim, width
    "mamba2-130m": (1, 2048, 1792, 4),
    "mmmamba-2.7b": (1, 1024, 4096, 2),
    "training": (64, 20, 256, 2),
}
DTYPES = [torch.float32, torch.bfloat16]
# Both sides round once from sums of at most 4 products and differ in the order of summation.
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}


def problem(shape, dtype):
    torch.manual_seed(0)
    batch, seqlen, dim, width = SHAPES[shape]
    conv = nn.Conv1d(dim, dim, width, groups=dim, padding=width - 1).to(dtype)
    return torch.randn(batch, seqlen, dim).to(dtype), conv


def peer(x, conv):
    weight = conv.weight.squeeze(1)
    return modeling_mamba2.causal_conv1d_fn(x.transpose(1, 2), weight, conv.bias, activation="silu").transpose(1, 2)


def ours(x, conv):
    return causal_conv1d(x, conv.weight.squeeze(1), conv.bias, activation="silu")


def forward_backward(function, x, conv):
    return torch.autograd.grad(function(x, conv).sum(), [x, conv.weight, conv.bias])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("who", [ours, peer], ids=["mmkernels", "transformers"])
@pytest.mark.parametrize("shape", SHAPES)
def bench_forward(benchmark, shape, who, dtype):
    x, conv = problem(shape, dtype)
    benchmark.group = f"causal_conv1d forward {shape} {dtype}"
    with torch.no_grad():
        torch.testing.assert_close(ours(x, conv), peer(x, conv), **TOLERANCE[dtype])
        benchmark(who, x, conv)


@pytest.mark.parametrize("who", [ours, peer], ids=["mmkernels", "transformers"])
@pytest.mark.parametrize("shape", SHAPES)
def bench_forward_backward(benchmark, shape, who):
    x, conv = problem(shape, torch.float32)
    x.requires_grad_()
    benchmark.group = f"causal_conv1d forward and backward {shape}"
    for got, want in zip(forward_backward(ours, x, conv), forward_backward(peer, x, conv), strict=True):
        # Weight gradients are sums over every token in another order: judged against their largest element.
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * want.abs().max().item())
    benchmark(forward_backward, who, x, conv)


def peer_update(x, state, conv):
    weight = conv.weight.squeeze(1)
    return modeling_mamba2.causal_conv1d_update(x[..., None], state, weight, conv.bias, activation="silu")[..., 0]


def ours_update(x, state, conv):
    return causal_conv1d_update(x, state, conv.weight.squeeze(1), conv.bias, activation="silu")


@pytest.mark.parametrize("who", [ours_update, peer_update], ids=["mmkernels", "transformers"])
def bench_update(benchmark, who):
    x, conv = problem("mamba2-130m", torch.float32)
    benchmark.group = "causal_conv1d_update mamba2-130m"
    states = [torch.zeros(1, x.shape[2], 3) for _ in range(2)]
    with torch.no_grad():
        for t in range(5):
            torch.testing.assert_close(
                ours_update(x[:, t], states[0], conv), peer_update(x[:, t], states[1], conv), **TOLERANCE[torch.float32]
            )
        benchmark(who, x[:, 0], states[0], conv)
