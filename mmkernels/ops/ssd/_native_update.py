"""Backend "native" of ssd_update: csrc/cpu/ssd_update.cpp; here its fake kernel and what it reads in which dtype."""

from typing import Any

import torch
from torch import Tensor

from mmkernels import _checks, _native

_native.require()
_update = torch.ops.mmkernels.ssd_update.default
library_op = _update._op  # without Python's frame around it


def ssd_update(
    *,
    state: Tensor,
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
    state_indices: Tensor | None,
) -> Tensor:
    """See mmkernels.ssd_update."""
    low, high = dt_limit
    if (x.dtype == torch.float64) == (state.dtype == torch.float64):
        return _update(state, x, dt, A, B, C, D, dt_bias, dt_softplus, z, state_indices, low, high)
    # Everything in float64, which holds either dtype exactly: an untouched slot is the same after the round trip.
    wide = state.double()
    dtype = x.dtype
    x, B, C, z = x.double(), B.double(), C.double(), None if z is None else z.double()
    y = _update(wide, x, dt, A, B, C, D, dt_bias, dt_softplus, z, state_indices, low, high).to(dtype)
    if wide is not state:
        state.copy_(wide)
    return y


@torch.library.register_fake(_update)
def ssd_update_fake(state: Tensor, x: Tensor, *others: Any) -> Tensor:
    """Shape and dtype of y: those of x, dense."""
    # A direct call with some tensors on "meta" arrives here, unchecked.
    names = ("dt", "A", "B", "C", "D", "dt_bias", "", "z", "state_indices")
    tensors = {name: value for name, value in zip(names, others, strict=False) if name}
    _checks.same_device("ssd_update", x=x, state=state, **tensors)
    return x.new_empty(x.shape)
