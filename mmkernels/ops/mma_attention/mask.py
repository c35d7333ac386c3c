"""MMAMask: who may attend whom, in O(seqlen) integers, and the builders of every common mask.

Modality-mutual attention is AKI's (arXiv 2503.02597, section 3): causal, plus rectangles image queries x prompt keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmkernels._checks import integer, same_device
from mmkernels.errors import ConfigError, DtypeError, ShapeError

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from mmkernels.ops.mma_attention.views import OverlayFunction

Spans = Tensor | Sequence[Sequence[int]]


@dataclass(frozen=True, eq=False)
class MMAMask:
    """Which keys each query row attends: one interval a row, plus rectangles of rows x keys, as a union.

    keep(b, i, j) = row_start[b, i] <= j < row_end[b, i]  or  some rectangle (b, q0, q1, k0, k1) has q0 <= i < q1 and
    k0 <= j < k1.  An interval with end <= start is empty; an empty rectangle has no effect; whatever lies outside
    [0, klen) is cut off.  A row that keeps no key has output 0 and lse -inf.

    Args:
        row_start: (batch, qlen) int32, first key of each row.
        row_end: (batch, qlen) int32, one past its last key.
        rects: (nrects, 5) int32, rows (batch_index, q0, q1, k0, k1) sorted by batch_index; q counts the rows of this
            call, k its keys.
        klen: number of keys.
    """

    row_start: Tensor
    row_end: Tensor
    rects: Tensor
    klen: int

    def __post_init__(self) -> None:
        tensors = {"row_start": self.row_start, "row_end": self.row_end, "rects": self.rects}
        for name, value in tensors.items():
            if value.dtype != torch.int32:
                raise DtypeError(f"MMAMask: {name} must be int32; got {value.dtype}. Convert it with {name}.int().")
        if self.row_start.dim() != 2 or self.row_start.shape != self.row_end.shape:
            raise ShapeError(
                f"MMAMask: row_start and row_end must both have shape (batch, qlen); got "
                f"{tuple(self.row_start.shape)} and {tuple(self.row_end.shape)}. Give every row of the batch both ends."
            )
        if self.rects.dim() != 2 or self.rects.shape[1] != 5:
            raise ShapeError(
                f"MMAMask: rects must have shape (nrects, 5); got {tuple(self.rects.shape)}. A row is (batch_index, "
                "q0, q1, k0, k1); torch.empty(0, 5, dtype=torch.int32) for none."
            )
        same_device("MMAMask", **tensors)

    @property
    def batch(self) -> int:
        """Rows of the batch."""
        return self.row_start.shape[0]

    @property
    def qlen(self) -> int:
        """Query rows."""
        return self.row_start.shape[1]

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.row_start.device

    def to(self, device: torch.device | str) -> "MMAMask":
        """The same mask on another device."""
        return MMAMask(self.row_start.to(device), self.row_end.to(device), self.rects.to(device), self.klen)

    def expand(self, batch: int) -> "MMAMask":
        """A mask of batch 1 for every row of a larger batch."""
        if self.batch != 1:
            raise ShapeError(f"MMAMask.expand: the mask must have batch 1; got batch={self.batch}. Index it instead.")
        rects = self.rects.repeat(batch, 1)
        rects[:, 0] = torch.arange(batch, dtype=torch.int32, device=self.device).repeat_interleave(len(self.rects))
        return MMAMask(self.row_start.repeat(batch, 1), self.row_end.repeat(batch, 1), rects, self.klen)

    @staticmethod
    def causal(qlen: int, klen: int | None = None, *, batch: int = 1, device: torch.device | str = "cpu") -> "MMAMask":
        """Row i attends the keys up to its own position, klen - qlen + i."""
        return mma_mask(qlen, klen, batch=batch, device=device)

    @staticmethod
    def full(qlen: int, klen: int | None = None, *, batch: int = 1, device: torch.device | str = "cpu") -> "MMAMask":
        """Every row attends every key."""
        return mma_mask(qlen, klen, batch=batch, causal=False, device=device)

    @staticmethod
    def sliding_window(
        qlen: int, window: int, klen: int | None = None, *, batch: int = 1, device: torch.device | str = "cpu"
    ) -> "MMAMask":
        """Causal, the last `window` keys only, the row's own included."""
        return mma_mask(qlen, klen, batch=batch, window=window, device=device)

    @staticmethod
    def documents(cu_seqlens: Tensor, qlen: int, *, causal: bool = True) -> "MMAMask":
        """Sequences packed in a batch of 1, each attending itself only."""
        return mma_mask(qlen, cu_seqlens=cu_seqlens, causal=causal)

    def dense(self) -> Tensor:
        """(batch, qlen, klen) bool, True = attends.  O(qlen * klen) memory: for tests and small pictures."""
        from mmkernels.ops.mma_attention import views

        return views.dense(self)

    def live_share(self) -> float:
        """Kept pairs over all pairs: how much of dense attention's work remains."""
        from mmkernels.ops.mma_attention import views

        return views.live_share(self)

    def tiles(self, block_q: int = 128, block_k: int = 128) -> tuple[Tensor, Tensor]:
        """(live, full), bool (batch, query blocks, key blocks): tiles that keep something, tiles that keep all."""
        from mmkernels.ops.mma_attention import views

        return views.tiles(self, block_q, block_k)

    def block_mask(self, block_size: int = 128) -> "BlockMask":
        """The BlockMask of torch.nn.attention.flex_attention, made without a dense mask."""
        from mmkernels.ops.mma_attention import views

        return views.block_mask(self, block_size)

    def or_mask_function(self, past_length: int | None = None) -> "OverlayFunction":
        """f(batch, head, q, kv) -> bool for transformers' create_causal_mask(or_mask_function=...).

        Args:
            past_length: absolute position of row 0, which transformers adds to q; default klen - qlen.
        """
        from mmkernels.ops.mma_attention import views

        return views.or_mask_function(self, past_length)

    def draw(self, path: str | None = None, *, row: int = 0, size: int = 64) -> str:
        """Draw one row of the batch: '#' kept, '.' not, '+' a partly kept tile when the mask is larger than `size`.

        Args:
            path: also write a PNG there (needs matplotlib).
            row: batch row.
            size: at most that many characters a side; the PNG has up to 16 times as many cells.
        """
        from mmkernels.ops.mma_attention import views

        return views.draw(self, path, row, size)


