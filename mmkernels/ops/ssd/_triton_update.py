"""Backend "triton" of ssd_update: the launch, and its library op; the kernel is in _triton_kernels_update.py."""

from typing import Any

import torch
from torch import Tensor

from mmkernels import _triton

_triton.require()
from mmkernels import _triton_math  # noqa: E402  (needs triton, which is known to be there only now)
from mmkernels.ops.ssd import _triton_kernels_update as kernels  # noqa: E402


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
    return _update(state, x, dt, A, B, C, D, z, dt_bias, state_indices, dt_softplus, *dt_limit)


def _step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    indices: Tensor | None,
    softplus: bool,
    low: float,
    high: float,
) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    batch, nheads, headdim = x.shape[0], *x.shape[-2:]
    ngroups, dstate = B.shape[-2:]
    config = kernels.config(_triton.architecture(x.device), headdim, dstate)
    _triton.launch(
        kernels.update_kernel,
        (batch * nheads * -(-headdim // config.blocks["ROWS"]),),
        config,
        state,
        x,
        dt,
        A,
        B,
        C,
        D,
        z,
        None if dt_bias is None else dt_bias.contiguous(),
        None if indices is None else indices.contiguous(),
        y,
        x.shape[1] if x.dim() == 4 else 1,
        nheads,
        headdim,
        dstate,
        nheads // max(ngroups, 1),
        state.shape[0],
        float(low),
        float(high),
        *state.stride(),
        *_strides(x, x.dim() - 3),
        *_strides(dt, x.dim() - 3),
        A.stride(0),
        *_strides(B, x.dim() - 3),
        *_strides(C, x.dim() - 3),
        *((0, 0) if D is None else (D.stride(0), D.stride(1) if D.dim() == 2 else 0)),
        *((0, 0, 0, 0) if z is None else _strides(z, x.dim() - 3)),
        SOFTPLUS=softplus,
        ACC=_triton_math.dtype(_triton.accumulator(x.dtype)),
    )
    return y


def _strides(tensor: Tensor, several: int) -> tuple[int, ...]:
    # (batch, token, ...): without a token axis the step from one to the next is never taken.
    return tensor.stride() if several else (tensor.stride(0), 0, *tensor.stride()[1:])


_update = _triton.define(
    "ssd_update",
    "(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "Tensor? state_indices, bool dt_softplus, float dt_low, float dt_high) -> Tensor",
    _step,
)


@torch.library.register_fake(_update)
def ssd_update_fake(state: Tensor, x: Tensor, *_: Any) -> Tensor:
    """Shape and dtype of y: those of x, dense."""
    return x.new_empty(x.shape)
