"""Backend "torch" of mma_attention: blocks of query rows against the key tiles they keep, O(qlen + klen) memory.

Eager calls skip dead tiles; traced and functional ones (torch.func, forward mode) and second derivatives use the same
formula as plain differentiable expressions, one block of rows at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mmkernels.ops.mma_attention.mask import MMAMask
from mmkernels.ops.mma_attention.views import tiles

# A block of scores is at most this many elements (16 MiB of float32): it should not leave a third-level cache.
_SCORES = 1 << 22
_BLOCK = 128
# Below this many scores a head, finding the live tiles costs more than computing the dead ones (one token decoded).
_SMALL = 1 << 14
# Rows of a batch share a block's keys unless that costs a third more than taking each row's own.
_SHARED = 0.75


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
    mask = (row_start, row_end, rects)
    plain = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if plain or forward_ad._current_level >= 0:
        out, lse = _plain(q, k, v, mask, scale)
        mass = None if mass_weights is None else _plain_mass(q, k, mask, scale, lse, mass_weights)
    else:
        out, lse = _Attention.apply(q, k, v, *mask, scale)
        mass = None if mass_weights is None else _mass(q, k, mask, scale, lse.detach(), mass_weights)
    return out, lse if return_lse else None, mass


def _keep(mask: tuple[Tensor, Tensor, Tensor], rows: slice, start: int, stop: int, key: Tensor) -> Tensor:
    """(batch, stop - start, keys) bool: the mask at batch rows `rows`, query rows start..stop-1 and the keys listed."""
    row_start, row_end, rects = mask
    keep = (key >= row_start[rows, start:stop, None]) & (key < row_end[rows, start:stop, None])
    if rects.shape[0] == 0:
        return keep
    b, q0, q1, k0, k1 = (column[:, None] for column in rects.unbind(1))
    batch = torch.arange(row_start.shape[0], device=key.device)[rows]
    query = torch.arange(start, stop, device=key.device)
    inside = ((b == batch).float(), ((query >= q0) & (query < q1)).float(), ((key >= k0) & (key < k1)).float())
    return keep | (torch.einsum("rb,rq,rk->bqk", *inside) > 0)


def _plain(q: Tensor, k: Tensor, v: Tensor, mask: tuple[Tensor, Tensor, Tensor], scale: float) -> tuple[Tensor, Tensor]:
    """Output and lse as one differentiable expression a block of rows, every key read."""
    batch, qlen, nheads, _ = q.shape
    acc = torch.promote_types(q.dtype, torch.float32)
    values = v.to(acc).transpose(1, 2)[:, :, None]
    outs, sums = [], []
    for start in range(0, qlen, _BLOCK):
        stop = min(start + _BLOCK, qlen)
        scores = _plain_scores(q, k, mask, scale, start, stop)
        # The largest score only keeps exp in range; the finite bound keeps rows without a key at exp(-inf) = 0.
        largest = scores.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(acc).min)
        p = torch.exp(scores - largest)
        total = p.sum(-1, keepdim=True)
        alive = total > 0
        total = torch.where(alive, total, 1)
        outs.append((p @ values / total).permute(0, 3, 1, 2, 4).flatten(2, 3))
        sums.append(torch.where(alive, largest + total.log(), float("-inf")).flatten(1, 2)[..., 0])
    if not outs or k.shape[1] == 0:
        return torch.zeros_like(q), q.new_full((batch, nheads, qlen), float("-inf"), dtype=acc)
    return torch.cat(outs, 1).to(q.dtype), torch.cat(sums, 2)


def _plain_scores(
    q: Tensor, k: Tensor, mask: tuple[Tensor, Tensor, Tensor], scale: float, start: int, stop: int
) -> Tensor:
    # (batch, nkvheads, group, rows, klen), -inf where masked.
    acc = torch.promote_types(q.dtype, torch.float32)
    query = scale * q[:, start:stop].to(acc).unflatten(2, (k.shape[2], q.shape[2] // k.shape[2])).permute(0, 2, 3, 1, 4)
    scores = query @ k.to(acc).permute(0, 2, 3, 1)[:, :, None]
    keep = _keep(mask, slice(None), start, stop, torch.arange(k.shape[1], device=k.device))
    return scores.masked_fill(~keep[:, None, None], float("-inf"))


def _plain_mass(
    q: Tensor, k: Tensor, mask: tuple[Tensor, Tensor, Tensor], scale: float, lse: Tensor, weights: Tensor
) -> Tensor:
    q, k, lse, weights = q.detach(), k.detach(), lse.detach(), weights.detach()
    lse = torch.where(lse.isinf(), 0, lse).unflatten(1, (k.shape[2], q.shape[2] // k.shape[2]))
    mass = q.new_zeros(q.shape[0], q.shape[2], k.shape[1], dtype=lse.dtype)
    for start in range(0, q.shape[1], _BLOCK):
        stop = min(start + _BLOCK, q.shape[1])
        p = torch.exp(_plain_scores(q, k, mask, scale, start, stop) - lse[..., start:stop, None])
        mass = mass + torch.einsum("bq,bhgqk->bhgk", weights[:, start:stop], p).flatten(1, 2)
    return mass


@dataclass(frozen=True)
class _Item:
    """One block of scores: batch rows, query rows, key segments that keep something, whether they keep everything."""

    rows: slice
    start: int
    stop: int
    segments: list[tuple[int, int]]
    full: bool


def _plan(mask: tuple[Tensor, Tensor, Tensor], klen: int) -> list[_Item]:
    """The blocks with anything to do, from live tiles; one synchronisation on a GPU."""
    if mask[0].shape[1] <= _BLOCK and mask[0].shape[1] * klen <= _SMALL:
        everything = _Item(slice(0, mask[0].shape[0]), 0, mask[0].shape[1], [(0, klen)], False)
        return [everything] if mask[0].numel() * klen else []
    described = MMAMask(*mask, klen)
    live, full = (t.cpu() for t in tiles(described, _BLOCK, _BLOCK))
    batch, qlen = mask[0].shape
    items = []
    for i in range(live.shape[1]):
        start, stop = i * _BLOCK, min((i + 1) * _BLOCK, qlen)
        union = live[:, i].any(0)
        together = int(live[:, i].sum()) >= _SHARED * batch * int(union.sum())
        for rows in [slice(0, batch)] if together else [slice(b, b + 1) for b in range(batch)]:
            chosen = live[rows, i].any(0)
            segments = _runs(chosen.tolist(), klen)
            if segments:
                items.append(_Item(rows, start, stop, segments, bool(full[rows, i][:, chosen].all())))
    return items


def _runs(chosen: list[bool], klen: int) -> list[tuple[int, int]]:
    segments: list[tuple[int, int]] = []
    for n, live in enumerate(chosen):
        if live and segments and segments[-1][1] == n * _BLOCK:
            segments[-1] = (segments[-1][0], min((n + 1) * _BLOCK, klen))
        elif live:
            segments.append((n * _BLOCK, min((n + 1) * _BLOCK, klen)))
    return segments


class _Blocks:
    """Walks the plan, a few key-value heads at a time, and computes masked scores in the accumulation dtype."""

    def __init__(self, q: Tensor, k: Tensor, mask: tuple[Tensor, Tensor, Tensor], scale: float):
        self.q, self.mask, self.scale = q, mask, scale
        self.acc = torch.promote_types(q.dtype, torch.float32)
        self.klen, self.nkvheads = k.shape[1:3]
        self.group = q.shape[2] // self.nkvheads
        self.keys = k.to(self.acc).transpose(1, 2).contiguous()  # (batch, nkvheads, klen, headdim)
        self.plan = _plan(mask, self.klen)

    def __iter__(self) -> Iterator[tuple[_Item, slice, Tensor, Tensor, Tensor]]:
        """(item, key-value heads, queries (batch, heads, group * rows, headdim) scaled, their keys, masked scores)."""
        for item in self.plan:
            count = sum(b - a for a, b in item.segments)
            keep = None if item.full else self.keep(item)
            size = (item.rows.stop - item.rows.start) * self.group * (item.stop - item.start) * count
            step = max(1, _SCORES // max(1, size))
            for head in range(0, self.nkvheads, step):
                heads = slice(head, min(head + step, self.nkvheads))
                query = self.queries(self.q, item, heads) * self.scale
                keys = self.pick(self.keys, item, heads)
                scores = query @ keys.transpose(-1, -2)
                if keep is not None:
                    blocks = scores.unflatten(2, (self.group, item.stop - item.start))
                    blocks.masked_fill_(keep[:, None, None], float("-inf"))
                yield item, heads, query, keys, scores

    def keep(self, item: _Item) -> Tensor:
        """Where the block keeps nothing, (batch, rows, keys)."""
        key = torch.cat([torch.arange(a, b, device=self.q.device) for a, b in item.segments])
        return ~_keep(self.mask, item.rows, item.start, item.stop, key)

    def queries(self, rows: Tensor, item: _Item, heads: slice) -> Tensor:
        """The block's part of a (batch, qlen, nheads, n) tensor as (batch, heads, group * rows, n)."""
        part = rows[item.rows, item.start : item.stop].unflatten(2, (self.nkvheads, self.group))[:, :, heads]
        return part.to(self.acc).permute(0, 2, 3, 1, 4).flatten(2, 3)

    def back(self, part: Tensor, item: _Item) -> Tensor:
        """The inverse of `queries`: (batch, rows, heads * group, n)."""
        return part.unflatten(2, (self.group, item.stop - item.start)).permute(0, 3, 1, 2, 4).flatten(2, 3)

    def heads(self, heads: slice) -> slice:
        """Query heads of key-value heads."""
        return slice(heads.start * self.group, heads.stop * self.group)

    @staticmethod
    def pick(keys: Tensor, item: _Item, heads: slice) -> Tensor:
        """The block's keys out of (batch, nkvheads, klen, n)."""
        parts = [keys[item.rows, heads, a:b] for a, b in item.segments]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    @staticmethod
    def add(total: Tensor, part: Tensor, item: _Item, heads: slice) -> None:
        """The inverse of `pick`: add to the block's keys."""
        at = 0
        for a, b in item.segments:
            total[item.rows, heads, a:b] += part[:, :, at : at + b - a]
            at += b - a