def mma_mask(
    qlen: int,
    klen: int | None = None,
    *,
    batch: int = 1,
    spans: Spans | None = None,
    causal: bool = True,
    window: int | None = None,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    past_length: int | None = None,
    device: torch.device | str | None = None,
) -> MMAMask:
    """Build the mask of causal, full, windowed, packed or padded attention, opened by spans.

    keep(i, j) = valid(i) valid(j) [(j <= p_i and j > p_i - window and doc(i) = doc(j)) or (i, j) in a span], with
    p_i = past_length + i the position of row i; AKI's rule, arXiv 2503.02597, section 3.

    Args:
        qlen: query rows of the call.
        klen: keys of the call, the cached ones included; default past_length + qlen.
        batch: rows of the batch, if neither attention_mask nor spans need more.
        spans: (nspans, 5) ints (batch_index, q0, q1, k0, k1) in positions of the whole sequence, as
            `build_mutual_spans` makes them: queries q0..q1-1 also attend keys k0..k1-1.  Overlaps count once.  A
            block whose keys are its queries, (b, i0, i1, i0, i1), is bidirectional attention inside an image.
        causal: False lets every row attend every (valid) key.
        window: keys within that distance only: the last `window` keys, own included (both ways when not causal).
        attention_mask: (batch, klen) padding mask, 0 = padding, left or right, not in the middle.  Padded keys are
            attended by nobody, padded rows attend nothing.
        cu_seqlens: (n+1,) int32: documents packed in a batch of 1; qlen == klen.  Tokens after the last are padding.
        past_length: keys before the first row's own; default klen - qlen.
        device: of the mask; default that of the tensors given.

    Returns:
        An `MMAMask`.

    Raises:
        ShapeError: sizes disagree; a span outside the sequence, empty, or - in a causal mask without a window - with
            keys that all precede its queries; padding in the middle of a sequence.
        ConfigError: options that exclude each other; a chunk of the sequence that cuts through a span: queries of the
            span lie in the past, and keys they may read do not.

    Numerics: integers, exact.
    Cost: O(batch * (qlen + klen)); spans and attention_mask are read on the host (one synchronisation on a GPU).

    Example:
        >>> mask = mma_mask(6, spans=[(0, 1, 3, 3, 5)])  # rows 1 and 2 (the image) read keys 3 and 4 (the question)
        >>> print(mask.draw())
        #.....
        ##.##.
        #####.
        ####..
        #####.
        ######

    Source: checked by brute force against the formula.
    """
    past = _past(qlen, klen, past_length, causal)
    klen = past + qlen if klen is None else klen
    device = _device(device, attention_mask, cu_seqlens, spans)
    batch = _check_options(batch, klen, qlen, window, attention_mask, cu_seqlens)
    row = torch.arange(qlen, dtype=torch.int32, device=device).expand(batch, qlen)
    position = row + past
    first = torch.zeros_like(row)
    last = torch.full_like(row, klen)
    if cu_seqlens is not None:
        first, last = _documents(cu_seqlens, row)
    if attention_mask is not None:
        begin, end = _valid_range(attention_mask.to(device))
        first, last = torch.maximum(first, begin[:, None]), torch.minimum(last, end[:, None])
    row_start, row_end = first, torch.minimum(last, position + 1) if causal else last
    if window is not None:
        row_start = torch.maximum(row_start, position + 1 - window)
        row_end = row_end if causal else torch.minimum(row_end, position + window)
    if causal or qlen == klen:  # rows are positions of the same sequence: those outside its valid part are padding
        row_end = torch.where((position >= first) & (position < last), row_end, row_start)
    row_start = torch.minimum(row_start, row_end)
    if spans is None:
        rects = torch.zeros(0, 5, dtype=torch.int32, device=device)
        return MMAMask(row_start.contiguous(), row_end.contiguous(), rects, klen)
    listed = local_spans(spans, batch, past, qlen, klen, causal and window is None)
    if cu_seqlens is not None:
        _check_documents(listed, cu_seqlens)
    return _open(row_start, row_end, first, last, listed, past, klen, causal and window is None)


