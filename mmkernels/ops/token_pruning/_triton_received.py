"""Backend "triton" of attention_column_scores: allocation and launches, for _triton_kernels_received.py."""

import torch
from torch import Tensor

from mmkernels import _triton
from mmkernels._gradients import wants_gradient
from mmkernels.ops.token_pruning import _autograd_received

_triton.require()
from mmkernels import _triton_math  # noqa: E402  (needs triton, which is known to be there only now)
from mmkernels.ops.token_pruning import _triton_kernels_received as kernels  # noqa: E402


def attention_column_scores(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    scale: float,
    num_prefix: int,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    causal: bool,
) -> Tensor:
    """See mmkernels.attention_column_scores."""
    op = _scores_fwd if wants_gradient(q, k, lse) else _scores
    return op(q, k, lse, scale, num_prefix, query_mask, key_mask, causal)


def _impl(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    scale: float,
    num_prefix: int,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    causal: bool,
) -> Tensor:
    batch, rows, nheads, headdim = q.shape
    seqlen = k.shape[1]
    acc = _triton.accumulator(q.dtype)
    scores = q.new_empty((batch, seqlen - num_prefix), dtype=acc)
    if scores.numel() == 0:
        return scores
    q, k = (t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous() for t in (q, k))
    masks = [None if mask is None else mask.contiguous().view(torch.uint8) for mask in (query_mask, key_mask)]
    config = kernels.tiles_config(rows, seqlen, headdim, q.element_size())
    sizes = (rows, seqlen, nheads, *q.stride()[:3], *k.stride()[:3])
    constants = {
        "GROUP": nheads // k.shape[2],
        "CAUSAL": causal,
        "SCALE": scale,
        "HEADDIM": headdim,
        "ACC": _triton_math.dtype(acc),
    }
    if lse is None:
        lse = q.new_empty((batch, nheads, rows), dtype=acc)
        grid = (batch * nheads * -(-rows // config.blocks["ROWS"]),)
        _triton.launch(kernels.lse_kernel, grid, config, q, k, *masks, lse, *sizes, **constants)
    sums = q.new_empty((batch, nheads, seqlen), dtype=acc)
    grid = (batch * nheads * -(-seqlen // config.blocks["KEYS"]),)
    _triton.launch(kernels.columns_kernel, grid, config, q, k, *masks, lse.contiguous(), sums, *sizes, **constants)
    config = kernels.heads_config()
    grid = (batch * -(-scores.shape[1] // config.blocks["TOKENS"]),)
    counts = None if query_mask is None else query_mask.sum(-1)
    _triton.launch(
        kernels.heads_kernel, grid, config, sums, counts, scores, rows, seqlen, nheads, num_prefix, ACC=constants["ACC"]
    )
    return scores


_SCORES = (
    "(Tensor q, Tensor k, Tensor? lse, float scale, int num_prefix, Tensor? query_mask, Tensor? key_mask, bool causal)"
    " -> Tensor"
)
_scores = _triton.define("attention_column_scores", _SCORES, _impl)
_scores_fwd = _triton.define("attention_column_scores_fwd", _SCORES, _impl)
_autograd_received.register(_scores, _scores_fwd)
