"""Backend "torch" of causal_conv1d: a sum of `width` shifted multiply-adds, channels last, no im2col.

Eager calls run block by block so that a block's float32 intermediates stay in the cache (see README.md); traced calls
and double backward use the same sum as one expression.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements of a float32 block: 1 MiB sits in a second-level cache and amortises the ~5 us of an eager op.
_BLOCK = 1 << 18


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    return_final_states: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """See mmkernels.causal_conv1d."""
    taps = _taps(weight, x.dtype)
    bias = None if bias is None else bias.to(taps.dtype)
    silu = activation == "silu"
    runs, keep = _runs(x, seq_idx, cu_seqlens, reverse)
    if torch.compiler.is_compiling():
        y = _whole(x, taps, bias, runs, keep, silu, reverse)
    else:
        y = _Convolution.apply(x, taps, bias, runs, keep, silu, reverse)
    if initial_states is not None and weight.shape[1] > 1 and x.shape[1] > 0:
        if cu_seqlens is None:
            y = _continue_batch(y, x, taps, bias, silu, initial_states, runs, reverse)
        else:
            y = _continue_packed(y, x, taps, bias, silu, initial_states, cu_seqlens, runs, reverse)
    if not return_final_states:
        return y
    history = weight.shape[1] - 1
    if cu_seqlens is None:
        return y, _final_batch(x, initial_states, runs, keep, reverse, history)
    return y, _final_packed(x, initial_states, cu_seqlens, reverse, history)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    state_indices: Tensor | None,
) -> Tensor:
    """See mmkernels.causal_conv1d_update."""
    acc = torch.promote_types(x.dtype, torch.float32)
    new = x.unsqueeze(2) if x.dim() == 2 else x.transpose(1, 2)
    if state_indices is None or x.shape[0] == 0:
        valid, slots, before = None, None, conv_state
    else:
        # A padding row stands in for the first valid row: it writes the same values to the same slot, so that nothing
        # has to be counted (no device sync, no data-dependent shape) and nobody's state changes.
        valid = state_indices >= 0
        rows = torch.where(valid, torch.arange(valid.shape[0], device=x.device), valid.int().argmax())
        new = new[rows]
        slots = state_indices.long().clamp(min=0)[rows]
        before = conv_state[slots]
    width = weight.shape[1]
    inputs = torch.cat([before.to(x.dtype), new], dim=2)
    windows = inputs[:, :, before.shape[2] - width + 1 :].to(acc).unfold(2, width, 1)
    y = (windows * weight.to(acc).unsqueeze(1)).sum(3)
    y = y if bias is None else y + bias.to(acc).unsqueeze(1)
    y = (F.silu(y) if activation == "silu" else y).to(x.dtype)
    after = inputs if conv_state.dtype == x.dtype else torch.cat([before, new.to(conv_state.dtype)], dim=2)
    after = after[:, :, new.shape[2] :]
    if slots is None or valid is None:
        conv_state.copy_(after)
    else:
        conv_state.index_copy_(0, slots, torch.where(valid[rows][:, None, None], after, before))
        y = torch.where(valid[:, None, None], y, 0)
    return y.squeeze(2) if x.dim() == 2 else y.transpose(1, 2)


def _taps(weight: Tensor, dtype: torch.dtype) -> Tensor:
    # (width, dim): taps[s] multiplies the token s steps back.
    return weight.to(torch.promote_types(dtype, torch.float32)).t().flip(0).contiguous()


def _runs(
    x: Tensor, seq_idx: Tensor | None, cu_seqlens: Tensor | None, reverse: bool
) -> tuple[Tensor | None, Tensor | None]:
    # Number of the unbroken run each token is in (0 = it continues the initial states), and whether it is no padding.
    if cu_seqlens is not None:
        tokens = torch.arange(x.shape[1], device=x.device, dtype=cu_seqlens.dtype)
        return torch.bucketize(tokens, cu_seqlens[1:], right=True)[None], None
    if seq_idx is None:
        return None, None
    ids = seq_idx.flip(1) if reverse else seq_idx
    runs = (ids != F.pad(ids[:, :-1], (1, 0))[:, : ids.shape[1]]).cumsum(1)
    return runs.flip(1) if reverse else runs, seq_idx >= 0


def _whole(
    x: Tensor, taps: Tensor, bias: Tensor | None, runs: Tensor | None, keep: Tensor | None, silu: bool, reverse: bool
) -> Tensor:
    # The convolution from zero states as one differentiable expression.
    rows = x.to(taps.dtype)
    if keep is not None:  # padding may hold anything: not even 0 * NaN may reach the gradient of the taps
        rows = torch.where(keep[..., None], rows, 0)
    y = rows * taps[0] if bias is None else rows * taps[0] + bias
    for s in range(1, min(taps.shape[0], x.shape[1])):
        tap = rows[:, s:] if reverse else rows[:, :-s]
        if runs is not None:
            tap = torch.where((runs[:, s:] == runs[:, :-s])[..., None], tap, 0)
        y = y + F.pad(tap, (0, 0, 0, s) if reverse else (0, 0, s, 0)) * taps[s]
    y = F.silu(y) if silu else y
    return (y if keep is None else torch.where(keep[..., None], y, 0)).to(x.dtype)


class _Convolution(torch.autograd.Function):
    """The convolution from zero states, block by block, forward and backward; twice differentiable through _whole."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        taps: Tensor,
        bias: Tensor | None,
        runs: Tensor | None,
        keep: Tensor | None,
        silu: bool,
        reverse: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, taps, bias, runs, keep)
        ctx.silu, ctx.reverse = silu, reverse
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for start, stop in _blocks(x):
            out = _Block(x, taps, runs, keep, reverse, start, stop).convolve(bias)
            out = F.silu(out, inplace=True) if silu else out
            y[:, start:stop] = out if keep is None else out.masked_fill_(~keep[:, start:stop, None], 0)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, taps, bias, runs, keep = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            inputs = [t for t, want in zip((x, taps, bias), wanted, strict=True) if want]
            y = _whole(x, taps, bias, runs, keep, ctx.silu, ctx.reverse)
            found = iter(torch.autograd.grad(y, inputs, grad, create_graph=True))
            return (*(next(found) if want else None for want in wanted), None, None, None, None)

        dx = torch.empty(x.shape, dtype=taps.dtype, device=x.device) if wanted[0] else None
        dtaps = torch.zeros_like(taps) if wanted[1] else None
        dbias = torch.zeros_like(bias) if wanted[2] else None
        # A block adds to rows of blocks before it in scan order, so those must have been written.
        for start, stop in reversed(_blocks(x)) if ctx.reverse else _blocks(x):
            block = _Block(x, taps, runs, keep, ctx.reverse, start, stop)
            dout = grad[:, start:stop].to(taps.dtype)
            if keep is not None:
                dout = dout.masked_fill(~keep[:, start:stop, None], 0)
            if ctx.silu:
                dout = torch.ops.aten.silu_backward(dout, block.convolve(bias))
            block.add_gradients(dout, dx, dtaps)
            if dbias is not None:
                dbias += dout.sum((0, 1))
        return None if dx is None else dx.to(x.dtype), dtaps, dbias, None, None, None, None


