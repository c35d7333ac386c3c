"""Spans: which prompt keys image queries may read, found in token or modality ids.  AKI, arXiv 2503.02597, section 3.

Runs on the host: spans are a handful of integers, and masks are built once a forward pass.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from mmkernels._checks import integer
from mmkernels.errors import ConfigError, DataError, ShapeError, nearest
from mmkernels.ops.mma_attention.mask import MMAMask

POLICIES = ("prompt", "own_segment", "none")
IGNORED = -100  # the label of a token without loss, as in torch's cross_entropy and transformers

Run = tuple[int, int]


def build_mutual_spans(
    input_ids: Tensor | None = None,
    *,
    image_token_id: int | None = None,
    mm_token_type_ids: Tensor | None = None,
    prompt_end_token_id: int | Sequence[int] | None = None,
    include_prompt_end: bool = True,
    labels: Tensor | None = None,
    context_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_image_tokens: int = 1,
    policy: str = "prompt",
) -> Tensor:
    """Find the rectangles image queries x prompt keys that modality-mutual attention opens.

    For an image at [i0, i1) whose prompt ends at t1, the spans are [i0, i1) x (text of [i1, t1)); t1 is the first end
    of a prompt after the image.  AKI, arXiv 2503.02597, section 3, where the prompt is the question of one turn.

    A prompt ends, whichever comes first, with `prompt_end_token_id` (the assistant tag) or at the first token that has
    a label.  With neither given it ends with the sequence: right for generation, where there is no answer yet.  An
    image after which no end is found (a caption, a truncated prompt) opens nothing, and attention there stays causal.
    Later turns are never read: an image in front of the first question does not see the second.

    Args:
        input_ids: (batch, seqlen) int; needed for image_token_id and prompt_end_token_id.
        image_token_id: the placeholder; each unbroken run of it is one image.
        mm_token_type_ids: (batch, seqlen) int, instead of image_token_id: 0 text, 1 image, 2 video, 3 audio; each
            unbroken run of one id that is not 0 counts as an image.
        prompt_end_token_id: the token, or tokens in a row, after which an answer starts.
        include_prompt_end: whether images read that tag as well (AKI's released weights were trained so).
        labels: (batch, seqlen) int, -100 where there is no loss.
        context_mask: (batch, seqlen) bool, text that images may read at all; default all text.
        attention_mask: (batch, seqlen), 0 = padding, never read.
        cu_seqlens: (n+1,) int: documents packed in a batch of 1; nothing crosses their boundaries.
        num_image_tokens: how many positions of the sequence one placeholder of input_ids stands for.  Above 1, spans
            (not the arguments) are in positions of the expanded sequence.
        policy: "prompt": an image reads the text of its prompt up to the end; "own_segment": up to the next image;
            "none": nothing, attention stays causal.

    Returns:
        (nspans, 5) int32, rows (batch_index, q0, q1, k0, k1), for `mma_mask(spans=...)`.

    Raises:
        ShapeError: tensors that are not (batch, seqlen), or cu_seqlens with another batch than 1.
        DtypeError: ids that are not integers.
        ConfigError: an unknown policy, no way to tell images apart, a token to look for without input_ids.

    Numerics: integers, exact.
    Cost: O(batch * seqlen) on the host, and a synchronisation if the ids are on a GPU.

    Example:
        >>> ids = torch.tensor([[1, 5, 9, 9, 9, 6, 7, 3, 8]])  # 9 = image, 3 = assistant tag, 8 = the answer
        >>> build_mutual_spans(ids, image_token_id=9, prompt_end_token_id=3)
        tensor([[0, 2, 5, 5, 8]], dtype=torch.int32)

    Source: the rule and its edge cases as observed in the authors' code, whose off-by-one include_prompt_end is.
    """
    given = {"input_ids": input_ids, "mm_token_type_ids": mm_token_type_ids, "labels": labels}
    given |= {"context_mask": context_mask, "attention_mask": attention_mask}
    lead = _check(given, image_token_id, prompt_end_token_id, num_image_tokens, cu_seqlens, policy)
    spans: list[tuple[int, int, int, int, int]] = []
    for row in range(lead.shape[0] if policy != "none" else 0):
        own = {name: None if value is None else value[row].cpu() for name, value in given.items()}
        kind = _kind(own["input_ids"], own["mm_token_type_ids"], image_token_id)
        tag = [prompt_end_token_id] if isinstance(prompt_end_token_id, int) else list(prompt_end_token_id or ())
        images, texts, ends = _landmarks(own, kind, tag, include_prompt_end, num_image_tokens)
        length = int(torch.where(kind != 0, num_image_tokens, 1).sum())
        open_ended = not tag and labels is None
        for a, z in _documents(cu_seqlens, length):
            spans += [(row, *span) for span in _spans_within(a, z, images, texts, ends, open_ended, policy)]
    return torch.tensor(spans, dtype=torch.int32).reshape(-1, 5).to(lead.device)


def check_no_label_leak(labels: Tensor, mask: MMAMask) -> None:
    """Refuse a mask in which some row attends a supervised token that lies after it.

    The loss at token p is predicted by row p - 1.  If any earlier row i attends token p, row p - 1 reads its own
    target, at once (i = p - 1) or through row i one layer later, and training learns to copy it.

    Args:
        labels: (batch, seqlen) int, -100 where there is no loss; not shifted.
        mask: the `MMAMask` of the same batch and sequence, qlen == klen.

    Returns:
        None when there is no leak.

    Raises:
        DataError: naming the first such token and a row that reads it.
        ShapeError: labels and mask disagree.
        DtypeError: labels that are not integers.

    Numerics: integers, exact.
    Cost: O(batch * seqlen + nspans), one synchronisation on a GPU.

    Example:
        >>> from mmkernels import mma_mask
        >>> labels = torch.tensor([[-100, -100, -100, -100, 5, 6]])
        >>> check_no_label_leak(labels, mma_mask(6, spans=[(0, 1, 3, 3, 4)]))

    Source: checked against the dense mask.
    """
    integer("check_no_label_leak", labels=labels)
    if labels.shape != (mask.batch, mask.klen) or mask.qlen != mask.klen:
        raise ShapeError(
            f"check_no_label_leak: labels must have shape (batch={mask.batch}, klen={mask.klen}) of a mask with "
            f"qlen == klen; got {tuple(labels.shape)}, qlen={mask.qlen}. Check the whole training sequence at once."
        )
    supervised = (labels != IGNORED).to(mask.device)
    before = torch.nn.functional.pad(supervised.cumsum(1), (1, 0))  # supervised tokens before each position
    row = torch.arange(mask.qlen, device=mask.device)
    first = torch.maximum(mask.row_start, row + 1).clamp(0, mask.klen).long()
    last = mask.row_end.clamp(0, mask.klen).long().maximum(first)
    leaks = [(b, i, first[b, i], last[b, i]) for b, i in (before.gather(1, last) > before.gather(1, first)).nonzero()]
    for b, q0, q1, k0, k1 in mask.rects.tolist():
        k0, k1 = max(k0, q0 + 1), min(k1, mask.klen)  # row q0 has more keys ahead of it than the others
        if q0 < q1 and k0 < k1 and before[b, k1] > before[b, k0]:
            leaks.append((torch.tensor(b), torch.tensor(q0), torch.tensor(k0), torch.tensor(k1)))
    if leaks:
        b, i, a, z = (int(n) for n in leaks[0])
        token = a + int(supervised[b, a:z].int().argmax())
        raise DataError(
            f"check_no_label_leak: labels must be -100 wherever an earlier row can read; got a label at token {token} "
            f"of batch row {b}, which row {i} attends. End the span before the answer, or set the label to -100."
        )


def _check(
    given: dict[str, Tensor | None],
    image_token_id: int | None,
    prompt_end_token_id: int | Sequence[int] | None,
    num_image_tokens: int,
    cu_seqlens: Tensor | None,
    policy: str,
) -> Tensor:
    # Returns the tensor that sets batch and seqlen.
    function = "build_mutual_spans"
    if policy not in POLICIES:
        raise ConfigError(f"{function}: policy must be known; got {policy!r}. {nearest(str(policy), POLICIES)}")
    if (image_token_id is None) == (given["mm_token_type_ids"] is None):
        raise ConfigError(
            f"{function}: images must be told by image_token_id or by mm_token_type_ids; got "
            f"{'neither' if image_token_id is None else 'both'}. Give the one your processor makes."
        )
    if given["input_ids"] is None and not (image_token_id is None and prompt_end_token_id is None):
        raise ConfigError(
            f"{function}: input_ids must be given to look for image_token_id or prompt_end_token_id; got None. Use "
            "mm_token_type_ids with labels or context_mask when there are embeddings only."
        )
    if num_image_tokens < 1 or (num_image_tokens > 1 and image_token_id is None):
        raise ConfigError(
            f"{function}: num_image_tokens must be 1, or above with image_token_id; got {num_image_tokens}. "
            "mm_token_type_ids describe a sequence that is expanded already."
        )
    if num_image_tokens > 1 and cu_seqlens is not None:
        raise ConfigError(
            f"{function}: num_image_tokens must be 1 with cu_seqlens; got {num_image_tokens}. Expand the ids first."
        )
    name, lead = next((name, value) for name, value in given.items() if value is not None)
    for other, value in given.items():
        if value is not None and (value.dim() != 2 or value.shape != lead.shape):
            raise ShapeError(
                f"{function}: {other} must have the shape (batch, seqlen) of {name}, {tuple(lead.shape)}; got "
                f"{tuple(value.shape)}. One number for every token of every row."
            )
    integer(function, **{k: given[k] for k in ("input_ids", "mm_token_type_ids", "labels")}, cu_seqlens=cu_seqlens)
    if cu_seqlens is not None and lead.shape[0] != 1:
        raise ShapeError(
            f"{function}: {name} must have batch 1 when cu_seqlens is given; got batch={lead.shape[0]}. Pack the rows."
        )
    return lead


def _kind(input_ids: Tensor | None, types: Tensor | None, image_token_id: int | None) -> Tensor:
    # 0 for text, another number for each kind of image.
    if types is not None:
        return types
    assert input_ids is not None  # _check
    return torch.eq(input_ids, 0 if image_token_id is None else image_token_id).int()


def _landmarks(
    own: dict[str, Tensor | None], kind: Tensor, tag: list[int], include: bool, num_image_tokens: int
) -> tuple[list[Run], list[Run], list[tuple[int, int]]]:
    """Runs of image tokens, runs of text that may be read, and prompt ends (where looked for, where keys stop)."""
    readable = kind == 0
    for name in ("context_mask", "attention_mask"):
        value = own[name]
        readable = readable if value is None else readable & (value != 0)
    # Position of each token once every placeholder is expanded.
    length = torch.where(kind != 0, num_image_tokens, 1)
    position = torch.nn.functional.pad(length.cumsum(0), (1, 0)).tolist()
    ends: list[tuple[int, int]] = []
    ids, labels = own["input_ids"], own["labels"]
    if tag and ids is not None and ids.shape[0] >= len(tag):
        hits = (ids.unfold(0, len(tag), 1) == torch.tensor(tag)).all(1).nonzero()[:, 0].tolist()
        ends += [(position[n], position[n + len(tag)] if include else position[n]) for n in hits]
    if labels is not None:
        ends += [(position[n], position[n]) for n in (labels != IGNORED).nonzero()[:, 0].tolist()]
    runs = [[(position[a], position[z]) for a, z in _equal_runs(of)] for of in (kind, readable.int())]
    return runs[0], runs[1], sorted(ends)


def _equal_runs(values: Tensor) -> list[Run]:
    """[start, stop) of each unbroken run of one value that is not 0."""
    if values.shape[0] == 0:
        return []
    starts = [0, *((values[1:] != values[:-1]).nonzero()[:, 0] + 1).tolist()]
    stops = [*starts[1:], values.shape[0]]
    return [(a, z) for a, z in zip(starts, stops, strict=True) if values[a] != 0]


def _documents(cu_seqlens: Tensor | None, length: int) -> list[Run]:
    if cu_seqlens is None:
        return [(0, length)]
    bounds = cu_seqlens.tolist()
    return list(pairwise(bounds))


def _spans_within(
    a: int, z: int, images: list[Run], texts: list[Run], ends: list[tuple[int, int]], open_ended: bool, policy: str
) -> list[tuple[int, int, int, int]]:
    """Spans (q0, q1, k0, k1) of the document [a, z)."""
    spans = []
    own = _clip(images, a, z)
    for n, (i0, i1) in enumerate(own):
        stop = next((t1 for at, t1 in ends if i1 <= at < z), z if open_ended else i1)
        if policy == "own_segment" and n + 1 < len(own):
            stop = min(stop, own[n + 1][0])
        spans += [(i0, i1, k0, k1) for k0, k1 in _clip(texts, i1, min(stop, z))]
    return spans


def _clip(runs: list[Run], a: int, z: int) -> list[Run]:
    return [(max(s, a), min(e, z)) for s, e in runs if max(s, a) < min(e, z)]


def ends_in_an_image(input_ids: Tensor, kind: Tensor, prompt_end_token_id: int | Sequence[int]) -> bool:
    """Whether some row's last image is followed by no end of a prompt: its question is still to come, if there is one.

    Args:
        input_ids: (batch, seqlen).
        kind: (batch, seqlen), not 0 where a token belongs to an image.
        prompt_end_token_id: as for `build_mutual_spans`.
    """
    position = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)
    last_image = (position * (kind != 0)).amax(1)
    return bool((last_image > (position * starts_of(input_ids, prompt_end_token_id)).amax(1)).any())


def starts_of(input_ids: Tensor, tag: int | Sequence[int]) -> Tensor:
    """(batch, seqlen) bool: where the token, or the tokens in a row, start."""
    tokens = [tag] if isinstance(tag, int) else list(tag)
    found = torch.ones_like(input_ids, dtype=torch.bool)
    for n, token in enumerate(tokens):
        shifted = torch.nn.functional.pad(input_ids[:, n:], (0, n), value=-1)
        found &= shifted == token
    return found
