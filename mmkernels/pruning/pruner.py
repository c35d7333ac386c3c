"""What a pruner of visual tokens is: what it asks of the encoder or the decoder, what it gets, what it gives back.

A pruner is a plain, frozen object: options in, no state between calls.  It knows nothing of models; whoever attaches it
(`mmkernels.prune`) records the taps it asks for and puts its result in the place of the image's tokens.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mmkernels.errors import ConfigError, DataError, DtypeError, ShapeError
from mmkernels.ops.token_pruning.budget import by_ratio, ranked

Stage = Literal["encoder_block", "pre_projector", "post_projector", "decoder_layer"]
What = Literal["cls_row", "column", "keys", "cls_query", "probe_row", "mean_query_row"]
PositionPolicy = Literal["original", "compact"]


@dataclass(frozen=True)
class Tap:
    """Something to record while the encoder runs.

    Attributes:
        layer: attention layer of the encoder, counted from 0; of "probe_row", the last one, before the head.
        what: "cls_row", "column", "probe_row", "mean_query_row": attention, (images, tokens) float32, mean over heads,
            softmax over all keys, those of the prefix dropped afterwards.  cls_row: of [CLS]; column: mean over all
            query rows, the prefix's too; probe_row: of a pooling head's probe; mean_query_row: of the mean query.
            "keys": (images, num_prefix + tokens, heads, headdim).  "cls_query": (images, heads, headdim).
    """

    layer: int
    what: What


@dataclass(frozen=True)
class Encoder:
    """The facts about a vision encoder that decide where to tap it.

    Attributes:
        num_layers: attention layers.
        feature_layer: the layer whose output is handed on; for `hidden_states[-2]` of 24 layers, 22.
        num_prefix: leading tokens that are no patches ([CLS] first, then registers).
        grid: (height, width) of the patches.
        has_probe: whether a pooling head with a learned query stands behind the last layer (SigLIP).
    """

    num_layers: int
    feature_layer: int
    num_prefix: int
    grid: tuple[int, int]
    has_probe: bool = False


@dataclass
class VisionInputs:
    """One call's images (each crop of a tiled image counts as one).

    Attributes:
        features: (images, tokens, dim): the patches in raster order; projected ones at stage "post_projector".
        grid: (height, width) with height * width = tokens.
        prefix: (images, num_prefix, dim) of the same layer, or None.
        taps: what the pruner asked for.
        mask: (images, tokens) bool, False for patches that the model drops anyway (unpadding); None: none.
        crops: how many consecutive images belong to each sample, in order; None: one each.
    """

    features: Tensor
    grid: tuple[int, int]
    prefix: Tensor | None = None
    taps: dict[Tap, Tensor] = field(default_factory=dict)
    mask: Tensor | None = None
    crops: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.features.dim() != 3 or self.features.shape[1] != self.grid[0] * self.grid[1]:
            raise ShapeError(
                f"VisionInputs: features must have shape (images, {self.grid[0]} * {self.grid[1]}, dim); "
                f"got {tuple(self.features.shape)}. Leave [CLS] and registers out of them: they go into prefix."
            )
        if self.crops is not None and sum(self.crops) != self.features.shape[0]:
            raise ShapeError(
                f"VisionInputs: crops must add up to the number of images, {self.features.shape[0]}; "
                f"got {self.crops}. Count every crop of each sample, the base image too."
            )

    def tap(self, layer: int, what: What) -> Tensor:
        """What was recorded."""
        if Tap(layer, what) not in self.taps:
            raise ConfigError(
                f"VisionInputs: taps must hold {Tap(layer, what)}; got {sorted(self.taps, key=repr)}. "
                "Record everything that pruner.taps(encoder) lists."
            )
        return self.taps[Tap(layer, what)]

    def prefix_row(self, place: int) -> Tensor:
        """The features of a prefix token, (images, dim)."""
        if self.prefix is None or self.prefix.shape[1] <= place:
            raise ConfigError(
                f"VisionInputs: prefix must hold the features of [CLS]; got "
                f"{'None' if self.prefix is None else tuple(self.prefix.shape)}. This pruner hands them on."
            )
        return self.prefix[:, place]

    def patch_keys(self, keys: Tensor) -> Tensor:
        """Those of patches, out of all."""
        return keys[:, keys.shape[1] - self.features.shape[1] :]


@dataclass
class Pruned:
    """What stands in the place of each image's tokens.

    Attributes:
        tokens: (images, width, dim), zeros at padding, which is last.
        indices: (images, width) int64: the patch whose place a token takes; -1 for [CLS], for a token made of all the
            rest, and for padding.
        mask: (images, width) bool, False at padding.
        sizes: (images, width) float32: how many patches are in each token, 0 at padding; None: one each.
    """

    tokens: Tensor
    indices: Tensor
    mask: Tensor
    sizes: Tensor | None = None


@dataclass(frozen=True, kw_only=True, repr=False)
class TokenPruner:
    """Base of all pruners: a budget, a stage, what to tap, and the pruning itself.

    Attributes:
        num_keep: tokens that stay of each image, or
        keep_ratio: the share of them, the nearest number, halves up, at least 1.
        name: what `get_pruner` calls it.
        stage: where it acts: "encoder_block" (between attention and MLP of every layer), "pre_projector",
            "post_projector", "decoder_layer".
        budget: what the numbers count: "tokens" at the input of the language model, or "layer_average".
    """

    num_keep: int | None = None
    keep_ratio: float | None = None
    name: ClassVar[str] = ""
    stage: ClassVar[Stage] = "pre_projector"
    budget: ClassVar[Literal["tokens", "layer_average"]] = "tokens"

    def __post_init__(self) -> None:
        given = self.budgets()
        if len(given) != 1:
            raise ConfigError(
                f"{self.name}: exactly one of {', '.join(self.budget_options())} must be given; "
                f"got {' and '.join(given) or 'none'}. They are ways to say how many tokens stay."
            )
        if self.num_keep is not None:
            check_count(self.name, "num_keep", self.num_keep)
        if self.keep_ratio is not None:
            check_share(self.name, "keep_ratio", self.keep_ratio)

    @classmethod
    def budget_options(cls) -> tuple[str, ...]:
        """Names of the options of which one must be given."""
        names = {f.name for f in dataclasses.fields(cls)}
        return tuple(name for name in ("num_keep", "keep_ratio", "keep_mass") if name in names)

    def budgets(self) -> list[str]:
        """Which of them are."""
        return [name for name in self.budget_options() if getattr(self, name) is not None]

    def count(self, tokens: int) -> int:
        """How many of an image's tokens stay."""
        if self.num_keep is None:
            if self.keep_ratio is None:
                raise ConfigError(f"{self.name}: num_keep or keep_ratio must be given; got neither. Give one of them.")
            return by_ratio(self.keep_ratio, tokens)
        if self.num_keep > tokens:
            raise ShapeError(
                f"{self.name}: num_keep must be at most the number of tokens, {tokens}; got {self.num_keep}. "
                "To keep all tokens whatever their number, use keep_ratio=1.0."
            )
        return self.num_keep

    def taps(self, encoder: Encoder) -> tuple[Tap, ...]:
        """What to record; an encoder that cannot serve this pruner is an error here, before anything runs."""
        return ()

    def __call__(self, inputs: VisionInputs) -> Pruned:
        """Prune one call's images."""
        raise NotImplementedError(f"{type(self).__name__} does not prune at the vision side")

    def __repr__(self) -> str:
        options = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default
        }
        return f"get_pruner({', '.join([repr(self.name), *(f'{k}={v!r}' for k, v in options.items())])})"