def _blocks(x: Tensor) -> list[tuple[int, int]]:
    batch, seqlen, dim = x.shape
    step = max(1, _BLOCK // max(1, batch * dim))
    return [(start, min(start + step, seqlen)) for start in range(0, seqlen, step)]


class _Block:
    """Tokens start..stop and the tokens they read, in the accumulation dtype, padding zeroed."""

    def __init__(
        self,
        x: Tensor,
        taps: Tensor,
        runs: Tensor | None,
        keep: Tensor | None,
        reverse: bool,
        start: int,
        stop: int,
    ):
        self.taps, self.runs, self.reverse, self.start, self.stop = taps, runs, reverse, start, stop
        self.seqlen, reach = x.shape[1], taps.shape[0] - 1
        self.first = start if reverse else max(start - reach, 0)
        last = min(stop + reach, self.seqlen) if reverse else stop
        self.rows = x[:, self.first : last].to(taps.dtype)
        if keep is not None:
            self.rows = torch.where(keep[:, self.first : last, None], self.rows, 0)

    def tap(self, s: int) -> tuple[slice, slice, Tensor | None]:
        """Tokens with a tap s steps back, the tokens it reads, and where both are in one run."""
        if self.reverse:
            to = slice(self.start, max(self.start, min(self.stop, self.seqlen - s)))
            source = slice(to.start + s, to.stop + s)
        else:
            to = slice(min(max(self.start, s), self.stop), self.stop)
            source = slice(to.start - s, to.stop - s)
        same = None
        if s > 0 and self.runs is not None and to.start < to.stop:
            same = (self.runs[:, to] == self.runs[:, source])[..., None]
        return to, source, same

    def convolve(self, bias: Tensor | None) -> Tensor:
        """Bias plus the sum over taps, (batch, stop - start, dim)."""
        here = self.rows[:, self.start - self.first : self.stop - self.first]
        out = here * self.taps[0] if bias is None else torch.addcmul(bias, here, self.taps[0])
        for s in range(1, self.taps.shape[0]):
            to, source, same = self.tap(s)
            if to.start < to.stop:
                read = self._inside(self.rows, source)
                read = read if same is None else torch.where(same, read, 0)
                out[:, to.start - self.start : to.stop - self.start].addcmul_(read, self.taps[s])
        return out

    def add_gradients(self, dout: Tensor, dx: Tensor | None, dtaps: Tensor | None) -> None:
        """Add the block's share of the gradients of x and of the taps, given that of the sums."""
        for s in range(self.taps.shape[0]):
            to, source, same = self.tap(s)
            if to.start >= to.stop:
                continue
            part = dout[:, to.start - self.start : to.stop - self.start]
            part = part if same is None else torch.where(same, part, 0)
            if dx is not None and s == 0:
                torch.mul(part, self.taps[0], out=dx[:, source])
            elif dx is not None:
                dx[:, source].addcmul_(part, self.taps[s])
            if dtaps is not None:
                # Rows of other runs are masked too: a NaN there must not reach the weights through 0 * NaN.
                read = self._inside(self.rows, source)
                dtaps[s] += (part * (read if same is None else torch.where(same, read, 0))).sum((0, 1))

    def _inside(self, rows: Tensor, tokens: slice) -> Tensor:
        return rows[:, tokens.start - self.first : tokens.stop - self.first]


def _window_sum(inputs: Tensor, taps: Tensor, bias: Tensor | None, count: int, silu: bool) -> Tensor:
    # Outputs of the last `count` rows of inputs (rows, history + count or more, dim).
    end = inputs.shape[1]
    y = inputs[:, end - count :] * taps[0]
    for s in range(1, taps.shape[0]):
        y = y + inputs[:, end - count - s : end - s] * taps[s]
    y = y if bias is None else y + bias
    return F.silu(y) if silu else y


def _continue_batch(
    y: Tensor,
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial: Tensor,
    runs: Tensor | None,
    reverse: bool,
) -> Tensor:
    # Recompute the outputs that read initial states: the first width-1 in scan order, where still in run 0.
    count = min(taps.shape[0] - 1, x.shape[1])
    edge = slice(x.shape[1] - count, x.shape[1]) if reverse else slice(0, count)
    first = x[:, edge] if runs is None else torch.where((runs[:, edge] == 0)[..., None], x[:, edge], 0)
    first = first.flip(1) if reverse else first
    inputs = torch.cat([initial.transpose(1, 2).to(taps.dtype), first.to(taps.dtype)], dim=1)
    head = _window_sum(inputs, taps, bias, count, silu).to(x.dtype)
    head = head.flip(1) if reverse else head
    if runs is not None:
        head = torch.where((runs[:, edge] == 0)[..., None], head, y[:, edge])
    y[:, edge] = head
    return y


def _continue_packed(
    y: Tensor,
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial: Tensor,
    cu_seqlens: Tensor,
    runs: Tensor | None,
    reverse: bool,
) -> Tensor:
    # As _continue_batch for each packed sequence; rows past the end of a short sequence are computed and not used.
    history, seqlen = taps.shape[0] - 1, x.shape[1]
    start, end = cu_seqlens[:-1, None], cu_seqlens[1:, None]
    steps = torch.arange(history, device=x.device)
    tokens = (end - 1 - steps if reverse else start + steps).clamp(0, seqlen - 1)
    inputs = torch.cat([initial.transpose(1, 2).to(taps.dtype), x[0][tokens].to(taps.dtype)], dim=1)
    head = _window_sum(inputs, taps, bias, history, silu).to(x.dtype)
    assert runs is not None
    sequence, token = runs[0], torch.arange(seqlen, device=x.device)
    position = end[sequence, 0] - 1 - token if reverse else token - start[sequence, 0]
    early = head[sequence, position.clamp(max=history - 1)]
    return torch.where((position < history)[:, None], early, y[0])[None]


def _final_batch(
    x: Tensor, initial: Tensor | None, runs: Tensor | None, keep: Tensor | None, reverse: bool, history: int
) -> Tensor:
    batch, seqlen, dim = x.shape
    before = x.new_zeros(batch, history, dim) if initial is None else initial.transpose(1, 2).to(x.dtype)
    count = min(history, seqlen)
    edge = slice(0, count) if reverse else slice(seqlen - count, seqlen)
    inputs = torch.cat([before, x[:, edge].flip(1) if reverse else x[:, edge]], dim=1)[:, count:]
    if runs is not None and keep is not None and seqlen > 0:
        last = 0 if reverse else seqlen - 1
        near = F.pad(runs[:, edge].flip(1) if reverse else runs[:, edge], (history, 0))[:, count:]
        same = (near == runs[:, last, None]) & keep[:, last, None]
        inputs = torch.where(same[..., None], inputs, 0)
    return inputs.transpose(1, 2).contiguous()


def _final_packed(x: Tensor, initial: Tensor | None, cu_seqlens: Tensor, reverse: bool, history: int) -> Tensor:
    dim, start, end = x.shape[2], cu_seqlens[:-1, None], cu_seqlens[1:, None]
    if initial is None:
        initial = x.new_zeros(start.shape[0], dim, history)
    initial = initial.to(x.dtype)
    if x.shape[1] == 0:
        return initial.clone()
    local = end - start - history + torch.arange(history, device=x.device)
    tokens = (end - 1 - local if reverse else start + local).clamp(0, x.shape[1] - 1)
    index = (local + history).clamp(max=max(history - 1, 0))[:, None].expand(-1, dim, -1)
    return torch.where((local >= 0)[:, None], x[0][tokens].transpose(1, 2), initial.gather(2, index))
