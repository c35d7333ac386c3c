"""What `mmkernels.prune` should do, by hand: attention maps written out, prompts put together token by token."""

import copy

import torch
from torch.nn import functional as F

from mmkernels.pruning.pruner import Pruned, TokenPruner

PICTURE = "<image>"
ROWS = [[1, 5, PICTURE, 7, 8, 9], [1, PICTURE, 4, PICTURE, 6, 3, 3, 2], [1, 2, 3, 4]]


def chosen_by_maps(model, pixels, keep, layers):
    """VTC-CLS by the letter: all attention maps, rows of [CLS], sum over layers, sorted top-k."""
    tower = copy.deepcopy(model.model.vision_tower)
    tower.set_attn_implementation("eager")
    out = tower(pixels, output_attentions=True, output_hidden_states=True)
    last = len(out.attentions) + model.config.vision_feature_layer
    scores = sum(out.attentions[layer].mean(1)[:, 0, 1:] for layer in range(last - layers + 1, last + 1))
    kept = [sorted(row.argsort(descending=True)[:keep].tolist()) for row in scores]
    return kept, out.hidden_states[model.config.vision_feature_layer][:, 1:]


def by_hand(model, row, images):
    """Embeddings of one prompt, with (tokens, dim) in the place of each image."""
    table, parts, images = model.get_input_embeddings(), [], list(images)
    for part in row:
        parts.append(images.pop(0) if part == PICTURE else table(torch.tensor([part])))
    return torch.cat(parts)[None]


class WithExtras(TokenPruner):
    """Tokens out of order, one of no patch at each end, fewer of them for the second image."""

    name = "with_extras"

    def __call__(self, inputs):
        images = inputs.features.shape[0]
        indices = torch.tensor([[-1, 9, 4, -1]]).repeat(images, 1)
        mask = torch.ones_like(indices, dtype=torch.bool)
        mask[1:2, 3] = False
        tokens = inputs.features[:, [0, 9, 4, 2]] * mask[..., None]
        tokens[:, 0] = inputs.prefix[:, 0]
        return Pruned(tokens, indices, mask)


