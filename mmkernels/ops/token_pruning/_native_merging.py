"""Backend "native" of matching and merging: csrc/cpu/token_pruning_match.cpp and token_pruning_merge.cpp."""

import torch
from torch import Tensor

from mmkernels import _native
from mmkernels._gradients import wants_gradient
from mmkernels.ops.token_pruning import _autograd_merging

_native.require()
_match = torch.ops.mmkernels.bipartite_soft_matching.default
_match_fwd = torch.ops.mmkernels.bipartite_soft_matching_fwd.default
_merge = torch.ops.mmkernels.merge_tokens.default
_merge_fwd = torch.ops.mmkernels.merge_tokens_fwd.default
_merge_bwd = torch.ops.mmkernels.merge_tokens_bwd.default
_autograd_merging.register(_match, _match_fwd, _merge, _merge_fwd, _merge_bwd)


def bipartite_soft_matching(metric: Tensor, r: int, protect: int, order: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See mmkernels.bipartite_soft_matching."""
    if r == 0:  # no similarity, and so no gradient
        metric = metric.detach()
    return (_match_fwd if wants_gradient(metric) else _match)(metric, r, protect, order == "sets")


def merge_tokens(
    x: Tensor, keep_indices: Tensor, assignment: Tensor, source: Tensor, sizes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See mmkernels.merge_tokens."""
    weight = None if sizes is None else sizes.to(torch.promote_types(x.dtype, torch.float32))
    op = _merge_fwd if wants_gradient(x, weight) else _merge
    return op(x, keep_indices.long(), assignment.long(), source.long(), weight)
