"""A step (or a few) of the state-space recurrence on states kept in slots, in plain PyTorch.

Equation 16 of Dao and Gu, "Transformers are SSMs" (2024).  Several tokens of a row go through the chunked scan.
"""

import torch

from mmkernels.ops.ssd import _torch


def ssd_update(
    *,
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    state_indices: torch.Tensor | None,
) -> torch.Tensor:
    """`mmkernels.ssd_update` on validated arguments."""
    if x.numel() == 0:
        return torch.zeros_like(x)
    _torch.pin_sizes(*state.shape[1:], B.shape[-2])
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    step = _torch.step_size(dt, dt_bias, dt_softplus, dt_limit, work)
    if state_indices is None:
        # Autograd keeps the old state for the gradient of the decay: that must not be the memory written below.
        y, new = _advance(state.to(work, copy=not _torch.in_place()), x, step, A, B, C, D, z)
        if new is not state:
            state.copy_(new)
        return y
    real = state_indices >= 0
    rows = torch.where(real, torch.arange(x.shape[0], device=x.device), real.to(torch.int32).argmax())
    slots = state_indices[rows].clamp(min=0).to(torch.int64)
    # A padding row repeats a real one, so that whatever it writes is what that slot gets anyway; with no real row at
    # all, a step size and inputs of 0 leave slot 0 as it was.  No data-dependent shape, no synchronisation.
    x, step, B = (t[rows].masked_fill(~real.any(), 0.0) for t in (x, step, B))
    old = state.index_select(0, slots).to(work)
    y, new = _advance(old, x, step, A, B, C[rows], D, None if z is None else z[rows])
    if torch.is_grad_enabled():
        new = torch.where(real[:, None, None, None], new, new.detach())
    state.index_copy_(0, slots, new.to(state.dtype))
    return y.masked_fill(~real.view(-1, *[1] * (y.dim() - 1)), 0.0)


def _advance(
    state: torch.Tensor,
    x: torch.Tensor,
    step: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs, and new states (batch, nheads, headdim, dstate) in the working dtype - possibly written over the old."""
    if x.dim() == 4:
        tokens = _torch.Tokens(x, step, _torch.log_decay(step, A), B, C, z)
        y, new = _torch.scan(tokens, D, state, _torch.default_chunk(x.device), reverse=False)
        assert new is not None  # it started from a state
        return y, new
    work, g = step.dtype, B.shape[1]
    keep = (step * A.to(work)).exp()[..., None, None]
    u = (x.to(work) * step[..., None]).unflatten(1, (g, -1))[..., None]  # b g r p 1
    add = B.to(work)[:, :, None, None]  # b g 1 1 n
    if _torch.in_place():
        state.mul_(keep).unflatten(1, (g, -1)).addcmul_(u, add)
    else:
        state = torch.addcmul((state * keep).unflatten(1, (g, -1)), u, add).flatten(1, 2)
    # As a row times a matrix; the same product with C as a column runs 8x slower in a batch.
    y = C.to(work)[:, :, None] @ state.unflatten(1, (g, -1)).flatten(2, 3).transpose(-1, -2)
    return _torch.skip_and_gate(y.view(x.shape), x.to(work), D, z).to(x.dtype), state
