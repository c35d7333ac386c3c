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
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    step = _torch.step_size(dt, dt_bias, dt_softplus, dt_limit, work)
    if state_indices is None:
        # Autograd keeps the old state for the gradient of the decay, so it must not be the memory written below.
        y, new = _advance(state.to(work, copy=torch.is_grad_enabled()), x, step, A, B, C, D, z)
        state.copy_(new)
        return y
    real = state_indices >= 0
    twin = real.to(torch.int32).argmax()
    rows = torch.where(real, torch.arange(x.shape[0], device=x.device), twin)
    slots = state_indices[rows].clamp(min=0).to(torch.int64)
    # A padding row repeats a real one, so that whatever it writes is what that slot gets anyway; with no real row at
    # all, a step size of 0 leaves slot 0 as it was.  No data-dependent shape, no synchronisation.
    step = step[rows] * real.any()
    y, new = _advance(state[slots].to(work), x[rows], step, A, B[rows], C[rows], D, None if z is None else z[rows])
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
    """Outputs and new states (batch, nheads, headdim, dstate) in the working dtype, for one token or several."""
    if x.dim() == 4:
        q = 64 if x.device.type == "cpu" else 256
        fall = _torch.log_decay(step, A)
        y, new = _torch.scan(x, step, fall, B, C, D, z, state, None, q, reverse=False, want_state=True)
        return y, new
    work, g = step.dtype, B.shape[1]
    u = (x.to(work) * step[..., None]).unflatten(1, (g, -1))[..., None]  # b g r p 1
    kept = state * (step * A.to(work)).exp()[..., None, None]
    new = torch.addcmul(kept.unflatten(1, (g, -1)), u, B.to(work)[:, :, None, None])
    y = (new @ C.to(work)[:, :, None, :, None]).squeeze(-1).flatten(1, 2)
    return _torch.skip_and_gate(y, x.to(work), D, z).to(x.dtype), new.flatten(1, 2)