@dataclass
class DecoderStep:
    """A prompt on its way through the decoder, where tokens are to be dropped.

    Attributes:
        layer: the decoder layer that comes next, from 0.
        num_layers: of the decoder.
        scores_row: (batch, seqlen) float32: what `scores` makes of the causal softmax attention of the rows that
            `query_rows` chose, in the layer that `drop_layers` names.
        is_visual: (batch, seqlen) bool.
        mask: (batch, seqlen) bool, False at padding.
        original_visual: (batch,) int64, visual tokens each sample had before anything was dropped.
        hidden_states: (batch, seqlen, dim) that enter `layer`; for pruners that merge.
    """

    layer: int
    num_layers: int
    scores_row: Tensor
    is_visual: Tensor
    mask: Tensor
    original_visual: Tensor
    hidden_states: Tensor | None = None


@dataclass
class RowAttention:
    """Attention of the tokens that score, in the layer that scores.

    Attributes:
        weights: (batch, heads, rows, seqlen) float32: causal softmax over all keys, 0 in rows that are none.
        rows: (batch, rows) bool, False where a sample has fewer rows than others.
        is_visual: (batch, seqlen) bool, False at padding.
        turned_rows: (batch, rows, headdim) float32: a vector of ones, turned by the rotary embedding of each row.
        turned: (batch, seqlen, headdim) the same for every key.
    """

    weights: Tensor
    rows: Tensor
    is_visual: Tensor
    turned_rows: Tensor
    turned: Tensor

    def mean(self) -> Tensor:
        """Over heads and rows, (batch, seqlen)."""
        return self.weights.mean(1).sum(1) / self.rows.sum(1, keepdim=True).clamp(min=1)