def _past(qlen: int, klen: int | None, past_length: int | None, causal: bool) -> int:
    past = past_length if past_length is not None else 0 if klen is None else klen - qlen
    past = past if causal or past_length is not None else max(past, 0)
    if qlen < 0 or past < 0 or (klen is not None and causal and past + qlen > klen):
        raise ShapeError(
            f"mma_mask: klen must hold past_length + qlen keys; got qlen={qlen}, klen={klen}, "
            f"past_length={past_length}. Every query row of a causal mask has its own key."
        )
    return past


def _device(device: torch.device | str | None, *given: object) -> torch.device:
    found = next((value.device for value in given if isinstance(value, Tensor)), torch.device("cpu"))
    return found if device is None else torch.device(device)


def _check_options(
    batch: int, klen: int, qlen: int, window: int | None, attention_mask: Tensor | None, cu_seqlens: Tensor | None
) -> int:
    if window is not None and window < 1:
        raise ConfigError(f"mma_mask: window must be at least 1; got {window}. It counts the row's own key.")
    if cu_seqlens is not None:
        integer("mma_mask", cu_seqlens=cu_seqlens)
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or batch != 1 or qlen != klen:
            raise ShapeError(
                f"mma_mask: cu_seqlens must have shape (n+1,) with batch=1 and qlen == klen; got "
                f"{tuple(cu_seqlens.shape)}, batch={batch}, qlen={qlen}, klen={klen}. Concatenate the documents."
            )
    if attention_mask is None:
        return batch
    if attention_mask.dim() != 2 or attention_mask.shape[1] != klen or batch not in (1, attention_mask.shape[0]):
        raise ShapeError(
            f"mma_mask: attention_mask must have shape (batch, klen={klen}); got {tuple(attention_mask.shape)}. It "
            "covers the cached keys too; a 4-D mask cannot be combined with spans."
        )
    return attention_mask.shape[0]


