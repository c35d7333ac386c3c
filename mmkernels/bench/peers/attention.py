"""Attention under modality-mutual masks: its problems, and what torch offers for them.

AKI's prompt (an image, then the question it may read), bidirectional images, and one token over a long cache.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkernels
from mmkernels.bench.peers.ours import require_ready
from mmkernels.bench.problems import Prepared, Problem, Unavailable
from mmkernels.bench.shapes import Cell
from mmkernels.ops.mma_attention.mask import MMAMask, mma_mask


def attention_mask(cell: Cell) -> MMAMask:
    """The mask of a cell: the image comes first, the question behind it."""
    s, length = cell.sizes, cell.seqlen
    if s.mask == "cache":
        return MMAMask.causal(1, length)
    image = round(s.image * length)
    question = min(round(s.question * length), length - image)
    keys = (0, length) if s.mask == "bidirectional" else (image, image + question)
    return mma_mask(length, spans=[(0, 0, image, *keys)])


def attention_problem(cell: Cell) -> Problem:
    """q, k, v (one query row over a cache) and the mask."""
    s, generator = cell.sizes, torch.Generator().manual_seed(0)
    rows = 1 if s.mask == "cache" else cell.seqlen

    def normal(*size: int) -> Tensor:
        made = torch.randn(*size, generator=generator).to(getattr(torch, cell.dtype))
        return made.requires_grad_() if cell.backward else made

    q = normal(s.batch, rows, s.nheads, s.headdim)
    k, v = (normal(s.batch, cell.seqlen, s.ngroups, s.headdim) for _ in range(2))
    return Problem(cell, {"q": q, "k": k, "v": v, "mask": attention_mask(cell)})


def attention_truth(args: dict[str, Any]) -> Tensor:
    """The formula in float64."""
    return mmkernels.mma_attention(**args, backend="reference")  # type: ignore[return-value]


def attention_flops(cell: Cell) -> float:
    """Useful floating-point operations of a forward: 4 headdim for every kept pair and head."""
    s, mask = cell.sizes, attention_mask(cell)
    return 4.0 * s.headdim * s.nheads * s.batch * mask.live_share() * mask.qlen * mask.klen


def cache_bytes(cell: Cell) -> float:
    """Bytes one decoded token must read: every cached key and value."""
    s = cell.sizes
    return 2.0 * s.batch * cell.seqlen * s.ngroups * s.headdim * {"float32": 4, "bfloat16": 2}[cell.dtype]


def ours(problem: Problem, *, backend: str = "native") -> Prepared:
    """`mmkernels.mma_attention`."""
    require_ready(backend, "mma_attention")
    args = problem.args
    return Prepared(lambda: mmkernels.mma_attention(**args, backend=backend))


def _heads_first(problem: Problem) -> tuple[Tensor, ...]:
    # Views, as a model's projections give them; heads after tokens is what torch's functions are given there as well.
    return tuple(problem.args[name].transpose(1, 2) for name in ("q", "k", "v"))


def _tokens_first(out: Tensor) -> Tensor:
    return out.transpose(1, 2)


def sdpa_dense(problem: Problem) -> Prepared:
    """`scaled_dot_product_attention` with the dense bool mask, made beforehand."""
    q, k, v = _heads_first(problem)
    dense = problem.args["mask"].dense()[:, None]
    return Prepared(lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=dense), _tokens_first)


def sdpa_decode(problem: Problem, *, packed: bool) -> Prepared:
    """SDPA of one row without a mask: heads grouped by torch, or packed into rows of their key-value head."""
    q, k, v = _heads_first(problem)
    if not packed:
        return Prepared(lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), _tokens_first)
    batch, nheads, _, headdim = q.shape
    rows = q.reshape(batch, k.shape[1], nheads // k.shape[1], headdim)
    return Prepared(
        lambda: F.scaled_dot_product_attention(rows, k, v), lambda out: out.reshape(batch, 1, nheads, headdim)
    )


def two_calls(problem: Problem) -> Prepared:
    """Causal and image x question as two unmasked flash calls, merged by lse: what a careful user can write."""
    if problem.cell.sizes.mask != "aki":
        raise Unavailable("written for a causal mask with a rectangle")
    q, k, v = _heads_first(problem)
    _, q0, q1, k0, k1 = problem.args["mask"].rects[0].tolist()
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def run() -> Tensor:
        out, lse = flash(q, k, v, is_causal=True)
        part, part_lse = flash(q[:, :, q0:q1], k[:, :, k0:k1], v[:, :, k0:k1])
        before = lse[:, :, q0:q1]
        share = torch.sigmoid(part_lse - before)[..., None].to(out.dtype)
        out[:, :, q0:q1].lerp_(part, share)
        return out

    return Prepared(run, _tokens_first)


def eager(problem: Problem) -> Prepared:
    """Softmax of masked scores, in float32, as transformers' eager attention computes it."""
    q, k, v = _heads_first(problem)
    s = problem.cell.sizes
    bias = torch.zeros(1, 1, q.shape[2], k.shape[2], dtype=q.dtype)
    bias.masked_fill_(~problem.args["mask"].dense()[:, None], torch.finfo(q.dtype).min)

    def run() -> Tensor:
        scores = q @ k.transpose(-1, -2) * s.headdim**-0.5 + bias
        return F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v

    return Prepared(run, _tokens_first)


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex(problem: Problem) -> Prepared:
    """`flex_attention`, compiled, with a BlockMask."""
    q, k, v = _heads_first(problem)
    blocks = problem.args["mask"].block_mask()
    return Prepared(lambda: _compiled_flex()(q, k, v, block_mask=blocks), _tokens_first)