@dataclass
class Extras:
    """Tokens that a decoder pruner makes out of those it drops: they go behind the visual tokens that stay.

    Attributes:
        tokens: (batch, width, dim), zeros at padding, which is last.
        mask: (batch, width) bool, False at padding.
        sizes: (batch, width) float32, how many tokens are in each.
    """

    tokens: Tensor
    mask: Tensor
    sizes: Tensor


@dataclass(frozen=True, kw_only=True, repr=False)
class DecoderPruner(TokenPruner):
    """Base of pruners that drop visual tokens between layers of the language model.

    Attributes:
        position_policy: whether tokens keep their "original" position ids behind the drop, or are counted anew
            ("compact").
    """

    stage: ClassVar[Stage] = "decoder_layer"
    position_policy: ClassVar[PositionPolicy] = "original"

    def drop_layers(self, num_layers: int) -> dict[int, int]:
        """Before which decoder layers tokens are dropped, and with whose queries and keys they are scored.

        {l: a}: before layer l, by the attention of layer a, applied to the hidden states that enter layer a: a = l - 1
        is a layer that has run already, a = l the one that comes next.
        """
        raise NotImplementedError(f"{type(self).__name__} names no layers")

    def query_rows(self, embeddings: Tensor, is_visual: Tensor, mask: Tensor) -> Tensor:
        """Which tokens' attention scores: (batch, seqlen) bool; chosen once, on the decoder's input embeddings.

        The tokens are text, which is never dropped, so they are found again in every later layer.  Here: the last
        token that is no padding.
        """
        places = torch.arange(mask.shape[1], device=mask.device)
        last = (places * mask).amax(-1, keepdim=True)
        return (places == last) & mask

    def scores(self, attention: RowAttention) -> Tensor:
        """The score of every token, (batch, seqlen) float32: here the mean over heads and rows."""
        return attention.mean()

    def num_visual(self, step: DecoderStep) -> Tensor:
        """How many visual tokens of each sample stay at this step: (batch,) int64."""
        raise NotImplementedError(f"{type(self).__name__} names no numbers")

    def keep(self, step: DecoderStep) -> Tensor:
        """Which tokens of the current sequence stay: (batch, seqlen) bool.  Text and padding always do."""
        eligible = step.is_visual & step.mask
        return ~eligible | top(step.scores_row, eligible, self.num_visual(step), self.name)

    def merged(self, step: DecoderStep, keep: Tensor) -> Extras | None:
        """Tokens made of the dropped ones; None for pruners that only drop."""
        return None


def top(scores: Tensor, eligible: Tensor, counts: Tensor, name: str) -> Tensor:
    """The `counts[b]` best-scored eligible tokens of each row, ties to the lower index: (batch, seqlen) bool."""
    if not torch.compiler.is_compiling() and bool((scores.isnan() & eligible).any()):
        raise DataError(f"{name}: scores must be numbers; got NaN. Look for infinities in the hidden states.")
    order = ranked(scores.detach(), eligible)
    chosen = torch.arange(scores.shape[1], device=scores.device) < counts[:, None]
    return torch.zeros_like(eligible).scatter(1, order, chosen) & eligible


def padded(like: Tensor, tokens: list[Tensor], indices: list[Tensor], sizes: list[Tensor]) -> Pruned:
    """Images with different numbers of tokens as one Pruned; `like` has the dtype, the device and the dim."""
    if not tokens:
        none = like.new_empty((0, 0), dtype=torch.int64)
        return Pruned(like[:, :0], none, none.bool(), none.float())

    def stacked(rows: list[Tensor], value: float) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    places = torch.arange(max(len(row) for row in tokens), device=like.device)
    counts = torch.tensor([len(row) for row in tokens], device=like.device)
    return Pruned(stacked(tokens, 0), stacked(indices, -1), places < counts[:, None], stacked(sizes, 0).float())


def check_count(name: str, option: str, value: Any) -> None:
    """Refuse what is no int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise DtypeError(f"{name}: {option} must be an int; got {value!r}. For a share of the tokens use keep_ratio.")
    if value < 1:
        raise ConfigError(f"{name}: {option} must be at least 1; got {value}. Without images, call without images.")


def check_share(name: str, option: str, value: Any) -> None:
    """Refuse what is no number in (0, 1]."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DtypeError(f"{name}: {option} must be a number; got {type(value).__name__}. Give one in (0, 1].")
    if not 0 < value <= 1:
        raise ConfigError(f"{name}: {option} must be in (0, 1]; got {value}. 1 keeps everything.")
