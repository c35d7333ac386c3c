"""mma_attention against what else runs its masks on a CPU: SDPA with a dense mask, flex_attention, eager softmax.

Shapes: AKI's prompt (1024 tokens: image 576, question 448; Phi-3.5's 32 heads of 96 and Llama's of 128), a
high-resolution prompt (4096 tokens, 2880 of images), the same with bidirectional images, and decoding over a KV cache.
SDPA without a mask and with is_causal are no peers (they compute another function) but say what the machine can do.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

from mmkernels import mma_attention, mma_mask

# (qlen, image, headdim): 32 heads, the image at 0, the question behind it.
PROMPTS = {"L1024-D96": (1024, 576, 96), "L1024-D128": (1024, 576, 128), "L4096-D128": (4096, 2880, 128)}
CACHES = [8192, 32768, 103 * 1024]
HEADS = 32
DTYPES = [torch.float32, torch.bfloat16]
# Sums of as many terms in another order; bfloat16 rounds the output (and, inside SDPA, P) to 8 bits.
TOLERANCE = {torch.float32: {"rtol": 1e-4, "atol": 1e-5}, torch.bfloat16: {"rtol": 4e-2, "atol": 2e-2}}


def prompt_mask(shape, kind):
    length, image, _ = PROMPTS[shape]
    question = {"L4096-D128": 64}.get(shape, length - image)
    span = (0, 0, image, image, image + question) if kind == "AKI" else (0, 0, image, 0, length)
    return mma_mask(length, spans=[span])


def problem(qlen, klen, nheads, nkvheads, headdim, dtype, grad=False):
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, qlen, nheads, headdim), (1, klen, nkvheads, headdim), (1, klen, nkvheads, headdim))
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_(grad) for s in shapes]


def heads_first(function):
    """A peer in the layout torch wants; the views cost nothing and the peer reads them as its models pass them."""

    def run(q, k, v, mask):
        return function(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask).transpose(1, 2)

    return run


def sdpa_dense(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[0], enable_gqa=q.shape[1] != k.shape[1])


def sdpa_causal(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def sdpa_unmasked(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def eager(q, k, v, mask):
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    return scores.masked_fill(~mask[0], float("-inf")).float().softmax(-1).to(q.dtype) @ v


@functools.cache
def compiled_flex():
    return torch.compile(flex_attention, dynamic=False)


def flex(q, k, v, mask):
    return compiled_flex()(q, k, v, block_mask=mask[1])


def ours(q, k, v, mask):
    return mma_attention(q, k, v, mask[2])


WHO = {
    "mmkernels": ours,
    "sdpa-dense-mask": heads_first(sdpa_dense),
    "flex": heads_first(flex),
    "eager": heads_first(eager),
    "sdpa-is-causal (another function)": heads_first(sdpa_causal),
    "sdpa-no-mask (another function)": heads_first(sdpa_unmasked),
}
EXACT = [who for who in WHO if "another" not in who]


def forms(mask):
    """What each contender is given, made outside the timed region: dense bool, BlockMask, MMAMask."""
    return mask.dense()[:, None], mask.block_mask(128), mask


def agree(who, tensors, mask, dtype):
    if who in EXACT:
        torch.testing.assert_close(WHO[who](*tensors, mask), ours(*tensors, mask), **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize("kind", ["AKI", "bidirectional-image"])
@pytest.mark.parametrize("shape", PROMPTS)
def bench_forward(benchmark, shape, kind, who, dtype):
    length, _, headdim = PROMPTS[shape]
    mask = forms(prompt_mask(shape, kind))
    tensors = problem(length, length, HEADS, HEADS, headdim, dtype)
    benchmark.group = f"mma_attention forward {shape} {kind} (live {mask[2].live_share():.2f}) {dtype}"
    with torch.no_grad():
        agree(who, tensors, mask, dtype)
        benchmark(WHO[who], *tensors, mask)


def forward_backward(function, tensors, mask):
    return torch.autograd.grad(function(*tensors, mask).sum(), tensors)


@pytest.mark.parametrize("who", [who for who in WHO if who != "flex"])  # flex_attention has no backward on a CPU
@pytest.mark.parametrize("shape", PROMPTS)
def bench_forward_backward(benchmark, shape, who):
    length, _, headdim = PROMPTS[shape]
    mask = forms(prompt_mask(shape, "AKI"))
    tensors = problem(length, length, HEADS, HEADS, headdim, torch.float32, grad=True)
    benchmark.group = f"mma_attention forward and backward {shape} AKI"
    if who in EXACT:
        pairs = zip(forward_backward(WHO[who], tensors, mask), forward_backward(ours, tensors, mask), strict=True)
        for got, want in pairs:
            torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * want.abs().max().item())
    benchmark(forward_backward, WHO[who], tensors, mask)


@pytest.mark.parametrize("who", ["mmkernels", "sdpa-no-mask (another function)"])
@pytest.mark.parametrize("klen", CACHES)
def bench_decode(benchmark, klen, who):
    # One new token sees the whole cache: here SDPA without a mask does compute the same function.
    tensors = problem(1, klen, 16, 8, 128, torch.bfloat16)
    mask = (None, None, mma_mask(1, klen))
    benchmark.group = f"mma_attention decode, 16 heads on 8, {klen} cached tokens, bfloat16"
    with torch.no_grad():
        torch.testing.assert_close(WHO[who](*tensors, mask), ours(*tensors, mask), **TOLERANCE[torch.bfloat16])
        benchmark(WHO[who], *tensors, mask)
