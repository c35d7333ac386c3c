"""Backend "upstream" of mma_attention: an installed flash-attn, called once for each kind of run and merged by lse.

Rows whose intervals move alike form a run that flash-attn can express: causal, windowed or full.  Runs of one kind go
in one varlen call; results over disjoint keys merge exactly, and so do their gradients (README.md).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmkernels._dispatch import BackendUnavailable
from mmkernels.errors import BackendError


def _interface() -> tuple[Callable[..., Any], Callable[..., Any]]:
    try:
        from flash_attn.flash_attn_interface import _flash_attn_varlen_backward, _flash_attn_varlen_forward
    except ImportError as error:
        raise BackendUnavailable(
            f"flash-attn >= 2.7 cannot be imported ({error}); install mmkernels[upstream] where CUDA is"
        ) from error
    return _flash_attn_varlen_forward, _flash_attn_varlen_backward


_varlen_forward, _varlen_backward = _interface()


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
) -> tuple[Tensor, Tensor | None, None]:
    """See mmkernels.mma_attention."""
    calls = _calls(row_start, row_end, rects, k.shape[1])
    out, lse = _Merged.apply(q, k, v, calls, scale)
    return out, lse if return_lse else None, None


@dataclass
class _Run:
    """Query rows start..stop-1 of one batch row; the keys of its first row and how they move from row to row."""

    batch: int
    start: int
    stop: int
    first: tuple[int, int]
    last: tuple[int, int]
    step: tuple[int, int] | None = None  # (0, 0) full, (0, 1) causal, (1, 1) window; None: one row so far

    def continued_by(self, row: int, keys: tuple[int, int]) -> bool:
        """Take the keys of the next row in if they move as those of the run do."""
        step = (keys[0] - self.last[0], keys[1] - self.last[1])
        if row != self.stop or step not in (((0, 0), (0, 1), (1, 1)) if self.step is None else (self.step,)):
            return False
        self.stop, self.last, self.step = row + 1, keys, step
        return True

    def overlaps(self, other: "_Run") -> bool:
        """Whether they share query rows."""
        return self.batch == other.batch and self.start < other.stop and other.start < self.stop


@dataclass
class _Call:
    """One varlen call: runs of one kind whose query rows are disjoint."""

    causal: bool
    window: int  # keys to the left of a row's last one, -1 for all
    runs: list[_Run] = field(default_factory=list)

    def arguments(self, qlen: int, klen: int, device: torch.device) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Flat query rows, flat keys, and what flash-attn wants to know about them."""
        rows = torch.cat([torch.arange(r.start, r.stop) + r.batch * qlen for r in self.runs])
        keys = torch.cat([torch.arange(r.first[0], r.last[1]) + r.batch * klen for r in self.runs])
        q_sizes = torch.tensor([0, *(r.stop - r.start for r in self.runs)])
        k_sizes = torch.tensor([0, *(r.last[1] - r.first[0] for r in self.runs)])
        options = {
            "cu_seqlens_q": q_sizes.cumsum(0).int().to(device),
            "cu_seqlens_k": k_sizes.cumsum(0).int().to(device),
            "max_seqlen_q": int(q_sizes.max()),
            "max_seqlen_k": int(k_sizes.max()),
            "causal": self.causal,
            "window_size_left": self.window,
            "window_size_right": 0 if self.causal else -1,
        }
        return rows.to(device), keys.to(device), options


def _calls(row_start: Tensor, row_end: Tensor, rects: Tensor, klen: int) -> list[_Call]:
    """Cut a mask into runs, and collect runs of one kind with disjoint rows; on the host, O(rows)."""
    calls: list[_Call] = []
    for b, (starts, ends) in enumerate(zip(row_start.tolist(), row_end.tolist(), strict=True)):
        own = [rect[1:] for rect in rects.tolist() if rect[0] == b]
        for run in _runs(b, starts, ends, own, klen):
            causal = run.step in ((0, 1), (1, 1))
            window = run.first[1] - run.first[0] - 1 if run.step == (1, 1) else -1
            fitting = (c for c in calls if (c.causal, c.window) == (causal, window))
            call = next((c for c in fitting if not any(run.overlaps(r) for r in c.runs)), None)
            if call is None:
                call = _Call(causal, window)
                calls.append(call)
            call.runs.append(run)
    return calls


