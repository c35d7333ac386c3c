"""Pruners that drop visual tokens between layers of the language model, by what the prompt attends to there.

FastV: arXiv 2403.06764.  PyramidDrop: arXiv 2410.17247.
"""

import itertools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmkernels.errors import ConfigError, ShapeError
from mmkernels.ops.token_pruning.budget import by_ratio
from mmkernels.pruning.pruner import DecoderPruner, DecoderStep, PositionPolicy, check_count, check_share


@dataclass(frozen=True, kw_only=True, repr=False)
class FastV(DecoderPruner):
    r"""Before layer K, drop the visual tokens that the last prompt token attends to least in layer K - 1.

    $$s_j = \frac1H \sum_h A^{K-1}_{h, last, j}$$

    Kept tokens keep their position ids.  The paper averages over tokens; the released program reads the last row, and
    so does this.  Budget: visual tokens from layer K on; the layers before it read all of them.

    Attributes:
        layer: K, at least 1.

    Source: arXiv 2403.06764; checked against the formula.
    """

    layer: int = 2
    name: ClassVar[str] = "fastv"
    position_policy: ClassVar[PositionPolicy] = "original"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.name, "layer", self.layer)

    def drop_layers(self, num_layers: int) -> dict[int, int]:
        """Before layer K, by layer K - 1."""
        check_layers(self.name, "layer", (self.layer,), num_layers)
        return {self.layer: self.layer - 1}

    def num_visual(self, step: DecoderStep) -> Tensor:
        """The budget, of each sample's own number of tokens."""
        return counts_of(self, step.original_visual)


@dataclass(frozen=True, kw_only=True, repr=False)
class PyramidDrop(DecoderPruner):
    r"""Before some layers, drop the visual tokens that the last prompt token would attend to least in the next layer.

    Before layer l_i, int(n r_i) of the n visual tokens stay, scored by the queries and keys that layer l_i makes of the
    hidden states about to enter it, mean over heads of the causal softmax.  Position ids are counted anew each time.
    Budget: the mean number of visual tokens over all layers.

    Attributes:
        layers: l_i; None: quarters of the decoder (8, 16 and 24 of 32).
        ratios: r_i, a share of the tokens before anything was dropped; None and no budget: 1/2, 1/4, 1/8; with
            num_keep or keep_ratio: r, r^2, r^3, ... with the r that meets the budget.

    Source: arXiv 2410.17247; checked against the formula.
    """

    layers: tuple[int, ...] | None = None
    ratios: tuple[float, ...] | None = None
    name: ClassVar[str] = "pyramiddrop"
    budget: ClassVar = "layer_average"
    position_policy: ClassVar[PositionPolicy] = "compact"

    def __post_init__(self) -> None:
        for option in ("layers", "ratios"):
            if getattr(self, option) is not None:
                object.__setattr__(self, option, tuple(getattr(self, option)))  # a list of a recipe
        if self.budgets():
            super().__post_init__()
            if self.ratios is not None:
                raise ConfigError(
                    f"{self.name}: ratios must be left out where {self.budgets()[0]} is given; got {self.ratios}. "
                    "Either says how many tokens stay."
                )
        for ratio in self.ratios or ():
            check_share(self.name, "ratios", ratio)
        if self.ratios is not None and len(self.ratios) != (3 if self.layers is None else len(self.layers)):
            raise ConfigError(
                f"{self.name}: ratios must name one share for each of "
                f"{self.layers or 'three layers'}; got {self.ratios}. Give as many ratios as layers."
            )

    def drop_layers(self, num_layers: int) -> dict[int, int]:
        """Before each of the layers, by itself."""
        layers = self.layers or tuple(max(1, num_layers * i // 4) for i in (1, 2, 3))
        check_layers(self.name, "layers", layers, num_layers)
        return {layer: layer for layer in layers}

    def shares(self, num_layers: int, visual: int) -> tuple[float, ...]:
        """The ratio of each stage."""
        layers = tuple(self.drop_layers(num_layers))
        if not self.budgets():
            return self.ratios or (0.5, 0.25, 0.125)
        target = self.count(visual) / visual
        spans = [b - a for a, b in zip((0, *layers), (*layers, num_layers), strict=True)]
        if target < spans[0] / num_layers:
            raise ConfigError(
                f"{self.name}: the budget must be at least the {spans[0]} of {num_layers} layers that read all tokens; "
                f"got {target:.3f} of the tokens. Give earlier layers, e.g. layers=({max(1, layers[0] // 2)}, ...)."
            )
        low, high = 0.0, 1.0
        for _ in range(60):  # the mean grows with the ratio
            ratio = (low + high) / 2
            mean = sum(span * ratio**i for i, span in enumerate(spans)) / num_layers
            low, high = (ratio, high) if mean < target else (low, ratio)
        return tuple(high**i for i in range(1, len(spans)))

    def num_visual(self, step: DecoderStep) -> Tensor:
        """int(n r_i) of each sample's own n."""
        stage = list(self.drop_layers(step.num_layers)).index(step.layer)
        counts = [int(n * self.shares(step.num_layers, n)[stage]) if n else 0 for n in step.original_visual.tolist()]
        return torch.tensor(counts, device=step.original_visual.device)


def counts_of(pruner: DecoderPruner, original: Tensor) -> Tensor:
    """How many of each sample's visual tokens its budget keeps; samples without images keep none."""
    counts = []
    for n in original.tolist():
        if pruner.num_keep is not None and n > 0:
            counts.append(pruner.count(n))
        else:
            counts.append(by_ratio(pruner.keep_ratio or 1.0, n) if n > 0 else 0)
    return torch.tensor(counts, dtype=torch.int64, device=original.device)


def check_layers(name: str, option: str, layers: tuple[int, ...], num_layers: int) -> None:
    """Refuse layers that the decoder has not, that come twice, or the 0th, before which nothing can be scored."""
    rising = all(a < b for a, b in itertools.pairwise(layers))
    if not layers or not rising or layers[0] < 1 or layers[-1] >= num_layers:
        raise ShapeError(
            f"{name}: {option} must be rising numbers in 1 .. {num_layers - 1}, the decoder's layers behind the first; "
            f"got {', '.join(map(str, layers)) or 'none'}. Give layers that the decoder has."
        )
