"""Images of which a rectangle counts, the rest being padding: pruned as if the rectangle were the image."""

import dataclasses

import torch
from torch import Tensor

from mmkernels.errors import ConfigError
from mmkernels.pruning.pruner import Pruned, TokenPruner, VisionInputs, padded


def per_rectangle(pruner: TokenPruner, inputs: VisionInputs) -> Pruned:
    """Call a pruner that takes whole grids once for each image, with the rectangle that `inputs.mask` leaves of it.

    Budgets count the tokens of the rectangle; where it has fewer than `num_keep`, it keeps them all.  Scores stay
    those of the whole image: attention is not renormalised.

    Raises:
        ConfigError: the mask leaves something else than a rectangle.
    """
    assert inputs.mask is not None
    x = inputs.features
    tokens, indices, sizes = [], [], []
    for i, mask in enumerate(inputs.mask.unflatten(1, inputs.grid)):
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        where = (rows[:, None] * inputs.grid[1] + columns).flatten()
        whole = _is_run(rows) and _is_run(columns) and int(mask.sum()) == len(where)
        if not whole:
            raise ConfigError(
                f"{pruner.name}: mask must leave a rectangle of each image; got another shape for image {i}. "
                "Use a pruner that scores patches, such as vtc_cls, or leave the mask out."
            )
        if len(where) == 0:
            pruned = Pruned(x[i : i + 1, :0], where[None], where[None].bool())
        else:
            few = pruner.num_keep is not None and pruner.num_keep > len(where)
            able = dataclasses.replace(pruner, num_keep=len(where)) if few else pruner
            pruned = able(_part(inputs, i, where, (len(rows), len(columns))))
        place = pruned.indices[0]
        tokens.append(pruned.tokens[0])
        indices.append(torch.where(place >= 0, where[place.clamp(min=0)], -1) if len(where) else place)
        sizes.append(torch.ones_like(place) if pruned.sizes is None else pruned.sizes[0])
    return padded(x, tokens, indices, sizes)


def _is_run(places: Tensor) -> bool:
    return len(places) == 0 or int(places[-1] - places[0]) == len(places) - 1


def _part(inputs: VisionInputs, image: int, where: Tensor, grid: tuple[int, int]) -> VisionInputs:
    """The rectangle `where` of one image, with what was tapped of it."""
    one = slice(image, image + 1)
    taps = {}
    for tap, value in inputs.taps.items():
        if tap.what == "cls_query":
            taps[tap] = value[one]
        elif tap.what == "keys":
            prefix = value.shape[1] - inputs.features.shape[1]
            taps[tap] = torch.cat([value[one, :prefix], inputs.patch_keys(value)[one][:, where]], 1)
        else:
            taps[tap] = value[one][:, where]
    prefix_rows = None if inputs.prefix is None else inputs.prefix[one]
    return VisionInputs(inputs.features[one][:, where], grid, prefix_rows, taps)
