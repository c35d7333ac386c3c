"""Backend "native" of attention_column_scores: csrc/cpu/token_pruning_received.cpp."""

import torch
from torch import Tensor

from mmkernels import _native
from mmkernels._gradients import wants_gradient
from mmkernels.ops.token_pruning import _autograd_received

_native.require()
_scores = torch.ops.mmkernels.attention_column_scores.default
_scores_fwd = torch.ops.mmkernels.attention_column_scores_fwd.default
_autograd_received.register(_scores, _scores_fwd)


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
