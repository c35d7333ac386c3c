"""Pruners that look for patches unlike each other, or in more than one layer: VisPruner, DivPrune, HiPrune.

VisPruner: arXiv 2412.01818.  DivPrune: arXiv 2503.02175.  HiPrune: arXiv 2508.00553.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmkernels.errors import ConfigError
from mmkernels.ops.token_pruning.budget import ranked
from mmkernels.pruning.merged import check_source, only, row_of, take
from mmkernels.pruning.pruner import Encoder, Pruned, Stage, Tap, TokenPruner, VisionInputs, check_count, check_share
from mmkernels.pruning.rectangles import per_rectangle
from mmkernels.pruning.scored import needs_cls


@dataclass(frozen=True, kw_only=True, repr=False)
class VisPruner(TokenPruner):
    """Keep the patches [CLS] attends to, and of the rest those that are unlike each other.

    int(T important_ratio) patches stay by attention in the feature layer.  The rest stands in falling order of it;
    in each round its even places are matched to the odd place of largest cosine between features, and the 8 of them (or
    as many as are still too many) with the largest cosine go; those that stay come next in falling order of it, then
    the odd places.  Kept patches are in raster order.  The released program fails for odd numbers of rest patches; here
    every number works.  Budget: tokens at the language model's input.

    Attributes:
        important_ratio: 1/2.
        score_source: "cls", or "column" (received attention) for encoders without.

    Source: arXiv 2412.01818; checked against the formula.
    """

    important_ratio: float = 0.5
    score_source: Literal["cls", "column"] = "cls"
    name: ClassVar[str] = "vispruner"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.name, "important_ratio", self.important_ratio)
        check_source(self.name, self.score_source, ("cls", "column"))

    def taps(self, encoder: Encoder) -> tuple[Tap, ...]:
        """Attention of the feature layer."""
        if self.score_source == "cls":
            needs_cls(self.name, encoder, "score_source", ("column",))
        return (Tap(encoder.feature_layer, row_of(self.score_source)),)

    def __call__(self, inputs: VisionInputs) -> Pruned:
        """Important and diverse patches, in raster order."""
        if inputs.mask is not None:
            return per_rectangle(self, inputs)
        x = inputs.features
        total = self.count(x.shape[1])
        important = int(total * self.important_ratio)
        order = ranked(only(inputs, row_of(self.score_source)), None)
        chosen, rest = order[:, :important], order[:, important:]
        unit = normalize(x.float(), dim=-1)
        if total == important:
            rest = rest[:, :0]
        while rest.shape[1] > total - important:
            even, odd = rest[:, ::2], rest[:, 1::2]
            redundancy = (take(unit, even) @ take(unit, odd).mT).amax(-1)
            drop = min(8, rest.shape[1] - (total - important))
            rest = torch.cat([even.gather(1, ranked(redundancy, None)[:, drop:]), odd], 1)
        return in_raster_order(x, torch.cat([chosen, rest], 1))


@dataclass(frozen=True, kw_only=True, repr=False)
class DivPrune(TokenPruner):
    r"""Keep patches that are far from each other, greedily: a 2-approximation of the max-min distance problem.

    $$d_{ij} = 1 - \cos(x_i, x_j), \qquad i_1 = \arg\max_i \min_{j \ne i} d_{ij}, \qquad
    i_{n+1} = \arg\max_i \min_{m \le n} d_{i i_m}$$

    On projected tokens; of equal distances the lower index wins; the order is raster.  Budget: tokens at the language
    model's input (published: keep_ratio=0.098).

    Source: arXiv 2503.02175; checked against the formula.
    """

    name: ClassVar[str] = "divprune"
    stage: ClassVar[Stage] = "post_projector"

    def __call__(self, inputs: VisionInputs) -> Pruned:
        """Pick one patch after the other."""
        if inputs.mask is not None:
            return per_rectangle(self, inputs)
        x = inputs.features
        images, tokens, _ = x.shape
        unit = normalize(x.detach().float(), dim=-1)
        distance = 1 - unit @ unit.mT
        sample = torch.arange(images, device=x.device)
        alone = distance + torch.diag(torch.full((tokens,), math.inf, device=x.device))
        chosen = [alone.amin(-1).argmax(-1)]  # the first of equal ones
        closest = distance[sample, chosen[0]]
        for _ in range(self.count(tokens) - 1):
            closest = closest.scatter(1, chosen[-1][:, None], -math.inf)
            chosen.append(closest.argmax(-1))
            closest = torch.minimum(closest, distance[sample, chosen[-1]])
        return in_raster_order(x, torch.stack(chosen, 1))


@dataclass(frozen=True, kw_only=True, repr=False)
class HiPrune(TokenPruner):
    """Keep anchors of a middle layer with their neighbours, and fill up by a late layer.

    Scores are received attention (mean over heads and all query rows).  Of T tokens, round(T alpha / 5) anchors are the
    best of the middle layer (at most T // 5, so that the budget holds), each with its left, right, upper and lower
    neighbour on the grid; the best of the feature layer among the others fill up.  The released program wraps around
    at the ends of rows and knows one grid width; here neighbours end at the edge.  The order is raster.
    Budget: tokens at the language model's input.

    Attributes:
        alpha: the share of anchors and neighbours, in (0, 1].
        layer: the middle layer, from 0; None: the one before 3/8 of all (8 of 24).

    Source: arXiv 2508.00553; checked against the formula.
    """

    alpha: float = 0.1
    layer: int | None = None
    name: ClassVar[str] = "hiprune"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.name, "alpha", self.alpha)
        if self.layer is not None and self.layer != 0:
            check_count(self.name, "layer", self.layer)

    def taps(self, encoder: Encoder) -> tuple[Tap, ...]:
        """Columns of the middle layer and of the feature layer."""
        layer = max(0, round(encoder.num_layers * 3 / 8) - 1) if self.layer is None else self.layer
        if layer >= encoder.feature_layer:
            raise ConfigError(
                f"{self.name}: layer must be before layer {encoder.feature_layer}, whose output is handed on; "
                f"got {layer}. Give a smaller number."
            )
        return Tap(layer, "column"), Tap(encoder.feature_layer, "column")

    def __call__(self, inputs: VisionInputs) -> Pruned:
        """Anchors, neighbours, and the best of the rest."""
        if inputs.mask is not None:
            return per_rectangle(self, inputs)
        columns = [value for _, value in sorted(inputs.taps.items(), key=lambda item: item[0].layer)]
        if len(columns) != 2:
            raise ConfigError(
                f"{self.name}: taps must hold the columns of two layers; got {len(columns)}. "
                "Record everything that pruner.taps(encoder) lists, and nothing else."
            )
        middle, late = columns
        x = inputs.features
        total = self.count(x.shape[1])
        count = min(math.floor(total * self.alpha / 5 + 0.5), total // 5)
        anchors = torch.zeros(middle.shape, dtype=torch.bool, device=x.device)
        anchors = anchors.scatter(1, ranked(middle, None)[:, :count], True).unflatten(1, inputs.grid)
        wide = torch.nn.functional.pad(anchors, (1, 1, 1, 1))
        near = wide[:, 1:-1, 1:-1] | wide[:, :-2, 1:-1] | wide[:, 2:, 1:-1] | wide[:, 1:-1, :-2] | wide[:, 1:-1, 2:]
        # What is near an anchor comes first, then the late layer decides.
        chosen = ranked(late.masked_fill(near.flatten(1), math.inf), None)[:, :total]
        return in_raster_order(x, chosen)


def in_raster_order(x: Tensor, chosen: Tensor) -> Pruned:
    """The chosen patches, copied."""
    indices = chosen.sort(-1).values
    return Pruned(take(x, indices), indices, torch.ones_like(indices, dtype=torch.bool))
