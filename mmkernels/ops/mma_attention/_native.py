"""Backend "native" of mma_attention: csrc/cpu/mma_attention_*.cpp; see _autograd.py for gradients.

The kernels read q, k and v in their own dtype through their strides (a last dimension that is not dense is copied
first) and compute in float32 (float64 for float64).
"""

import torch
from torch import Tensor

from mmkernels import _native
from mmkernels._gradients import wants_gradient
from mmkernels.ops.mma_attention import _autograd

_native.require()
_inference = torch.ops.mmkernels.mma_attention.default
_fwd = torch.ops.mmkernels.mma_attention_fwd.default
_autograd.register(_inference, _fwd, torch.ops.mmkernels.mma_attention_bwd.default)


def mma_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_start: Tensor,
    row_end: Tensor,
    rects: Tensor,
    scale: float,
    mass_weights: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See mmkernels.mma_attention."""
    op = _fwd if wants_gradient(q, k, v) else _inference
    weights = None if mass_weights is None else mass_weights.detach()
    out, lse, mass = op(q, k, v, row_start, row_end, rects, weights, scale)
    return out, lse if return_lse else None, mass if mass_weights is not None else None
