"""Which columns of a call stay when visual tokens are dropped: ids, masks, labels and positions shrink in step.

Index arithmetic only: nothing here knows a model or a pruner.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mmkernels.errors import ShapeError


@dataclass
class ImageTokens:
    """What one image hands to the decoder in place of all its tokens.

    Attributes:
        tokens: (n, dim), in the order in which the decoder reads them.
        places: (n,) int64 in 0 .. full - 1: whose position a token carries where positions stay original.
        full: placeholders the image has in the prompt.
        patches: (n,) int64: the patch a token came from, crops counted through; -1 for newlines, [CLS], merged rests.
    """

    tokens: Tensor
    places: Tensor
    full: int
    patches: Tensor

    def __post_init__(self) -> None:
        if self.tokens.shape[0] > self.full:
            raise ShapeError(
                f"prune: the pruner must give at most the {self.full} tokens that the image has placeholders for; got "
                f"{self.tokens.shape[0]}. Lower num_keep."
            )

    def slots(self) -> Tensor:
        """(n,) int64, rising: the placeholders that stay, each at its token's place if those are rising themselves."""
        if bool((self.places.diff() > 0).all()):
            return self.places
        return torch.arange(self.places.shape[0], device=self.places.device)


@dataclass(frozen=True)
class Layout:
    """The columns of a narrowed batch.

    Attributes:
        gather: (batch, width) int64, the old column of each new one; -1 at padding.
        mask: (batch, width) bool, False at padding.
        position_ids: (batch, width) int64, 0 at padding.
        removed: (batch, 1) int64, how many tokens of each row went.
    """

    gather: Tensor
    mask: Tensor
    position_ids: Tensor
    removed: Tensor

    def take(self, values: Tensor, fill: float = 0) -> Tensor:
        """(batch, seqlen, ...) to (batch, width, ...), `fill` at padding."""
        index = self.gather.to(values.device)
        tail = (1,) * (values.ndim - 2)
        taken = values.gather(1, index.clamp(min=0).view(*index.shape, *tail).expand(*index.shape, *values.shape[2:]))
        return taken.masked_fill((index < 0).view(*index.shape, *tail), fill)


def narrow(keep: Tensor, mask: Tensor, position_ids: Tensor, *, compact: bool) -> Layout:
    """Drop tokens of a batch and put its rows side by side again.

    Padding goes too as far as rows allow, and stands where it stood: on the right if it stood there only, else on the
    left, where generation wants it.

    Args:
        keep: (batch, seqlen) bool, False for tokens to drop.
        mask: (batch, seqlen) bool, False for padding.
        position_ids: (batch or 1, seqlen) int64, of the unpruned batch.
        compact: count positions anew behind each dropped token; False: leave them.
    """
    inside = (mask.cumsum(1) > 0) & (mask.flip(1).cumsum(1).flip(1) > 0)
    stays, dropped = keep & inside, inside & ~keep
    lengths = stays.sum(1, keepdim=True)
    width = int(lengths.max()) if lengths.numel() else 0
    order = (~stays).to(torch.uint8).argsort(dim=1, stable=True)
    columns = torch.arange(width, device=keep.device)[None]
    right = bool(mask[:, 0].all()) and not bool(mask[:, -1].all()) if mask.numel() else False
    source = columns.expand(lengths.shape[0], -1) if right else columns - (width - lengths)
    real = (source >= 0) & (source < lengths)
    gather = order.gather(1, source.clamp(0, max(keep.shape[1] - 1, 0))).masked_fill(~real, -1)
    positions = position_ids.expand(keep.shape[0], -1)
    if compact:
        positions = positions - dropped.long().cumsum(1)
    layout = Layout(gather, real, positions, dropped.sum(1, keepdim=True))
    return Layout(gather, layout.take(mask, 0) & real, layout.take(positions), layout.removed)


def spread(visual: Tensor, images: list[ImageTokens], position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Which columns of a batch stay for its images, and where each token was.

    Args:
        visual: (batch, seqlen) bool, the placeholders, in the order of the images.
        images: what stands for each image.
        position_ids: (batch or 1, seqlen).

    Returns:
        keep: (batch, seqlen) bool.
        positions: (batch, seqlen) position_ids, those of kept placeholders being those of their tokens' places.

    Raises:
        ShapeError: another number of placeholders than the images have.
    """
    total, found = sum(image.full for image in images), int(visual.sum())
    if total != found:
        raise ShapeError(
            f"prune: input_ids must hold {total} image placeholders, those of {len(images)} whole images; got {found}. "
            "Pass what the processor made: the places of dropped tokens are taken out here. A prompt cut into chunks "
            "(prefill_chunk_size) cannot be pruned."
        )
    device = visual.device
    starts = torch.tensor([0, *(image.full for image in images)], device=device).cumsum(0)
    slots = [image.slots().to(device) + start for image, start in zip(images, starts, strict=False)]
    places = [image.places.to(device) + start for image, start in zip(images, starts, strict=False)]
    stays = torch.zeros(total, dtype=torch.bool, device=device)
    positions = position_ids.expand(visual.shape[0], -1).clone()
    if images:
        stays[torch.cat(slots)] = True
        flat = positions[visual]
        moved = flat.clone()
        moved[torch.cat(slots)] = flat[torch.cat(places)]
        positions[visual] = moved
    keep = ~visual
    keep[visual] = stays
    return keep, positions
