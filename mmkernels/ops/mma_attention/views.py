"""Other shapes of an MMAMask: dense, tiles, flex attention's BlockMask, transformers' overlay, pictures."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmkernels.errors import ShapeError

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from mmkernels.ops.mma_attention.mask import MMAMask

OverlayFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# Rows of a dense mask that are made at a time where only their sums are wanted.
_ROWS = 256


def dense(mask: "MMAMask") -> Tensor:
    """(batch, qlen, klen) bool; the definition that every backend is held against."""
    return rows(mask, 0, mask.qlen)


def rows(mask: "MMAMask", start: int, stop: int) -> Tensor:
    """Rows start..stop-1 of the dense mask, (batch, stop - start, klen)."""
    key = torch.arange(mask.klen, device=mask.device)
    keep = (key >= mask.row_start[:, start:stop, None]) & (key < mask.row_end[:, start:stop, None])
    for b, q0, q1, k0, k1 in mask.rects.tolist():
        if 0 <= b < mask.batch:  # and negative numbers are no Python indices here
            keep[b, max(q0 - start, 0) : max(q1 - start, 0), max(k0, 0) : max(k1, 0)] = True
    return keep


def live_share(mask: "MMAMask") -> float:
    """Kept pairs over all pairs."""
    kept = sum(int(rows(mask, i, min(i + _ROWS, mask.qlen)).sum()) for i in range(0, mask.qlen, _ROWS))
    return kept / max(1, mask.batch * mask.qlen * mask.klen)


def tiles(mask: "MMAMask", block_q: int, block_k: int) -> tuple[Tensor, Tensor]:
    """(live, full), bool (batch, query blocks, key blocks), on the mask's device and without a synchronisation.

    `live` is exact.  `full` is cautious: a tile that is complete only by an interval and a rectangle together, or by
    two rectangles, may count as partial.  Rows and keys past the end belong to no tile.
    """
    nq, nk = -(-mask.qlen // block_q), -(-mask.klen // block_k)
    n0 = torch.arange(nk, device=mask.device) * block_k
    n1 = (n0 + block_k).clamp(max=mask.klen)
    start, end = mask.row_start[..., None], mask.row_end[..., None]
    padding = nq * block_q - mask.qlen
    touched = torch.minimum(end, n1) > torch.maximum(start, n0)
    whole = (start <= n0) & (end >= n1)
    live = _pad_rows(touched, padding, False).unflatten(1, (nq, block_q)).any(2)
    full = _pad_rows(whole, padding, True).unflatten(1, (nq, block_q)).all(2)
    if mask.rects.shape[0] == 0:
        return live, full
    m0 = torch.arange(nq, device=mask.device) * block_q
    m1 = (m0 + block_q).clamp(max=mask.qlen)
    b, q0, q1, k0, k1 = (column[:, None] for column in mask.rects.unbind(1))
    touched_q, touched_k = torch.minimum(q1, m1) > torch.maximum(q0, m0), torch.minimum(k1, n1) > torch.maximum(k0, n0)
    whole_q, whole_k = (q0 <= m0) & (q1 >= m1), (k0 <= n0) & (k1 >= n1)
    own = b == torch.arange(mask.batch, device=mask.device)  # (nrects, batch)
    return (
        live | _any_rectangle(own, touched_q, touched_k),
        full | _any_rectangle(own, whole_q & (q1 > q0), whole_k & (k1 > k0)),
    )


def _pad_rows(keep: Tensor, padding: int, value: bool) -> Tensor:
    return torch.nn.functional.pad(keep, (0, 0, 0, padding), value=value)


def _any_rectangle(own: Tensor, q: Tensor, k: Tensor) -> Tensor:
    # Sums of ones instead of an `any` over (nrects, batch, q, k), which would be large.
    return torch.einsum("rb,rq,rk->bqk", own.float(), q.float(), k.float()) > 0


def block_mask(mask: "MMAMask", block_size: int) -> "BlockMask":
    """The BlockMask of flex_attention with block lists from `tiles`; its mask_mod reads the mask's integers."""
    from torch.nn.attention.flex_attention import BlockMask

    live, full = tiles(mask, block_size, block_size)
    partial_count, partial_blocks = _block_lists(live & ~full)
    full_count, full_blocks = _block_lists(full)
    return BlockMask.from_kv_blocks(
        partial_count,
        partial_blocks,
        full_count,
        full_blocks,
        BLOCK_SIZE=block_size,
        mask_mod=keep_function(mask),
        seq_lengths=(mask.qlen, mask.klen),
    )


