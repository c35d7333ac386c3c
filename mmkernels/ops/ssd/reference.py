"""The state-space recurrence of Mamba-2, one token after the other: the definition every backend is held to.

Equation 16 of Dao and Gu, "Transformers are SSMs" (2024), with the Euler input weight.  Slow on purpose: no chunking,
no cumulative sums, nothing to get wrong.  Works in float64 when x is float64, else in float32.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F


def step_size(
    dt: torch.Tensor, dt_bias: torch.Tensor | None, dt_softplus: bool, dt_limit: tuple[float, float], work: torch.dtype
) -> torch.Tensor:
    """clamp(softplus(dt + dt_bias), *dt_limit), softplus being the identity above 20."""
    dt = dt.to(work)
    if dt_bias is not None:
        dt = dt + dt_bias.to(work)
    if dt_softplus:
        dt = torch.where(dt > 20, dt, torch.log1p(torch.exp(dt.clamp(max=20))))
    return dt.clamp(*dt_limit)


def token_step(
    state: torch.Tensor, x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token of every row: the new state (batch, nheads, headdim, dstate) and S C (batch, nheads, headdim)."""
    heads_per_group = x.shape[1] // B.shape[1]
    B, C = B.repeat_interleave(heads_per_group, dim=1), C.repeat_interleave(heads_per_group, dim=1)
    decay = torch.exp(A * dt)
    state = torch.einsum("bh,bhpn->bhpn", decay, state) + torch.einsum("bh,bhp,bhn->bhpn", dt, x, B)
    return state, torch.einsum("bhpn,bhn->bhp", state, C)


def skip_and_gate(y: torch.Tensor, x: torch.Tensor, D: torch.Tensor | None, z: torch.Tensor | None) -> torch.Tensor:
    """(y + D x) silu(z), for y and x of shape (..., nheads, headdim)."""
    if D is not None:
        y = y + (D if D.dim() == 2 else D[:, None]).to(y.dtype) * x
    return y if z is None else y * F.silu(z.to(y.dtype))


def ssd_scan(
    *,
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
    initial_states: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    chunk_size: int | None,
    reverse: bool,
    return_final_states: bool,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`mmkernels.ssd_scan`, token by token; chunk_size has no meaning here and is ignored."""
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    step = step_size(dt, dt_bias, dt_softplus, dt_limit, work)
    xw, Aw, Bw, Cw = x.to(work), A.to(work), B.to(work), C.to(work)
    if cu_seqlens is None:
        state = xw.new_zeros(x.shape[0], *x.shape[2:], B.shape[-1]) if initial_states is None else initial_states
        y, final = _scan(xw, step, Aw, Bw, Cw, state.to(work), seq_idx, reverse)
    else:
        ys, finals = [], []
        for i, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
            one = slice(start, end)
            state = xw.new_zeros(1, *x.shape[2:], B.shape[-1]) if initial_states is None else initial_states[i : i + 1]
            part = (xw[:, one], step[:, one], Aw, Bw[:, one], Cw[:, one])
            out, final = _scan(*part, state.to(work), None, reverse)
            ys.append(out)
            finals.append(final)
        y = torch.cat(ys, dim=1) if ys else torch.zeros_like(xw)
        final = torch.cat(finals) if finals else xw.new_zeros(0, *x.shape[2:], B.shape[-1])
    y = skip_and_gate(y, xw, D, z)
    if seq_idx is not None:
        y = torch.where((seq_idx >= 0)[:, :, None, None], y, 0.0)
    y = y.to(x.dtype)
    return (y, final) if return_final_states else y


def _scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    state: torch.Tensor,
    seq_idx: torch.Tensor | None,
    reverse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """S C for every token, and the last state; a change of id, or a negative one, empties the state first."""
    length = x.shape[1]
    ys = list(x.unbind(1))
    before: torch.Tensor | int = 0
    for t in reversed(range(length)) if reverse else range(length):
        if seq_idx is not None:
            state = torch.where((seq_idx[:, t] == before)[:, None, None, None], state, 0.0)
        new, ys[t] = token_step(state, x[:, t], dt[:, t], A, B[:, t], C[:, t])
        if seq_idx is not None:
            real = (seq_idx[:, t] >= 0)[:, None, None, None]
            state, before = torch.where(real, new, 0.0), seq_idx[:, t]
        else:
            state = new
    return (torch.stack(ys, dim=1) if ys else torch.zeros_like(x)), state


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
    """`mmkernels.ssd_update`, row by row and token by token; padding rows are skipped."""
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    single = x.dim() == 3
    if single:
        x, dt, B, C = x[:, None], dt[:, None], B[:, None], C[:, None]
        z = None if z is None else z[:, None]
    step = step_size(dt, dt_bias, dt_softplus, dt_limit, work)
    slots = list(range(x.shape[0])) if state_indices is None else state_indices.tolist()
    ys = []
    for row, slot in enumerate(slots):
        if slot < 0:
            ys.append(torch.zeros_like(x[row], dtype=work))
            continue
        one = slice(row, row + 1)
        xw, Bw, Cw = x[one].to(work), B[one].to(work), C[one].to(work)
        y, new = _scan(
            xw, step[one], A.to(work), Bw, Cw, state[slot : slot + 1].to(work, copy=True), None, reverse=False
        )
        state[slot : slot + 1] = new.to(state.dtype)
        ys.append(skip_and_gate(y, xw, D, None if z is None else z[one])[0])
    y = torch.stack(ys) if ys else torch.zeros_like(x, dtype=work)
    return (y[:, 0] if single else y).to(x.dtype)
