"""ssd_scan against what transformers runs on a CPU: its `mamba2_chunk_scan`, at its default chunk of 256 and at 64.

Shapes: a layer of mamba2-130m at two prompt lengths, and a training batch of a small model.  Results are compared
before anything is timed.
"""

import pytest
import torch
from transformers.models.mamba2 import modeling_mamba2

from mmkernels import ssd_scan, ssd_update

SHAPES = {  # batch, seqlen, nheads, headdim, dstate
    "mamba2-130m-512": (1, 512, 24, 64, 128),
    "mamba2-130m-2048": (1, 2048, 24, 64, 128),
    "training": (64, 20, 4, 32, 32),
}
PREFILL = ("mamba2-130m-512", "mamba2-130m-2048")
# Sums over 64 to 256 tokens in another order; the peer's float32 prefix sums (of up to 256 * 16 * 0.1) add 4e-5.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def problem(shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    batch, seqlen, nheads, headdim, dstate = SHAPES[shape]

    def normal(*size):
        return torch.randn(*size, generator=generator)

    step = torch.empty(nheads).uniform_(-6.9, -2.3, generator=generator).exp()  # 1e-3 to 1e-1, as models start
    return {
        "x": normal(batch, seqlen, nheads, headdim).to(dtype),
        "dt": normal(batch, seqlen, nheads),
        "A": -torch.empty(nheads).uniform_(1, 16, generator=generator),
        "B": normal(batch, seqlen, 1, dstate).to(dtype),
        "C": normal(batch, seqlen, 1, dstate).to(dtype),
        "D": normal(nheads),
        "dt_bias": step + torch.log(-torch.expm1(-step)),
        "dt_softplus": True,
    }


def ours(backend):
    def run(args):
        return ssd_scan(**args, backend=backend)

    return run


def transformers_chunk(size):
    def peer(args):
        out = modeling_mamba2.mamba2_chunk_scan(
            args["x"], args["dt"], args["A"], args["B"], args["C"], size,
            D=args["D"], dt_bias=args["dt_bias"], dt_softplus=True,
        )  # fmt: skip
        return out[0] if isinstance(out, tuple) else out

    return peer


def assert_close(got, want, dtype):
    scale = want.float().abs().max()
    torch.testing.assert_close(got.float() / scale, want.float() / scale, rtol=0, atol=TOLERANCE[dtype])


CONTESTANTS = {
    "native": ours("native"),
    "torch": ours("torch"),
    "transformers-256": transformers_chunk(256),
    "transformers-64": transformers_chunk(64),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("who", CONTESTANTS)
@pytest.mark.parametrize("shape", PREFILL)
def bench_forward(benchmark, shape, who, dtype):
    args = problem(shape, dtype)
    benchmark.group = f"ssd_scan forward {shape} {dtype}"
    with torch.no_grad():
        assert_close(CONTESTANTS[who](args), ssd_scan(**args, backend="reference"), dtype)
        benchmark(CONTESTANTS[who], args)


@pytest.mark.parametrize("who", CONTESTANTS)
@pytest.mark.parametrize("shape", ["training", "mamba2-130m-512"])
def bench_forward_backward(benchmark, shape, who):
    args = problem(shape)
    inputs = [value.requires_grad_() for value in args.values() if isinstance(value, torch.Tensor)]

    def run(function):
        return torch.autograd.grad(function(args).sum(), inputs)

    for got, want in zip(run(CONTESTANTS[who]), run(CONTESTANTS["torch"]), strict=True):
        assert_close(got, want, torch.float32)
    benchmark.group = f"ssd_scan forward and backward {shape}"
    benchmark(run, CONTESTANTS[who])


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("batch", [1, 16])
def bench_update(benchmark, batch, backend):
    args = {k: v[:, 0] if k in ("x", "dt", "B", "C") else v for k, v in problem("mamba2-130m-512").items()}
    args |= {k: args[k].expand(batch, *args[k].shape[1:]) for k in ("x", "dt", "B", "C")}
    states = [torch.zeros(batch, 24, 64, 128) for _ in range(2)]
    benchmark.group = f"ssd_update mamba2-130m batch {batch}"
    with torch.no_grad():
        for _ in range(3):
            got, want = (ssd_update(s, **args, backend=b) for s, b in zip(states, (backend, "reference"), strict=True))
            assert_close(got, want, torch.float32)
        benchmark(ssd_update, states[0], **args, backend=backend)


def bench_matrix_product(benchmark):
    """torch's own float32 product of 2048 x 2048 matrices, 17.2 GFLOP: the rate that the scan's products can reach."""
    a, b = torch.randn(2, 2048, 2048)
    out = torch.empty_like(a)
    benchmark.group = "float32 matrix product 2048^3"
    benchmark(torch.mm, a, b, out=out)
