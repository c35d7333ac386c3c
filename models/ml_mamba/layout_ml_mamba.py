"""Image first: what the language model reads of a batch of rows with and without an image, padded anywhere.

Source: the sequence layout of ML-Mamba's released code: image embeddings, then text, no placeholder and no separator.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageFirst:
    """One batch, every row as [its image | its text | padding].

    Args:
        embeds: (batch, images + seqlen, hidden).
        mask: (batch, images + seqlen) bool, False for padding; None when there is none.
        places: (batch, seqlen + 1): [:, 0] where the text is entered from, the image's last embedding, and [:, 1 + t]
            the last token that is not padding up to column t of the text; -1 where nothing precedes.
    """

    embeds: Tensor
    mask: Tensor | None
    places: Tensor


def image_first(
    text: Tensor, mask: Tensor | None = None, images: Tensor | None = None, has_image: Tensor | None = None
) -> ImageFirst:
    """Lay a batch out: each row's image in front of its text, padding out of the way.

    Args:
        text: (batch, seqlen, hidden) embeddings.
        mask: (batch, seqlen), 0 = padding, anywhere.
        images: (images, tokens, hidden), one for each row that has one, in order.
        has_image: (batch,) bool; None: every row has one, if there are images.

    Returns:
        See `ImageFirst`.  A row's real tokens stand in front, so what it computes depends on nothing else.

    Example:
        >>> row = image_first(torch.zeros(1, 3, 4), torch.tensor([[0, 1, 1]]), torch.ones(1, 2, 4))
        >>> row.places.tolist(), row.mask.int().tolist()
        ([[1, 1, 2, 3]], [[1, 1, 1, 1, 0]])
    """
    batch, seqlen, _ = text.shape
    real = torch.ones(batch, seqlen, dtype=torch.bool, device=text.device) if mask is None else mask != 0
    embeds, keep = text, real
    ahead = text.new_zeros(batch, 1, dtype=torch.long)
    if images is not None:
        having = torch.ones(batch, dtype=torch.bool, device=text.device) if has_image is None else has_image
        front = text.new_zeros(batch, images.shape[1], text.shape[2])
        front[having] = images.to(text.dtype)
        embeds = torch.cat([front, text], 1)
        keep = torch.cat([having[:, None].expand(-1, images.shape[1]), real], 1)
        ahead = having[:, None].long() * images.shape[1]
    places = torch.cat([ahead, ahead + real.long().cumsum(1)], 1) - 1
    if bool(keep.all()):
        return ImageFirst(embeds, None, places)
    order = torch.argsort(~keep, dim=1, stable=True)
    packed = embeds.gather(1, order[..., None].expand_as(embeds))
    return ImageFirst(packed, keep.gather(1, order), places)