def stitched(height, width):
    """LLaVA-NeXT's rule for an image in two 4 x 4 tiles side by side: (tile, patch) of each place, None at newlines."""
    inside = min(8, int(round(width * 4 / height, 7)))
    margin = (8 - inside) // 2
    base = [(0, p) for p in range(16)]
    rows = [[*((1 + x // 4, y * 4 + x % 4) for x in range(margin, 8 - margin)), None] for y in range(4)]
    return base + [place for row in rows for place in row]


def merged_by_hand(tower, pixels, counts):
    """ToMe in loops: one image, `counts[l]` merges in layer l, the last layers left out."""
    x = tower(pixels, output_hidden_states=True).hidden_states[0][0]
    sizes = torch.ones(len(x))
    for layer, r in zip(tower.encoder.layers, counts, strict=False):
        at, normed = layer.self_attn, layer.layer_norm1(x)
        q, k, v = (p(normed).unflatten(-1, (4, 8)) for p in (at.q_proj, at.k_proj, at.v_proj))
        weights = (torch.einsum("qhd,khd->hqk", q, k) * 8**-0.5 + sizes.log()).softmax(-1)
        x = x + at.out_proj(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
        metric = F.normalize(k.mean(1), dim=-1)
        evens, odds = range(2, len(x), 2), range(1, len(x), 2)  # [CLS] is at an even place, and protected
        links = []
        for a in evens:
            best = max(odds, key=lambda b: float(metric[a] @ metric[b]))
            links.append((float(metric[a] @ metric[best]), a, best))
        gone = sorted(links, reverse=True)[:r]
        sums, total = x * sizes[:, None], sizes.clone()
        for _, a, b in gone:
            sums[b] += sums[a]
            total[b] += total[a]
        stay = [i for i in range(len(x)) if i not in {a for _, a, _ in gone}]
        x, sizes = (sums / total[:, None])[stay], total[stay]
        x = x + layer.mlp(layer.layer_norm2(x))
    return x[1:]


class Slow:
    """One sample through a Llama or Qwen3, with the whole attention map of every layer, and tokens dropped by rule."""

    def __init__(self, model, drops, compact, gone=0):
        self.model, self.drops, self.compact = model, drops, compact
        self.gone = gone  # tokens that are missing already, whose positions nobody else has taken
        self.layers = model.model.language_model.layers
        self.keys = [[] for _ in self.layers]  # (key, value) of each token a layer has seen
        self.removed = [0] * len(self.layers)

    def turn(self, x, position):
        """Rotary embedding of one head, (headdim,), at one position."""
        half = x.shape[-1] // 2
        angles = position / 10000 ** (torch.arange(half) / half)
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)

    def project(self, layer, x, positions):
        at, normed = layer.self_attn, layer.input_layernorm(x)
        q, k, v = (p(normed).unflatten(-1, (-1, at.head_dim)) for p in (at.q_proj, at.k_proj, at.v_proj))
        if hasattr(at, "q_norm"):
            q, k = at.q_norm(q), at.k_norm(k)
        q = torch.stack([self.turn(row, p) for row, p in zip(q, positions, strict=True)])
        k = torch.stack([self.turn(row, p) for row, p in zip(k, positions, strict=True)])
        return q, k, v

    def maps(self, layer, q, k):
        """(heads, rows, keys), the rows being the last ones."""
        at = layer.self_attn
        k = k.repeat_interleave(at.num_key_value_groups, dim=1)
        logits = torch.einsum("qhd,khd->hqk", q, k) * at.scaling
        rows, keys = logits.shape[1:]
        later = torch.arange(keys)[None] > torch.arange(keys - rows, keys)[:, None]
        return logits.masked_fill(later, -torch.inf).softmax(-1)

    def run(self, x, positions, visual=None, last=-1):
        """Hidden states of new tokens; with `visual` (bool list), a prompt whose tokens are dropped."""
        positions, original = list(positions), sum(visual or [])
        scores, start = None, len(self.keys[0])
        columns = list(range(len(positions)))
        for index, layer in enumerate(self.layers):
            if visual is not None and index in self.drops:
                scoring, count = self.drops[index]
                if scoring == index:
                    q, k, _ = self.project(layer, x, positions)
                    scores = self.maps(layer, q, k).mean(0)[columns.index(last)]
                ranked = sorted((c for c in range(len(x)) if visual[c]), key=lambda c: -float(scores[c]))
                kept = set(ranked[: count(original)])
                stay = [c for c in range(len(x)) if not visual[c] or c in kept]
                x, visual = x[stay], [visual[c] for c in stay]
                columns = [columns[c] for c in stay]
                positions = list(range(len(stay))) if self.compact else [positions[c] for c in stay]
                for later in range(index, len(self.layers)):
                    self.removed[later] += len(scores) - len(stay)
            elif visual is None:
                anew = self.compact and self.removed[index] > 0
                shift = self.removed[index] if anew else -self.gone
                positions = range(start - shift, start - shift + len(x))
            q, k, v = self.project(layer, x, positions)
            self.keys[index] += list(zip(k, v, strict=True))
            keys, values = (torch.stack(t) for t in zip(*self.keys[index], strict=True))
            weights = self.maps(layer, q, keys)
            if visual is not None:
                scores = weights.mean(0)[columns.index(last)]
            values = values.repeat_interleave(layer.self_attn.num_key_value_groups, dim=1)
            x = x + layer.self_attn.o_proj(torch.einsum("hqk,khd->qhd", weights, values).flatten(1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        self.columns = columns
        return self.model.lm_head(self.model.model.language_model.norm(x))


def embeddings(model, row, pixels):
    """Embeddings of a prompt, and which of them are visual."""
    table, parts, visual = model.get_input_embeddings(), [], []
    images = list(model.model.get_image_features(pixels).pooler_output) if len(pixels) else []
    for part in row:
        parts.append(images.pop(0) if part == PICTURE else table(torch.tensor([part])))
        visual += [part == PICTURE] * len(parts[-1])
    return torch.cat(parts), visual
