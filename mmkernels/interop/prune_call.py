"""Narrow the arguments of one forward call to the tokens that stay, and remember in the cache what went.

A processor goes on making every placeholder of an image, `generate` goes on counting them: only the model's own forward
sees fewer columns.  Which ones the cache lacks is written on the cache, so that the calls that follow are narrowed too.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mmkernels.errors import ConfigError, ShapeError
from mmkernels.interop.prune_layout import ImageTokens, Layout, narrow, spread
from mmkernels.interop.transformers import cached_tokens

_NOTE = "_mmkernels_pruned"
# What has a column a token, and what stands at padding.
_COLUMNS = {"input_ids": 0, "labels": -100, "mm_token_type_ids": 0, "token_type_ids": 0, "context_mask": 0}


@dataclass(frozen=True)
class Stage:
    """A run of decoder layers that see the same tokens.

    Attributes:
        layer: the first of them.
        mask: (batch, columns) bool, the columns of their part of the cache, False at padding.
        removed: (batch, 1) int64, tokens of each row that are gone, those gone at the vision side included.
        compact: whether positions were counted anew.
    """

    layer: int
    mask: Tensor
    removed: Tensor
    compact: bool


@dataclass(frozen=True)
class Past:
    """What a cache has seen.

    Attributes:
        full: columns its callers count.
        mask: (batch, columns) bool, those that the first layers hold, False at padding.
        removed: (batch, 1) int64, tokens of each row that are gone.
        compact: whether positions were counted anew.
        stages: where decoder layers hold fewer.
    """

    full: int
    mask: Tensor
    removed: Tensor
    compact: bool = True
    stages: tuple[Stage, ...] = ()


def recall(cache: Any) -> Past | None:
    """What a cache has seen; None for one that nothing was pruned from.

    Raises:
        ConfigError: it was continued by a model that is not pruned.
    """
    past: Past | None = getattr(cache, _NOTE, None)
    held = cached_tokens(cache) if past is not None else 0
    if past is None or held == 0:
        return None
    missing = past.mask.shape[1] - held
    if missing < 0:
        raise ConfigError(
            "prune: past_key_values must be continued by the pruned model alone; got a cache with tokens that it has "
            "not seen. Start a new one."
        )
    if missing == 0:
        return past
    stages = tuple(replace(stage, mask=stage.mask[:, : stage.mask.shape[1] - missing]) for stage in past.stages)
    return replace(past, full=past.full - missing, mask=past.mask[:, :held], stages=stages)


def remember(cache: Any, past: Past) -> None:
    """Write on a cache what it has seen."""
    setattr(cache, _NOTE, past)


@dataclass
class Narrowed:
    """One call after narrowing.

    Attributes:
        past: what the cache will have seen after the call (stages not yet continued).
        before: columns the first layers held before it.
        visual: (batch, width) bool, visual tokens of the call; None without images.
        positions: (batch, width) position ids as if nothing had been removed from this call's batch.
        changed: whether anything is or was removed.
        layout: where the columns were in the call as it came; None: all stay.
    """

    past: Past
    before: int
    visual: Tensor | None
    changed: bool
    layout: Layout | None = None


def narrow_call(
    given: dict[str, Any],
    images: list[ImageTokens] | None,
    past: Past | None,
    *,
    image_token_id: int,
    position_start: int,
    compact: bool,
    always: bool = False,
) -> Narrowed:
    """Take the columns of dropped tokens out of a call's arguments, in place.

    Args:
        given: the arguments of a model's forward, by name.
        images: what stands for each image of the call; None: no images.
        past: of its cache.
        image_token_id: the placeholder.
        position_start: the first position id of the model.
        compact: count positions anew; False: tokens keep those of the unpruned prompt.
        always: write mask and positions even where nothing is removed: layers will remove something later.
    """
    tokens = _tokens(given)
    batch, width = tokens.shape[:2]
    device = tokens.device
    attention = _padding_mask(given)
    if past is None:
        held = cached_tokens(given.get("past_key_values"))
        mask = (
            torch.ones(batch, held, dtype=torch.bool, device=device)
            if attention is None
            else attention[:, :held].bool()
        )
        past = Past(held, mask, torch.zeros(batch, 1, dtype=torch.int64, device=device), compact)
    if past.mask.shape[0] != batch:
        raise ShapeError(
            f"prune: past_key_values must have been filled by a batch of {batch}; got one of {past.mask.shape[0]}. "
            "Repeat the inputs, not the cache."
        )
    own, width = _own_columns(given, attention, past, position_start)
    own = own.to(device)
    positions = _positions(given, past, width, device, position_start)
    visual, layout = None, None
    if images is not None:
        visual, layout, positions = _shrink(given, images, own, positions, image_token_id, compact)
    removed_before = past.removed
    if layout is not None:
        own, positions = layout.mask, layout.position_ids
        visual = layout.take(visual) if visual is not None else None
        past = replace(past, removed=past.removed + layout.removed)
    before = past.mask.shape[1]
    changed = bool(past.removed.any())
    past = replace(past, full=past.full + width, mask=torch.cat([past.mask, own.bool()], dim=1))
    if changed or always:
        given["position_ids"] = positions - removed_before if compact else positions
        dtype = torch.int64 if attention is None else attention.dtype
        given["attention_mask"] = past.mask.to(dtype)
    return Narrowed(past, before, visual, changed, layout)


def _shrink(
    given: dict[str, Any], images: list[ImageTokens], own: Tensor, positions: Tensor, token: int, compact: bool
) -> tuple[Tensor, Layout | None, Tensor]:
    ids = given.get("input_ids")
    if ids is None:
        raise ConfigError(
            "prune: input_ids must be given with images, to find their placeholders; got inputs_embeds. Pass the ids."
        )
    visual = ids == token
    keep, moved = spread(visual, images, positions)
    if bool(keep.all()):
        return visual, None, positions if compact else moved
    layout = narrow(keep, own.bool(), positions if compact else moved, compact=compact)
    if isinstance(given.get("logits_to_keep"), Tensor):
        raise ConfigError(
            "prune: logits_to_keep must be a number of last positions; got indices, whose columns move. Give an int."
        )
    for name, fill in _COLUMNS.items():
        values = given.get(name)
        if values is not None:
            given[name] = layout.take(values, fill)
    return visual, layout, positions


def _tokens(given: dict[str, Any]) -> Tensor:
    tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
    if tokens is None:
        raise ConfigError(
            "prune: input_ids must be given; got neither ids nor embeddings. Pass what the processor made."
        )
    return tokens


def _padding_mask(given: dict[str, Any]) -> Tensor | None:
    mask, cache = given.get("attention_mask"), given.get("past_key_values")
    if getattr(cache, "is_compileable", False):
        raise ConfigError(
            f"prune: past_key_values must be able to grow; got a {type(cache).__name__}, whose size was fixed for the "
            "unpruned prompt. Leave cache_implementation out."
        )
    if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2):
        return mask
    raise ConfigError(
        "prune: attention_mask must be the (batch, seqlen) padding mask; got "
        f"{tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__}. Rows and columns of a ready mask "
        "cannot be told apart once tokens are gone."
    )


def _own_columns(given: dict[str, Any], attention: Tensor | None, past: Past, start: int) -> tuple[Tensor, int]:
    """The padding mask of the call's own tokens, after cutting off tokens that the cache has in truth.

    `generate` counts what is new by the cache's length, which pruning has shortened: it repeats as many old tokens.
    """
    tokens, positions = _tokens(given), given.get("position_ids")
    width = new = tokens.shape[1]
    if attention is not None:
        new = attention.shape[1] - past.full
    elif isinstance(positions, Tensor) and positions.ndim == 2 and bool(past.removed.any()):
        new = int((positions[0] >= past.full + start).sum())  # without a mask there is no padding to shift them
    if not 0 < new <= width:
        raise ShapeError(
            f"prune: attention_mask and position_ids must go on behind the {past.full} tokens seen before, with up to "
            f"{width} of this call; got {new} new ones. Count all placeholders of pruned images."
        )
    if attention is None:
        attention = torch.ones(tokens.shape[0], new, dtype=torch.bool, device=tokens.device)
    if new < width:
        for name in (*_COLUMNS, "inputs_embeds", "position_ids"):
            values = given.get(name)
            if isinstance(values, Tensor) and values.shape[1] == width:
                given[name] = values[:, -new:]
    return attention[:, -new:], new


def _positions(given: dict[str, Any], past: Past, width: int, device: torch.device, start: int) -> Tensor:
    positions = given.get("position_ids")
    if positions is None:
        return (torch.arange(width, device=device) + (past.full + start))[None]
    if positions.ndim != 2:
        raise ConfigError(
            f"prune: position_ids must have shape (batch, seqlen); got {tuple(positions.shape)}. Positions in several "
            "dimensions cannot be shrunk."
        )
    return positions[:, -width:].to(device)
