"""Pruners that put what they drop into what they keep: VisionZip, PruMerge, PruMerge+.

VisionZip: arXiv 2412.04467.  PruMerge: arXiv 2403.15388.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmkernels.errors import ConfigError, ShapeError, nearest
from mmkernels.ops.token_pruning.budget import ranked
from mmkernels.pruning.pruner import Encoder, Pruned, Tap, TokenPruner, VisionInputs, What, check_count, padded
from mmkernels.pruning.rectangles import per_rectangle
from mmkernels.pruning.scored import needs_cls


@dataclass(frozen=True, kw_only=True, repr=False)
class VisionZip(TokenPruner):
    r"""Keep [CLS] and the patches it attends to; spread C targets over the rest and add to each the mean of its kin.

    Dominant: [CLS] and the D - 1 patches of largest attention in the feature layer.  Of the M patches left, in raster
    order, every floor(M / C)-th is a target (the first C of them); each other goes to the target of largest cosine
    between head-mean keys, and a target with members becomes x_t + the mean of its members (not their average).
    The output is [CLS], dominant patches in raster order, targets in raster order.  Budget: D + C, with [CLS].

    Attributes:
        contextual: C; None: 5/32 of the budget (10 of 64, 20 of 128, 30 of 192, as published).
        score_source: "cls"; or "column" (received attention), with D patches and no [CLS], for encoders without.

    Source: arXiv 2412.04467; checked against the formula.
    """

    contextual: int | None = None
    score_source: Literal["cls", "column"] = "cls"
    name: ClassVar[str] = "visionzip"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.contextual is not None and self.contextual != 0:
            check_count(self.name, "contextual", self.contextual)
        check_source(self.name, self.score_source, ("cls", "column"))

    def taps(self, encoder: Encoder) -> tuple[Tap, ...]:
        """Scores and keys of the feature layer."""
        if self.score_source == "cls":
            needs_cls(self.name, encoder, "score_source", ("column",))
        return Tap(encoder.feature_layer, row_of(self.score_source)), Tap(encoder.feature_layer, "keys")

    def split(self, tokens: int, prefix: int) -> tuple[int, int]:
        """(dominant patches, targets) of an image; [CLS] has been taken off the dominant ones."""
        total = self.count(tokens)
        contextual = math.floor(5 * total / 32 + 0.5) if self.contextual is None else self.contextual
        dominant = total - contextual - prefix
        if dominant < 0:
            raise ShapeError(
                f"{self.name}: contextual must leave room for {'[CLS]' if prefix else 'others'}; got {contextual} "
                f"of {total} tokens. Give a smaller number."
            )
        return dominant, min(contextual, tokens - dominant)

    def __call__(self, inputs: VisionInputs) -> Pruned:
        """Dominant patches, then targets with what they took in."""
        if inputs.mask is not None:
            return per_rectangle(self, inputs)
        x, cls = inputs.features, None
        if self.score_source == "cls":
            cls = inputs.prefix_row(0)
        images, tokens, _ = x.shape
        dominant, targets = self.split(tokens, 0 if cls is None else 1)
        chosen = ranked(only(inputs, row_of(self.score_source)), None)[:, :dominant].sort(-1).values
        left = torch.ones(images, tokens, dtype=torch.bool, device=x.device).scatter(1, chosen, False)
        rest = left.nonzero()[:, 1].view(images, tokens - dominant)
        step = max(1, rest.shape[1] // max(targets, 1))
        at = torch.arange(rest.shape[1], device=x.device)
        is_target = (at % step == 0) & (at // step < targets)
        target, other = rest[:, is_target], rest[:, ~is_target]
        metric = normalize(inputs.patch_keys(only(inputs, "keys")).float().mean(2), dim=-1)
        made, members = add_means(x, metric, target, other)
        rows = [take(x, chosen), made] if cls is None else [cls[:, None], take(x, chosen), made]
        none = chosen.new_full((images, 0 if cls is None else 1), -1)
        indices = torch.cat([none, chosen, target], 1)
        sizes = torch.ones(indices.shape, device=x.device)
        sizes[:, indices.shape[1] - target.shape[1] :] += members
        return Pruned(torch.cat(rows, 1), indices, torch.ones_like(indices, dtype=torch.bool), sizes)


def add_means(x: Tensor, metric: Tensor, target: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """(target rows + mean of their members, members of each): every other row belongs to its most similar target."""
    counts = torch.zeros(target.shape, device=x.device)
    if target.shape[1] == 0 or other.shape[1] == 0:
        return take(x, target), counts
    belongs = (take(metric, other) @ take(metric, target).mT).argmax(-1)  # the first of equal ones
    counts = counts.scatter_add(1, belongs, torch.ones(belongs.shape, device=x.device))
    acc = torch.promote_types(x.dtype, torch.float32)
    sample = torch.arange(len(x), device=x.device)[:, None]
    sums = torch.zeros(*target.shape, x.shape[-1], dtype=acc, device=x.device)
    sums = sums.index_put((sample, belongs), take(x, other).to(acc), accumulate=True)
    means = sums / counts.clamp(min=1)[..., None]
    return (take(x, target).to(acc) + means).to(x.dtype), counts


@dataclass(frozen=True, kw_only=True, repr=False)
class PruMerge(TokenPruner):
    r"""Keep the patches whose attention by [CLS] is an outlier, add to each its kin, and one token for the rest.

    $$c = \mathrm{softmax}(q_{[CLS]} k^T / \sqrt C), \qquad k = \#\{j : c_j > Q_3 + 1.5 \, (Q_3 - Q_1)\}$$
    $$y_i = x_i + \sum_{n \in \mathrm{near}_{32}(i)} c_n x_n, \qquad y_{rest} = \sum_{n \; dropped} c_n x_n$$

    Queries and keys are those of the layer behind the features, their heads joined to C channels; quartiles are
    interpolated linearly; near_32(i) are the 32 other patches (kept or not) of largest cosine between keys.  Kept
    patches come in falling order of c, as in the released program, or in raster order.  Without a budget k is
    each image's own, otherwise the budget counts the token for the rest too.  The released program makes k of a
    rounded ratio, which may lose one: here it is the number of outliers.

    Attributes:
        neighbours: 32.
        order: "score" or "raster".

    Source: arXiv 2403.15388; checked against the formula.
    """

    neighbours: int = 32
    order: Literal["score", "raster"] = "score"
    name: ClassVar[str] = "prumerge"

    def __post_init__(self) -> None:
        if self.budgets():
            super().__post_init__()
        check_count(self.name, "neighbours", self.neighbours)
        if self.order not in ("score", "raster"):
            raise ConfigError(
                f"{self.name}: order must be 'score' or 'raster'; got {self.order!r}. "
                f"{nearest(str(self.order), ('score', 'raster'))}"
            )

    def taps(self, encoder: Encoder) -> tuple[Tap, ...]:
        """Queries of [CLS] and keys of the layer behind the features (the last layer has none behind it)."""
        needs_cls(self.name, encoder, None)
        layer = min(encoder.feature_layer + 1, encoder.num_layers - 1)
        return Tap(layer, "cls_query"), Tap(layer, "keys")

    def kept(self, attention: Tensor) -> list[int]:
        """Which patches of one image stay, in the order of the output; `attention` is its c."""
        best = ranked(attention[None], None)[0].tolist()
        return best[: self.count(len(best)) - 1 if self.budgets() else outliers(attention)]

    def __call__(self, inputs: VisionInputs) -> Pruned:
        """Kept patches with their kin, then the token for the rest."""
        if inputs.mask is not None:
            return per_rectangle(self, inputs)
        x, keys = inputs.features, only(inputs, "keys")
        acc = torch.promote_types(x.dtype, torch.float32)
        attention = joined_attention(only(inputs, "cls_query"), keys, keys.shape[1] - x.shape[1])
        metric = normalize(inputs.patch_keys(keys).flatten(2).float(), dim=-1)
        tokens, indices, sizes = [], [], []
        for row, unit, weight in zip(x.to(acc), metric, attention.to(acc), strict=True):
            chosen = self.kept(weight)
            if self.order == "raster":
                chosen.sort()
            at = torch.tensor(chosen, dtype=torch.int64, device=x.device)
            cosine = (unit[at] @ unit.mT).scatter(1, at[:, None], float("-inf"))
            near = ranked(cosine, None)[:, : min(self.neighbours, len(row) - 1)]
            grown = row[at] + (weight[near][..., None] * row[near]).sum(1)
            dropped = torch.ones(len(row), dtype=acc, device=x.device).index_fill(0, at, 0)
            rest = ((weight * dropped)[:, None] * row).sum(0, keepdim=True)
            tokens.append(torch.cat([grown, rest]).to(x.dtype))
            indices.append(torch.cat([at, at.new_full((1,), -1)]))
            sizes.append(torch.cat([at.new_full((len(at),), 1 + near.shape[1]), (at.new_tensor([len(row) - len(at)]))]))
        return padded(x, tokens, indices, sizes)


@dataclass(frozen=True, kw_only=True, repr=False)
class PruMergePlus(PruMerge):
    """PruMerge with patches at even steps added to the outliers, against blind spots.

    Without a budget: every s-th patch that is no outlier, s = floor(floor(N / k) / 3), at least 1.  In the released
    program the steps end before the last patch, s = 0 (more than a third outliers) is an error, and patches may come
    twice; here none of that.  With a budget of T tokens: a quarter of T - 1 by score, the others at even steps among
    the patches left, and the token for the rest: exactly T.

    Source: arXiv 2403.15388; checked against the formula.
    """

    name: ClassVar[str] = "prumerge_plus"

    def kept(self, attention: Tensor) -> list[int]:
        """Outliers in falling order of c, then steps in raster order."""
        best = ranked(attention[None], None)[0].tolist()
        if self.budgets():
            total = self.count(len(best)) - 1
            top = best[: total // 4]
            rest, count = sorted(best[total // 4 :]), total - total // 4
            return top + [rest[(2 * i + 1) * len(rest) // (2 * count)] for i in range(count)]
        count = outliers(attention)
        step = max(1, len(best) // max(count, 1) // 3)
        top = best[:count]
        return top + [i for i in range(0, len(best), step) if i not in set(top)]


def outliers(attention: Tensor) -> int:
    """How many values lie above the third quartile by more than 1.5 times the distance of the quartiles."""
    low, high = torch.quantile(attention.double(), attention.new_tensor([0.25, 0.75], dtype=torch.float64)).tolist()
    return int((attention.double() > high + 1.5 * (high - low)).sum())


def joined_attention(query: Tensor, keys: Tensor, num_prefix: int) -> Tensor:
    """softmax(q k^T / sqrt(C)) with the heads joined to C channels, over all keys; then without the prefix's."""
    acc = torch.promote_types(keys.dtype, torch.float32)
    q, k = query.flatten(1).to(acc), keys.flatten(2).to(acc)
    return torch.softmax((k @ q[..., None])[..., 0] / math.sqrt(q.shape[1]), dim=-1)[:, num_prefix:]


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of each image."""
    return x[torch.arange(len(x), device=x.device)[:, None], index]


def only(inputs: VisionInputs, what: What) -> Tensor:
    """The one tap of this kind."""
    found = [value for tap, value in inputs.taps.items() if tap.what == what]
    if len(found) != 1:
        raise ConfigError(
            f"VisionInputs: taps must hold {what!r} once; got {len(found)} of them. "
            "Record everything that pruner.taps(encoder) lists, and nothing else."
        )
    return found[0]


def row_of(source: str) -> What:
    """The tap behind a score_source."""
    return "cls_row" if source == "cls" else "column"


def check_source(name: str, source: str, known: tuple[str, ...]) -> None:
    """Refuse an unknown score_source."""
    if source not in known:
        raise ConfigError(
            f"{name}: score_source must be one of {', '.join(known)}; got {source!r}. {nearest(str(source), known)}"
        )
