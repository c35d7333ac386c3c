"""Backend "triton" of token pruning: allocation and launches; the kernels are in _triton_kernels*.py."""

import torch
from torch import Tensor

from mmkernels import _triton
from mmkernels._gradients import wants_gradient
from mmkernels.ops.token_pruning import _autograd

_triton.require()
from mmkernels import _triton_math  # noqa: E402  (needs triton, which is known to be there only now)
from mmkernels.ops.token_pruning import _triton_kernels as kernels  # noqa: E402
from mmkernels.ops.token_pruning import _triton_kernels_select as select_kernels  # noqa: E402


def cls_attention_scores(
    q: Tensor, k: Tensor, lse: Tensor | None, scale: float, num_prefix: int, weight: float
) -> Tensor:
    """See mmkernels.cls_attention_scores."""
    return (_scores_fwd if wants_gradient(q, k, lse) else _scores)(q, k, lse, scale, num_prefix, weight)


def prune_tokens(
    features: Tensor,
    scores: Tensor,
    mask: Tensor | None,
    position_ids: Tensor | None,
    counts: Tensor | None,
    width: int,
    total: int | None,
) -> tuple[Tensor, ...]:
    """See mmkernels.prune_tokens."""
    op = _prune_fwd if wants_gradient(features) else _prune
    return op(features, scores.detach(), mask, position_ids, counts, width, -1 if total is None else total)


def _scores_impl(q: Tensor, k: Tensor, lse: Tensor | None, scale: float, num_prefix: int, weight: float) -> Tensor:
    batch, rows, nheads, headdim = q.shape
    seqlen, nkvheads = k.shape[1:3]
    acc = _triton.accumulator(q.dtype)
    scores = q.new_empty((batch, seqlen - num_prefix), dtype=acc)
    if scores.numel() == 0:
        return scores
    q, k = _dense_last(q), _dense_last(k)
    config = kernels.logits_config(headdim)
    tiles = -(-seqlen // config.blocks["KEYS"])
    logits = q.new_empty((batch, rows, nheads, seqlen), dtype=acc)
    largest = None if lse is not None else logits.new_empty((batch, rows, nheads, tiles))
    sums = None if largest is None else torch.empty_like(largest)
    precision = _triton_math.dtype(acc)
    _triton.launch(
        kernels.logits_kernel,
        (batch * nkvheads * tiles,),
        config,
        q,
        k,
        logits,
        largest,
        sums,
        scale,
        rows,
        seqlen,
        nheads,
        tiles,
        *q.stride()[:3],
        *k.stride()[:3],
        GROUP=nheads // nkvheads,
        HEADDIM=headdim,
        ACC=precision,
    )
    config = kernels.mean_config(tiles)
    _triton.launch(
        kernels.mean_kernel,
        (batch * -(-scores.shape[1] // config.blocks["TOKENS"]),),
        config,
        logits,
        largest,
        sums,
        lse,
        scores,
        weight / (rows * nheads),
        rows,
        seqlen,
        nheads,
        tiles,
        num_prefix,
        *((0, 0, 0) if lse is None else lse.stride()),
        ACC=precision,
    )
    return scores


def _prune_impl(
    features: Tensor,
    scores: Tensor,
    mask: Tensor | None,
    position_ids: Tensor | None,
    counts: Tensor | None,
    width: int,
    total: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, seqlen, dim = features.shape
    features = _dense_last(features)
    if counts is None:
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=scores.device) * width
    else:
        cu_seqlens = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)
    shape = (batch, width) if total < 0 else (total,)
    indices = features.new_empty(shape, dtype=torch.int64)
    positions = indices.new_empty(shape, dtype=torch.int64 if position_ids is None else position_ids.dtype)
    real = indices.new_empty(shape, dtype=torch.bool)
    offsets = torch.empty_like(indices)
    wide = scores.dtype == torch.float64
    config = select_kernels.select_config(seqlen)
    _triton.launch(
        select_kernels.select_kernel,
        (batch,),
        config,
        scores,
        None if mask is None else mask.contiguous().view(torch.uint8),
        None if position_ids is None else position_ids.contiguous(),
        counts,
        cu_seqlens,
        indices,
        positions,
        real.view(torch.uint8),
        offsets,
        seqlen,
        width,
        *scores.stride(),
        *features.stride()[:2],
        PACKED=total >= 0,
        BITS=64 if wide else 32,
        LOW=_SILENT_BITS.get(scores.dtype, 0),
        INT=select_kernels.INTEGER[wide],
        ONCE=seqlen <= config.blocks["BLOCK"],
    )
    tokens = features.new_empty((*shape, dim))
    config = select_kernels.gather_config(dim)
    slots = indices.numel()
    grid = (-(-slots // config.blocks["SLOTS"]) * -(-dim // config.blocks["COLUMNS"]),)
    _triton.launch(select_kernels.gather_kernel, grid, config, features, offsets, tokens, slots, dim)
    return tokens, indices, positions, real, cu_seqlens


# Low bits that are 0 in every number of the dtype written as float32, in whole digits of the selection.
_SILENT_BITS = {torch.bfloat16: 16, torch.float16: 12}


def _dense_last(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


_SCORES = "(Tensor q, Tensor k, Tensor? lse, float scale, int num_prefix, float weight) -> Tensor"
_PRUNE = (
    "(Tensor features, Tensor scores, Tensor? mask, Tensor? position_ids, Tensor? counts, int width, int total)"
    " -> (Tensor tokens, Tensor keep_indices, Tensor position_ids, Tensor mask, Tensor cu_seqlens)"
)
_scores = _triton.define("cls_attention_scores", _SCORES, _scores_impl)
_scores_fwd = _triton.define("cls_attention_scores_fwd", _SCORES, _scores_impl)
_prune = _triton.define("prune_tokens", _PRUNE, _prune_impl)
_prune_fwd = _triton.define("prune_tokens_fwd", _PRUNE, _prune_impl)
_autograd.register(_scores, _scores_fwd, _prune, _prune_fwd)