class _Attention(torch.autograd.Function):
    """Output and lse block by block, forward and backward; twice differentiable through _plain."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, row_start: Tensor, row_end: Tensor, rects: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        blocks = _Blocks(q, k, (row_start, row_end, rects), scale)
        values = v.to(blocks.acc).transpose(1, 2).contiguous()
        out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
        lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), float("-inf"), dtype=blocks.acc)
        for item, heads, _, _, scores in blocks:
            largest = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(blocks.acc).min)
            p = scores.sub_(largest).exp_()
            total = p.sum(-1, keepdim=True)
            part = p @ blocks.pick(values, item, heads)
            part /= torch.where(total > 0, total, 1)
            out[item.rows, item.start : item.stop, blocks.heads(heads)] = blocks.back(part, item).to(q.dtype)
            # log 0 = -inf where a row keeps nothing
            sums = blocks.back(largest + total.log(), item)[..., 0].transpose(1, 2)
            lse[item.rows, blocks.heads(heads), item.start : item.stop] = sums
        ctx.save_for_backward(q, k, v, row_start, row_end, rects, lse)
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, row_start, row_end, rects, lse = ctx.saved_tensors
        mask = (row_start, row_end, rects)
        if dout is None and dlse is None:
            return (None,) * 7
        if torch.is_grad_enabled():
            # Views, so that only the direct dependence is differentiated when k itself was computed from q.
            q, k, v = (t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in (q, k, v))
            pairs = zip(_plain(q, k, v, mask, ctx.scale), (dout, dlse), strict=True)
            outputs, seeds = zip(*((o, s) for o, s in pairs if s is not None), strict=True)
            found = torch.autograd.grad(outputs, (q, k, v), seeds, create_graph=True, materialize_grads=True)
            return (*found, None, None, None, None)
        return (*_gradients(q, k, v, mask, ctx.scale, lse, dout, dlse), None, None, None, None)


def _gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: tuple[Tensor, Tensor, Tensor],
    scale: float,
    lse: Tensor,
    dout: Tensor | None,
    dlse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv.  A block holds every key of its rows, so the row sums of P * dP are taken right there."""
    blocks = _Blocks(q, k, mask, scale)
    values = v.to(blocks.acc).transpose(1, 2).contiguous()
    dead = lse.isinf()
    shift = lse.masked_fill(dead, 0).transpose(1, 2)[..., None]
    dsum = None if dlse is None else dlse.masked_fill(dead, 0).transpose(1, 2)[..., None]
    dq = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = torch.zeros_like(blocks.keys), torch.zeros_like(values)
    for item, heads, query, keys, scores in blocks:
        p = scores.sub_(blocks.queries(shift, item, heads)).exp_()
        inner = torch.zeros_like(p[..., :1])
        if dout is not None:
            d = blocks.queries(dout, item, heads)
            blocks.add(dv, p.transpose(-1, -2) @ d, item, heads)
            ds = d @ blocks.pick(values, item, heads).transpose(-1, -2)
            inner = torch.linalg.vecdot(p, ds)[..., None]
        else:
            ds = torch.zeros_like(p)
        if dsum is not None:
            inner = inner - blocks.queries(dsum, item, heads)
        ds.sub_(inner).mul_(p)
        part = blocks.back(ds @ keys, item) * scale
        dq[item.rows, item.start : item.stop, blocks.heads(heads)] = part.to(q.dtype)
        blocks.add(dk, ds.transpose(-1, -2) @ query, item, heads)
    return dq, dk.transpose(1, 2).to(k.dtype), dv.transpose(1, 2).to(v.dtype)


@torch.no_grad()
def _mass(
    q: Tensor, k: Tensor, mask: tuple[Tensor, Tensor, Tensor], scale: float, lse: Tensor, weights: Tensor
) -> Tensor:
    """sum_i weights[i] P[i, j] over the query blocks that have any weight."""
    blocks = _Blocks(q, k, mask, scale)
    shift = lse.masked_fill(lse.isinf(), 0).transpose(1, 2)[..., None]
    mass = q.new_zeros(q.shape[0], blocks.nkvheads, k.shape[1], blocks.group, dtype=blocks.acc)
    counted = (weights != 0).any(0).cpu()
    blocks.plan = [item for item in blocks.plan if bool(counted[item.start : item.stop].any())]
    for item, heads, _, _, scores in blocks:
        p = scores.sub_(blocks.queries(shift, item, heads)).exp_()
        weight = weights[item.rows, item.start : item.stop]
        part = torch.einsum("bq,bhgqk->bhkg", weight, p.unflatten(2, (blocks.group, item.stop - item.start)))
        blocks.add(mass, part, item, heads)
    return mass.transpose(2, 3).flatten(1, 2)
