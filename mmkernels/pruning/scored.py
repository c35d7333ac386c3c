"""Pruners that give every patch a score and keep the best, in raster order: VTC-CLS, FasterVLM and the controls.

VTC-CLS: arXiv 2412.05819.  FasterVLM: arXiv 2412.01818.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mmkernels.errors import ConfigError, nearest
from mmkernels.ops.token_pruning.api import prune_tokens
from mmkernels.pruning.pruner import Encoder, Pruned, Tap, TokenPruner, VisionInputs, What, check_count, check_share
from mmkernels.pruning.rectangles import per_rectangle

ScoreSource = Literal["cls", "probe", "column", "mean_query"]
_ROWS: dict[str, What] = {
    "cls": "cls_row",
    "probe": "probe_row",
    "column": "column",
    "mean_query": "mean_query_row",
}


@dataclass(frozen=True, kw_only=True, repr=False)
class ScorePruner(TokenPruner):
    """Base of pruners that score patches.

    Attributes:
        keep_mass: or the fewest patches that hold this share of the image's (with scope="global", the sample's) scores.
        scope: "image": the budget is each image's (each crop's); "global": it is a sample's, and the crops of the
            sample share it as their scores have it.
    """

    keep_mass: float | None = None
    scope: Literal["image", "global"] = "image"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep_mass is not None:
            check_share(self.name, "keep_mass", self.keep_mass)
        if self.scope not in ("image", "global"):
            raise ConfigError(
                f"{self.name}: scope must be 'image' or 'global'; got {self.scope!r}. "
                f"{nearest(str(self.scope), ('image', 'global'))}"
            )

    def score(self, inputs: VisionInputs) -> Tensor:
        """(images, tokens), larger is better."""
        raise NotImplementedError(f"{type(self).__name__} gives no scores")

    def __call__(self, inputs: VisionInputs) -> Pruned:
        """Keep the best patches of each image, or of each sample, in raster order."""
        scores = self.score(inputs)
        if self.scope == "global":
            return self._prune_samples(inputs, scores)
        kept = prune_tokens(
            inputs.features,
            scores,
            num_keep=self.num_keep,
            keep_ratio=self.keep_ratio,
            keep_mass=self.keep_mass,
            mask=inputs.mask,
        )
        return Pruned(kept.tokens, kept.keep_indices, kept.mask)

    def _prune_samples(self, inputs: VisionInputs, scores: Tensor) -> Pruned:
        images, tokens = scores.shape
        crops = inputs.crops or (1,) * images
        most = max(crops, default=0)
        # Row r of the samples' table is the images of sample r, in order, then padding.
        samples = torch.repeat_interleave(torch.arange(len(crops)), torch.tensor(crops)).to(scores.device)
        places = torch.cat([torch.arange(n) for n in crops] or [torch.empty(0, dtype=torch.int64)]).to(scores.device)
        table = scores.new_zeros(len(crops), most, tokens)
        table[samples, places] = scores.detach()
        real = torch.zeros_like(table, dtype=torch.bool)
        real[samples, places] = True if inputs.mask is None else inputs.mask
        flat = table.flatten(1)
        chosen = prune_tokens(
            flat[..., None],
            flat,
            num_keep=self.num_keep,
            keep_ratio=self.keep_ratio,
            keep_mass=self.keep_mass,
            mask=real.flatten(1),
        )
        stays = torch.zeros_like(flat, dtype=torch.int8).scatter_add(
            1, chosen.keep_indices.clamp(min=0), chosen.mask.to(torch.int8)
        )
        keep = stays.view_as(table)[samples, places] > 0
        width = int(keep.sum(-1).max()) if images else 0
        kept = prune_tokens(inputs.features, scores, num_keep=max(1, width), mask=keep)
        return Pruned(kept.tokens, kept.keep_indices, kept.mask)


@dataclass(frozen=True, kw_only=True, repr=False)
class VTCCLS(ScorePruner):
    r"""Keep the patches that [CLS] attends to in the last layers that feed the language model.

    $$s_j = \sum_{l=f-K+1}^{f} \frac1H \sum_h \mathrm{softmax}_i(q^l_{[CLS] h} \cdot k^l_{ih} / \sqrt d)_j$$

    f is the layer whose output is handed on.  The softmax runs over all keys; layers are not normalised again.
    Budget: tokens at the language model's input.

    Attributes:
        num_layers: K; 3 is the paper's choice, 7 the default of the released program, 1 is FasterVLM.
        score_source: "cls"; for encoders without [CLS]: "probe" (a pooling head's, one row whatever num_layers says),
            "column" (attention received from all tokens), "mean_query" (attention of the mean query).

    Source: arXiv 2412.05819; checked against the formula.
    """

    num_layers: int = 3
    score_source: ScoreSource = "cls"
    name: ClassVar[str] = "vtc_cls"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.name, "num_layers", self.num_layers)
        if self.score_source not in _ROWS:
            raise ConfigError(
                f"{self.name}: score_source must be one of {', '.join(_ROWS)}; got {self.score_source!r}. "
                f"{nearest(str(self.score_source), _ROWS)}"
            )

    def taps(self, encoder: Encoder) -> tuple[Tap, ...]:
        """One row of attention for each scoring layer."""
        if self.score_source == "probe":
            if not encoder.has_probe:
                raise ConfigError(
                    f"{self.name}: score_source must suit the encoder; got 'probe' for an encoder without a pooling "
                    f"head. Use {'cls, ' if encoder.num_prefix else ''}column or mean_query."
                )
            return (Tap(encoder.num_layers - 1, "probe_row"),)
        if self.score_source == "cls":
            needs_cls(self.name, encoder, "score_source")
        return tuple(Tap(layer, _ROWS[self.score_source]) for layer in last_layers(self.name, self.num_layers, encoder))

    def score(self, inputs: VisionInputs) -> Tensor:
        """The sum over layers of what was tapped."""
        what = _ROWS[self.score_source]
        rows = [inputs.taps[tap] for tap in sorted(inputs.taps, key=lambda tap: tap.layer) if tap.what == what]
        expected = 1 if self.score_source == "probe" else self.num_layers
        if len(rows) != expected:
            raise ConfigError(
                f"{self.name}: taps must hold {expected} times {what!r}; got {len(rows)} of them. "
                "Record everything that pruner.taps(encoder) lists, and nothing else."
            )
        return add(rows)


@dataclass(frozen=True, kw_only=True, repr=False)
class FasterVLM(VTCCLS):
    """VTC-CLS with the last scoring layer only: keep the patches that [CLS] attends to in the feature layer.

    The released program projects all patches first and masks afterwards, which is the same: a projector works on each
    token alone.  Budget: tokens at the language model's input.

    Source: arXiv 2412.01818; checked against the formula.
    """

    num_layers: int = 1
    name: ClassVar[str] = "fastervlm"


@dataclass(frozen=True, kw_only=True, repr=False)
class LeastCLS(VTCCLS):
    """A control: VTC-CLS turned upside down, keeps the patches that [CLS] attends to least.  No keep_mass."""

    name: ClassVar[str] = "least_cls"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep_mass is not None:
            raise ConfigError(f"{self.name}: keep_mass must be left out; got {self.keep_mass}. Use num_keep.")

    def score(self, inputs: VisionInputs) -> Tensor:
        """The scores of VTC-CLS, negated."""
        return -super().score(inputs)


@dataclass(frozen=True, kw_only=True, repr=False)
class RandomPruner(ScorePruner):
    """A control: patches drawn without replacement, the same ones for all images of every call with this seed.

    Attributes:
        seed: of the draw.
        per_image: draw anew for each place in the batch; an image's patches then depend on where it stands.
    """

    seed: int = 0
    per_image: bool = False
    name: ClassVar[str] = "random"

    def score(self, inputs: VisionInputs) -> Tensor:
        """Uniform numbers, drawn on the CPU so that every device keeps the same patches."""
        images, tokens, _ = inputs.features.shape
        draw = torch.Generator().manual_seed(self.seed)
        rows = torch.rand(images if self.per_image else 1, tokens, generator=draw)
        return rows.to(inputs.features.device).expand(images, tokens)


@dataclass(frozen=True, kw_only=True, repr=False)
class UniformGrid(TokenPruner):
    """A control: patches spread evenly over the image, the same ones for every image.

    k patches on an H x W grid stand in m = round(sqrt(k H / W)) rows (at least ceil(k / W), at most H and k): row i is
    grid row floor((i + 1/2) H / m) and has c_i = floor((i + 1) k / m) - floor(i k / m) patches, at columns
    floor((j + 1/2) W / c_i).
    """

    name: ClassVar[str] = "uniform"

    def __call__(self, inputs: VisionInputs) -> Pruned:
        """Keep the patches of the grid."""
        images, tokens, _ = inputs.features.shape
        if inputs.mask is not None:
            return per_rectangle(self, inputs)
        indices = torch.tensor(even_grid(self.count(tokens), *inputs.grid), device=inputs.features.device)
        return Pruned(
            inputs.features[:, indices],
            indices.expand(images, -1),
            torch.ones(images, len(indices), dtype=torch.bool, device=indices.device),
        )


def even_grid(count: int, height: int, width: int) -> list[int]:
    """`count` different patches spread evenly over a grid, in raster order."""
    rows = min(max(round(math.sqrt(count * height / width)), math.ceil(count / width)), height, count)
    chosen = []
    for i in range(rows):
        inside = (i + 1) * count // rows - i * count // rows
        row = (2 * i + 1) * height // (2 * rows)
        chosen += [row * width + (2 * j + 1) * width // (2 * inside) for j in range(inside)]
    return chosen


def add(rows: Sequence[Tensor]) -> Tensor:
    """The sum over layers, the lowest first."""
    total = rows[0]
    for row in rows[1:]:
        total = total + row
    return total


def needs_cls(
    name: str, encoder: Encoder, option: str | None, known: tuple[str, ...] = ("probe", "column", "mean_query")
) -> None:
    """Refuse an encoder without [CLS], naming what stands in for it."""
    if encoder.num_prefix == 0:
        able = [proxy for proxy in known if proxy != "probe" or encoder.has_probe]
        remedy = (
            f"Set {option} to {' or '.join(able)}."
            if option
            else "vtc_cls has score_source='probe', 'column' and 'mean_query' for such encoders."
        )
        raise ConfigError(f"{name}: the encoder must have a [CLS] token; got one without prefix tokens. {remedy}")


def last_layers(name: str, count: int, encoder: Encoder) -> range:
    """The `count` layers that end with the feature layer."""
    first = encoder.feature_layer - count + 1
    if first < 0 or encoder.feature_layer >= encoder.num_layers:
        raise ConfigError(
            f"{name}: num_layers must be at most {encoder.feature_layer + 1}, the layers up to the one that hands its "
            f"output on (layer {encoder.feature_layer} of {encoder.num_layers}); got {count}. Give a smaller number."
        )
    return range(first, encoder.feature_layer + 1)
