"""SparseVLM: text tokens that know the image choose what stays of it, and what goes is gathered in a few tokens.

SparseVLM: arXiv 2410.04417.  SparseVLM+ is the second version of its released program.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmkernels.errors import ConfigError, DataError
from mmkernels.ops.token_pruning.budget import ranked
from mmkernels.pruning.in_decoder import check_layers
from mmkernels.pruning.pruner import DecoderPruner, DecoderStep, Extras, PositionPolicy, RowAttention, check_count

# (budget, tokens kept by the three stages) of 576, as published.
Table = tuple[tuple[int, tuple[int, int, int]], ...]
_PUBLISHED: Table = ((64, (66, 30, 17)), (128, (303, 110, 36)), (192, (300, 200, 110)), (576, (576, 576, 576)))
_PLUS: Table = (
    (64, (66, 34, 20)),
    (96, (246, 54, 28)),
    (128, (238, 108, 60)),
    (192, (300, 200, 118)),
    (576, (576, 576, 576)),
)


@dataclass(frozen=True, kw_only=True, repr=False)
class SparseVLM(DecoderPruner):
    r"""Before some layers, drop the visual tokens that the raters attend to least, and re-use what is dropped.

    Raters, chosen once on the decoder's input embeddings: the text tokens t behind the image with

    $$\frac1{|V|} \sum_{v \in V} \mathrm{softmax}_t(v \cdot t) > \mathrm{mean}_t$$

    A visual token's score is the mean over heads and raters of their causal attention in the layer that has just run.
    Of n visual tokens min(count, n - 1) stay; the best int(0.3 dropped) + 1 of the others become int(that / 10) + 1
    clusters (density peaks), whose means go behind the visual tokens that stay.  Position ids are counted anew.
    The released program breaks ties of density with random noise; here the lower index is the denser.  Where no text
    token is above the mean (they are equal, or there is one), all rate.  Budget: the mean number over all layers of the
    visual tokens that were kept; merged ones come on top.

    Attributes:
        kept: how many visual tokens stay at each stage, instead of a budget.  With a budget, as published: 192:
            (300, 200, 110), 128: (303, 110, 36), 64: (66, 30, 17) of 576 tokens; between them, and for other
            numbers of tokens, shares are interpolated.
        layers: before which to drop; None: 3, 7 and 16 of 32, others in proportion.

    Source: arXiv 2410.04417, version 1 (with merging); checked against the formula.
    """

    kept: tuple[int, ...] | None = None
    layers: tuple[int, ...] | None = None
    name: ClassVar[str] = "sparsevlm"
    published: ClassVar[Table] = _PUBLISHED
    budget: ClassVar = "layer_average"
    position_policy: ClassVar[PositionPolicy] = "compact"

    def __post_init__(self) -> None:
        for option in ("kept", "layers"):
            if getattr(self, option) is not None:
                object.__setattr__(self, option, tuple(getattr(self, option)))  # a list of a recipe
        stages = 3 if self.layers is None else len(self.layers)
        if self.kept is None:
            super().__post_init__()
        elif self.budgets():
            raise ConfigError(
                f"{self.name}: kept must be left out where {self.budgets()[0]} is given; got {self.kept}. "
                "Either says how many tokens stay."
            )
        for count in self.kept or ():
            check_count(self.name, "kept", count)
        if stages != (3 if self.kept is None else len(self.kept)):
            raise ConfigError(
                f"{self.name}: kept must name one number for each of {stages} layers; got {self.kept}. "
                "Budgets are known for three stages."
            )

    def drop_layers(self, num_layers: int) -> dict[int, int]:
        """Before each of the layers, by the one that has just run."""
        layers = self.layers
        if layers is None:
            made: list[int] = []
            for published in (3, 7, 16):
                made.append(max(made[-1] + 1 if made else 1, round(published * num_layers / 32)))
            layers = tuple(made)
        check_layers(self.name, "layers", layers, num_layers)
        return {layer: layer - 1 for layer in layers}

    def query_rows(self, embeddings: Tensor, is_visual: Tensor, mask: Tensor) -> Tensor:
        """The raters."""
        places = torch.arange(mask.shape[1], device=mask.device)
        last_visual = torch.where(is_visual & mask, places, -1).amax(-1, keepdim=True)
        text = mask & ~is_visual & (places > last_visual) & (last_visual >= 0)
        raters = torch.zeros_like(mask)
        for b in range(len(mask)):
            if last_visual[b] < 0:
                continue  # a sample without images
            if not text[b].any():
                raise DataError(
                    f"{self.name}: the prompt must have text behind the image; got none in sample {b}. "
                    "Put the question last: its tokens rate the image's."
                )
            v, t = embeddings[b, is_visual[b] & mask[b]].float(), embeddings[b, text[b]].float()
            relation = (v @ t.mT).softmax(-1).mean(0)
            above = relation > relation.mean()
            raters[b, text[b]] = above if bool(above.any()) else torch.ones_like(above)
        return raters

    def count_at(self, stage: int, visual: int) -> int:
        """How many of the `visual` tokens a sample had at first stay at a stage, before the limit n - 1."""
        if self.kept is not None:
            return self.kept[stage]
        share = self.count(visual) / visual
        low, low_share = 0.0, 0.0
        for budget, counts in self.published:
            high, high_share = budget / 576, counts[stage] / 576
            if share <= high:
                here = low_share + (high_share - low_share) * (share - low) / (high - low)
                return max(1, math.floor(visual * here + 0.5))
            low, low_share = high, high_share
        return visual

    def num_visual(self, step: DecoderStep) -> Tensor:
        """min(count, n - 1) of the n visual tokens that are there."""
        stage = list(self.drop_layers(step.num_layers)).index(step.layer)
        present = (step.is_visual & step.mask).sum(-1)
        counts = [self.count_at(stage, n) if n else 0 for n in step.original_visual.tolist()]
        return torch.minimum(torch.tensor(counts, device=present.device), (present - 1).clamp(min=0))

    def merged(self, step: DecoderStep, keep: Tensor) -> Extras | None:
        """Means of the clusters among the best of what is dropped."""
        if step.hidden_states is None:
            raise ConfigError(f"{self.name}: hidden_states must be given; got None. Merging takes means of them.")
        rows, sizes = [], []
        for b in range(len(keep)):
            dropped = (~keep[b]).nonzero()[:, 0]
            if len(dropped) == 0:
                rows.append(step.hidden_states[b, :0])
                sizes.append(step.scores_row[b, :0])
                continue
            best = ranked(step.scores_row[b, dropped][None].detach(), None)[0][: int(0.3 * len(dropped)) + 1]
            x = step.hidden_states[b, dropped[best]]
            belongs, clusters = density_peaks(x, int(len(x) / 10) + 1)
            count = torch.bincount(belongs, minlength=clusters).to(torch.float32)
            sums = torch.zeros(clusters, x.shape[1], device=x.device).index_add(0, belongs, x.float())
            rows.append((sums / count[:, None]).to(x.dtype))
            sizes.append(count)
        pad = torch.nn.utils.rnn.pad_sequence
        counts = torch.tensor([len(row) for row in rows], device=keep.device)
        tokens = pad(rows, batch_first=True)
        mask = torch.arange(tokens.shape[1], device=keep.device) < counts[:, None]
        return Extras(tokens, mask, pad(sizes, batch_first=True))


@dataclass(frozen=True, kw_only=True, repr=False)
class SparseVLMPlus(SparseVLM):
    r"""SparseVLM with attention freed from its decay over distance, and with the heads that look at the image.

    Raters as in SparseVLM.  With A the causal softmax attention of a head in the layer that has just run, d its width,
    and R_p the rotation of the rotary embedding at position p,

    $$G_{ij} = \frac{(R_{p_i} \mathbf 1) \cdot (R_{p_j} \mathbf 1)}{\sqrt d}, \qquad
      B^h_{ij} = A^h_{ij} / G_{ij}, \qquad s_j = \mathrm{mean}_{h \in T} \mathrm{mean}_{i \in raters} B^h_{ij}$$

    where T are the `heads` heads with the largest sum of B over raters and visual tokens.  Of n visual tokens
    min(count, n - 1) stay; what goes is gone: nothing is merged, and position ids stay as they were.
    G changes its sign with the distance in models whose rotation turns far; the released program divides all the same,
    and so does this.  Budget: the mean number of visual tokens over all layers.

    Attributes:
        heads: how many heads score, 14 as published (of 32); all of a layer that has no more.

    Source: the released program's version 2.0, by its published tables of budgets; checked against the formula.
    """

    heads: int = 14
    name: ClassVar[str] = "sparsevlm_plus"
    published: ClassVar[Table] = _PLUS
    position_policy: ClassVar[PositionPolicy] = "original"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.name, "heads", self.heads)

    def scores(self, attention: RowAttention) -> Tensor:
        """B of the heads in T, mean over heads and raters."""
        gravity = attention.turned_rows @ attention.turned.mT / math.sqrt(attention.turned.shape[-1])
        visual = attention.is_visual[:, None, None]
        freed = (attention.weights / gravity[:, None]).masked_fill(~visual, 0).sum(2)  # (batch, heads, seqlen)
        heads = min(self.heads, freed.shape[1])
        best = ranked(freed.sum(-1), None)[:, :heads]
        chosen = freed.gather(1, best[..., None].expand(-1, -1, freed.shape[2]))
        return chosen.mean(1) / attention.rows.sum(1, keepdim=True).clamp(min=1)

    def merged(self, step: DecoderStep, keep: Tensor) -> None:
        """Nothing."""
        return None


def density_peaks(x: Tensor, clusters: int) -> tuple[Tensor, int]:
    """(cluster of each row, number of clusters): DPC-kNN, centres first to last by density times distance.

    Distances are over sqrt(dim); density is exp(-mean of the `clusters` smallest squared distances, the own 0 with
    them); a row counts by its distance to the nearest denser one, the densest by the largest distance of all.
    """
    points = x.detach().float()
    distance = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist") / math.sqrt(x.shape[1])
    density = (-distance.topk(clusters, largest=False).values.square().mean(-1)).exp()
    place = torch.arange(len(x), device=x.device)
    denser = (density > density[:, None]) | ((density == density[:, None]) & (place < place[:, None]))
    parent = torch.where(denser, distance, distance.amax()).amin(-1)
    centres = ranked((parent * density)[None], None)[0][:clusters]
    belongs = distance[:, centres].argmin(-1)  # the first of equal ones
    return belongs.index_put((centres,), torch.arange(clusters, device=x.device)), clusters
