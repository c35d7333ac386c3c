"""Backend "native" of ssd_scan: csrc/cpu/ssd_fwd.cpp and ssd_bwd.cpp; their gradients are in _autograd.py.

The kernels read x, B, C and z in their own dtype through their strides (a last dimension that is not dense is copied
first), everything else in float32 (float64 for float64 x), converted here so that autograd converts gradients back.
chunk_size is a limit: chunks are never longer than what suits a CPU's caches.
"""

import torch
from torch import Tensor

from mmkernels import _native
from mmkernels._gradients import wants_gradient
from mmkernels.ops.ssd import _autograd

_native.require()
_inference = torch.ops.mmkernels.ssd_scan.default
_fwd = torch.ops.mmkernels.ssd_scan_fwd.default
_bwd = torch.ops.mmkernels.ssd_scan_bwd.default
_autograd.register(_inference, _fwd, _bwd)


def ssd_scan(
    *,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int | None,
    reverse: bool,
    return_final_states: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """See mmkernels.ssd_scan."""
    work = torch.promote_types(x.dtype, torch.float32)
    dt, A = dt.to(work), A.to(work)
    D, dt_bias, initial_states = (None if t is None else t.to(work) for t in (D, dt_bias, initial_states))
    tensors = (x, dt, A, B, C, D, z, dt_bias, initial_states)
    low, high = float(dt_limit[0]), float(dt_limit[1])
    op = _fwd if wants_gradient(*tensors) else _inference
    y, final = op(*tensors, seq_idx, cu_seqlens, dt_softplus, low, high, chunk_size or 0, reverse, return_final_states)
    return (y, final) if return_final_states else y