def _block_lists(chosen: Tensor) -> tuple[Tensor, Tensor]:
    # Counts (batch, 1, nq) and block numbers (batch, 1, nq, nk), the chosen ones first and in order.
    order = torch.argsort(chosen.int(), dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]


def keep_function(mask: "MMAMask") -> OverlayFunction:
    """keep(batch, head, q, kv) -> bool on index tensors, q counting the rows of the mask."""
    row_start, row_end, columns = mask.row_start, mask.row_end, [r.unbind(0) for r in mask.rects.unbind(0)]

    def keep(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        kept = (kv >= row_start[b, q]) & (kv < row_end[b, q])
        for row, q0, q1, k0, k1 in columns:
            kept = kept | ((b == row) & (q >= q0) & (q < q1) & (kv >= k0) & (kv < k1))
        return kept

    return keep


def or_mask_function(mask: "MMAMask", past_length: int | None) -> OverlayFunction:
    """`keep_function` for absolute query positions."""
    keep, past = keep_function(mask), mask.klen - mask.qlen if past_length is None else past_length

    def overlay(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return keep(b, h, q - past, kv)

    return overlay


def draw(mask: "MMAMask", path: str | None, row: int, size: int) -> str:
    """See MMAMask.draw."""
    if not 0 <= row < mask.batch:
        raise ShapeError(f"MMAMask.draw: row must be within the batch of {mask.batch}; got {row}. Count from 0.")
    if path is not None:
        _paint(mask, path, row, _shares(mask, row, 16 * size))
    share = _shares(mask, row, size)
    return "\n".join("".join("#" if s == 1 else "+" if s > 0 else "." for s in line) for line in share.tolist())


def _shares(mask: "MMAMask", row: int, size: int) -> Tensor:
    # The kept share of each tile of at most size x size tiles; a band of rows at a time.
    step = -(-max(mask.qlen, mask.klen, 1) // size)
    own = mask.rects[:, 0] == row
    rects = mask.rects[own].clone()
    rects[:, 0] = 0
    single = type(mask)(mask.row_start[row : row + 1], mask.row_end[row : row + 1], rects, mask.klen)
    ones = torch.ones(mask.klen)
    width = torch.stack([part.sum() for part in ones.split(step)]) if mask.klen else ones
    bands = []
    for i in range(0, mask.qlen, step):
        band = rows(single, i, min(i + step, mask.qlen))[0].float().cpu().sum(0)
        sums = torch.stack([part.sum() for part in band.split(step)]) if mask.klen else band
        bands.append(sums / (width * min(step, mask.qlen - i)))
    return torch.stack(bands) if bands else torch.zeros(0, 0)


def _paint(mask: "MMAMask", path: str, row: int, share: Tensor) -> None:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "MMAMask.draw: writing a PNG needs matplotlib; install mmkernels[demo], or draw text with path=None."
        ) from error
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes: Any = figure.add_subplot()
    axes.imshow(
        share.numpy(),
        cmap="Greens",
        vmin=0,
        vmax=1,
        extent=(0, mask.klen, mask.qlen, 0),
        interpolation="nearest",
        aspect="auto",
    )
    axes.set(xlabel="key", ylabel="query row", title=f"batch row {row}: {100 * float(share.mean()):.0f} % kept")
    if max(mask.qlen, mask.klen) <= 32:
        axes.set_xticks(range(mask.klen + 1))
        axes.set_yticks(range(mask.qlen + 1))
        axes.grid(linewidth=0.3)
        axes.tick_params(labelsize=6)
    figure.savefig(Path(path), dpi=150)