def _documents(cu_seqlens: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    # First key and one past the last key of the document each row is in; empty for rows after the last document.
    cu = cu_seqlens.to(device=row.device, dtype=torch.int32)
    document = torch.bucketize(row.contiguous(), cu[1:].contiguous(), right=True)
    inside = document < cu.shape[0] - 1
    document = document.clamp(max=max(cu.shape[0] - 2, 0))
    if cu.shape[0] < 2:
        return torch.zeros_like(row), torch.zeros_like(row)
    return torch.where(inside, cu[document], 0), torch.where(inside, cu[document + 1], 0)


def _valid_range(attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    # [begin, end) of the tokens that are no padding, (batch,) int32 each.
    valid = attention_mask != 0
    count = valid.sum(1)
    if valid.shape[1] == 0:
        return count.int(), count.int()
    begin = valid.int().argmax(1)
    end = torch.where(count > 0, valid.shape[1] - valid.flip(1).int().argmax(1), begin)
    if not torch.compiler.is_compiling():
        holes = ((end - begin) != count).nonzero()
        if holes.numel():
            raise ShapeError(
                f"mma_mask: attention_mask must mask the left or the right of a sequence; got padding between "
                f"tokens in row {int(holes[0])}. Move the padding to one side, or pack the pieces with cu_seqlens."
            )
    return begin.int(), end.int()


def local_spans(
    spans: Spans, batch: int, past: int, qlen: int, klen: int, plain_causal: bool
) -> list[tuple[int, int, int, int, int]]:
    """Check spans; return those that open something for rows of this call, q in local rows, sorted by batch row."""
    rows = spans.tolist() if isinstance(spans, Tensor) else [list(span) for span in spans]
    kept = []
    for n, span in enumerate(rows):
        if len(span) != 5:
            raise ShapeError(f"mma_mask: spans must have 5 columns; got {span} at {n}. They are (b, q0, q1, k0, k1).")
        b, q0, q1, k0, k1 = span
        if not (0 <= b < batch and 0 <= q0 < q1 <= past + qlen and 0 <= k0 < k1):
            raise ShapeError(
                f"mma_mask: spans must lie inside the batch of {batch} and the {past + qlen} positions, each with "
                f"q0 < q1 and k0 < k1; got {span} at {n}. Columns are (b, q0, q1, k0, k1), ends exclusive."
            )
        if q0 < past < k1:
            raise ConfigError(
                f"mma_mask: a chunk must not start inside a span; got past_length={past} and span {span} at {n}: its "
                f"queries are in the cache already and could not read the keys from {past} on. Prefill up to "
                f"position {max(q1, k1)} in one call."
            )
        if k1 > klen:
            raise ShapeError(
                f"mma_mask: spans must have k1 <= klen; got {span} at {n} with klen={klen}. A chunk must contain the "
                "whole span: its queries and every key they read."
            )
        if plain_causal and k1 <= q0:
            raise ShapeError(
                f"mma_mask: spans of a causal mask must unlock keys after their first query; got {span} at {n}, whose "
                "keys precede its queries. Causal attention has them already; swap queries and keys?"
            )
        if q1 > past:
            kept.append((b, max(q0 - past, 0), q1 - past, k0, k1))
    return sorted(kept)


def _check_documents(spans: list[tuple[int, int, int, int, int]], cu_seqlens: Tensor) -> None:
    bounds = cu_seqlens.tolist()
    for span in spans:
        _, q0, q1, k0, k1 = span
        if not any(a <= min(q0, k0) and max(q1, k1) <= z for a, z in pairwise(bounds)):
            raise ShapeError(
                f"mma_mask: spans must lie within one document of cu_seqlens; got {span} with boundaries {bounds}. "
                "Positions are those of the packed sequence."
            )


def _open(
    row_start: Tensor,
    row_end: Tensor,
    first: Tensor,
    last: Tensor,
    spans: list[tuple[int, int, int, int, int]],
    past: int,
    klen: int,
    plain_causal: bool,
) -> MMAMask:
    """Add spans to row intervals: into the intervals where every row of a span touches it, as rectangles otherwise."""
    row_start, row_end = row_start.clone(), row_end.clone()
    rects = []
    for b, q0, q1, k0, k1 in spans:
        if plain_causal and k0 <= past + q0 + 1:
            end = torch.minimum(last[b, q0:q1], torch.full_like(last[b, q0:q1], k1))
            live = row_end[b, q0:q1] > row_start[b, q0:q1]
            row_end[b, q0:q1] = torch.where(live, torch.maximum(row_end[b, q0:q1], end), row_end[b, q0:q1])
        else:
            rects.append((b, q0, q1, k0, k1))
    opened = torch.tensor(rects, dtype=torch.int32).reshape(-1, 5).to(row_start.device)
    if rects:
        opened = _inside_documents(opened, first, last, past)
    return MMAMask(row_start.contiguous(), row_end.contiguous(), opened, klen)


def _inside_documents(rects: Tensor, first: Tensor, last: Tensor, past: int) -> Tensor:
    # Rows of a rectangle that are padding are cut off on the left or the right; so are keys outside the document.
    b, q0, q1, k0, k1 = rects.unbind(1)
    begin, end = first[b.long(), q0.long()], last[b.long(), q0.long()]  # the same for every row of a span
    q0, q1 = torch.maximum(q0, begin - past), torch.minimum(q1, end - past)
    return torch.stack([b, q0, q1, torch.maximum(k0, begin), torch.minimum(k1, end)], 1)
