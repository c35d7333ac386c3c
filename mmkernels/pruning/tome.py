"""ToMe: merge tokens that are alike, inside the encoder or behind it.

ToMe: arXiv 2210.09461.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmkernels.errors import ConfigError, ShapeError
from mmkernels.ops.token_pruning.merging import bipartite_soft_matching, merge_tokens
from mmkernels.pruning.merged import only
from mmkernels.pruning.pruner import Encoder, Pruned, Stage, Tap, TokenPruner, VisionInputs, check_count
from mmkernels.pruning.rectangles import per_rectangle


@dataclass(frozen=True, kw_only=True, repr=False)
class ToMe(TokenPruner):
    """In every layer up to the features', between attention and MLP, merge the tokens that are most like another one.

    The metric is the mean over heads of the layer's keys; the prefix stays as it is; attention of the layers behind a
    merge adds log(size) to its logits (proportional attention).  Tokens stay in raster order (the released program puts
    even places before odd ones, which an encoder cannot tell: positions are in the tokens).
    Budget: patches that are left at the end; the layers share the N - T merges evenly.

    Attributes:
        r: instead of a budget, merges in each layer, as published: clamped to half of the patches that are there.

    Source: arXiv 2210.09461, section 3; checked against the formula.
    """

    r: int | None = None
    name: ClassVar[str] = "tome"
    stage: ClassVar[Stage] = "encoder_block"

    def __post_init__(self) -> None:
        if self.r is None:
            super().__post_init__()
            return
        check_count(self.name, "r", self.r)
        if self.budgets():
            raise ConfigError(
                f"{self.name}: r must be left out where {self.budgets()[0]} is given; got {self.r}. "
                "Either says how many tokens stay."
            )

    def schedule(self, encoder: Encoder) -> tuple[int, ...]:
        """How many tokens to merge away in each layer 0 .. feature_layer."""
        tokens, layers = encoder.grid[0] * encoder.grid[1], encoder.feature_layer + 1
        left, plan = tokens, []
        total = 0 if self.r is not None else tokens - self.count(tokens)
        for layer in range(layers):
            r = (
                min(self.r, left // 2)
                if self.r is not None
                else total * (layer + 1) // layers - total * layer // layers
            )
            if r > left // 2:
                raise ShapeError(
                    f"{self.name}: the budget must be reached by halving at most in each of {layers} layers; "
                    f"got {tokens - total} of {tokens} patches. Keep more."
                )
            plan.append(r)
            left -= r
        return tuple(plan)

    def merge(
        self,
        tokens: Tensor,
        keys: Tensor,
        sizes: Tensor | None,
        places: Tensor | None,
        *,
        r: int,
        num_prefix: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One layer's merge, after its attention has been added and before its MLP.

        Args:
            tokens: (images, seqlen, dim), prefix first.
            keys: (images, seqlen, heads, headdim) of this layer's attention.
            sizes: (images, seqlen) of the layer before; None in the first.
            places: (images, seqlen) int64, the patch whose place a token takes, -1 for the prefix; None in the first.
            r: of `schedule`.
            num_prefix: leading tokens that are no patches.

        Returns:
            (tokens, sizes, places) of the next layer, r fewer.
        """
        images, seqlen, _ = tokens.shape
        if places is None:
            at = torch.arange(seqlen, device=tokens.device) - num_prefix
            places = at.clamp(min=-1).expand(images, seqlen)
        plan = bipartite_soft_matching(keys.mean(2), r, protect=num_prefix)
        merged, merged_sizes = merge_tokens(tokens, plan, sizes=sizes)
        return merged, merged_sizes, places.gather(1, plan.keep_indices)

    @staticmethod
    def attention_bias(sizes: Tensor, dtype: torch.dtype) -> Tensor:
        """What attention adds to its logits: log(size) of each key, (images, 1, 1, seqlen)."""
        return sizes.log()[:, None, None].to(dtype)

    def finish(self, tokens: Tensor, sizes: Tensor, places: Tensor, *, num_prefix: int) -> Pruned:
        """The encoder's last tokens as what goes on: the prefix is left out."""
        index = places[:, num_prefix:]
        return Pruned(tokens[:, num_prefix:], index, torch.ones_like(index, dtype=torch.bool), sizes[:, num_prefix:])


@dataclass(frozen=True, kw_only=True, repr=False)
class ToMeAfter(TokenPruner):
    """ToMe's matching and merging on the encoder's output: rounds of at most half the patches, until the budget is met.

    The metric is the mean over heads of the feature layer's keys, merged along with the tokens; the order is raster.  A
    control beside `tome`, for towers whose blocks cannot be changed.  Budget: tokens at the language model's input.

    Source: arXiv 2210.09461, section 3; checked against the formula.
    """

    name: ClassVar[str] = "tome_after"

    def taps(self, encoder: Encoder) -> tuple[Tap, ...]:
        """Keys of the feature layer."""
        return (Tap(encoder.feature_layer, "keys"),)

    def __call__(self, inputs: VisionInputs) -> Pruned:
        """Merge until the budget is met."""
        if inputs.mask is not None:
            return per_rectangle(self, inputs)
        tokens, sizes = inputs.features, None
        metric = inputs.patch_keys(only(inputs, "keys")).mean(2)
        count = self.count(tokens.shape[1])
        places = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape[:2])
        while tokens.shape[1] > count:
            plan = bipartite_soft_matching(metric, min(tokens.shape[1] - count, tokens.shape[1] // 2))
            metric, _ = merge_tokens(metric, plan, sizes=sizes)
            tokens, sizes = merge_tokens(tokens, plan, sizes=sizes)
            places = places.gather(1, plan.keep_indices)
        if sizes is None:
            sizes = torch.ones(places.shape, device=tokens.device)
        return Pruned(tokens, places, torch.ones_like(places, dtype=torch.bool), sizes)