def _runs(b: int, starts: list[int], ends: list[int], rects: list[list[int]], klen: int) -> list[_Run]:
    done: list[_Run] = []
    growing: list[_Run] = []
    for row, interval in enumerate(zip(starts, ends, strict=True)):
        pieces = [interval, *((k0, k1) for q0, q1, k0, k1 in rects if q0 <= row < q1)]
        next_growing = []
        for keys in _disjoint(pieces, klen):
            run = next((r for r in growing if r.continued_by(row, keys)), None)
            if run is None:
                run = _Run(b, row, row + 1, keys, keys)
                done.append(run)
            next_growing.append(run)
        growing = next_growing
    return done


def _disjoint(pieces: list[tuple[int, int]], klen: int) -> Iterator[tuple[int, int]]:
    """The union of intervals as disjoint ones; those that only touch stay apart, since causal runs then stay whole."""
    begin, end = 0, 0
    for a, z in sorted((max(a, 0), min(z, klen)) for a, z in pieces):
        if a >= z:
            continue
        if a >= end:
            if begin < end:
                yield begin, end
            begin, end = a, z
        end = max(end, z)
    if begin < end:
        yield begin, end


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, calls: list[_Call], scale: float) -> tuple[Tensor, Tensor]:
        batch, qlen, nheads, _ = q.shape
        rows, keys, values = (t.flatten(0, 1) for t in (q, k, v))
        out = torch.zeros(rows.shape, dtype=torch.float32, device=q.device)
        lse = torch.full((batch * qlen, nheads), float("-inf"), dtype=torch.float32, device=q.device)
        for call in calls:
            at, of, options = call.arguments(qlen, k.shape[1], q.device)
            part, part_lse, *_ = _varlen_forward(
                rows[at], keys[of], values[of], dropout_p=0.0, softmax_scale=scale, **options
            )
            before, added = lse[at], part_lse.t()
            lse[at] = total = torch.logaddexp(before, added)
            out[at] = out[at] * (before - total).exp()[..., None] + part.float() * (added - total).exp()[..., None]
        merged = out.to(q.dtype).view_as(q)
        ctx.save_for_backward(q, k, v, merged, lse)
        ctx.calls, ctx.scale = calls, scale
        ctx.set_materialize_grads(False)
        return merged, lse.view(batch, qlen, nheads).transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dout, dlse = grads
        if dlse is not None:
            raise BackendError(
                "mma_attention: backend 'upstream' has no gradient through lse: flash-attn's backward takes none. "
                "Leave lse out of the loss, or use another backend."
            )
        if dout is None:
            return (None,) * 5
        q, k, v, out, lse = ctx.saved_tensors
        rows, keys, values, merged, incoming = (t.flatten(0, 1) for t in (q, k, v, out, dout))
        dq, dk, dv = (torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in (rows, keys, values))
        for call in ctx.calls:
            at, of, options = call.arguments(q.shape[1], k.shape[1], q.device)
            part = [torch.empty_like(t) for t in (rows[at], keys[of], values[of])]
            # The merged out and lse, not the part's own: with them each part's gradient is its exact share.
            _varlen_backward(
                incoming[at].contiguous(),
                rows[at],
                keys[of],
                values[of],
                merged[at],
                lse[at].t().contiguous(),
                *part,
                dropout_p=0.0,
                softmax_scale=ctx.scale,
                softcap=0.0,
                alibi_slopes=None,
                deterministic=True,
                **options,
            )
            for total, share, index in zip((dq, dk, dv), part, (at, of, of), strict=True):
                total.index_add_(0, index, share.float())
        return (*(g.to(t.dtype).view_as(t) for g, t in zip((dq, dk, dv), (q, k, v), strict=True)), None, None)
