"""Backend "native" of token pruning: csrc/cpu/token_pruning_*.cpp."""

import torch
from torch import Tensor

from mmkernels import _native
from mmkernels._gradients import wants_gradient
from mmkernels.ops.token_pruning import _autograd

_native.require()
_scores = torch.ops.mmkernels.cls_attention_scores.default
_scores_fwd = torch.ops.mmkernels.cls_attention_scores_fwd.default
_prune = torch.ops.mmkernels.prune_tokens.default
_prune_fwd = torch.ops.mmkernels.prune_tokens_fwd.default


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


_autograd.register(_scores, _scores_fwd, _prune, _prune_fwd)
