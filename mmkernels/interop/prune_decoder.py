"""Drop visual tokens between layers of a decoder, for real: hidden states, masks and the cache of later layers shrink.

Works with any attention implementation: the rows of attention that score tokens are computed here, from the queries and
keys of the layer.  Hooks stand for the length of one call.
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.errors import BackendError, ConfigError
from mmkernels.interop.prune_call import Past, Stage
from mmkernels.interop.prune_layout import narrow
from mmkernels.interop.transformers import causal_mask
from mmkernels.pruning.pruner import DecoderPruner, DecoderStep, Extras, RowAttention


def check_decoder(decoder: Any, pruner: DecoderPruner) -> None:
    """Refuse decoders whose layers cannot be given fewer tokens.

    Raises:
        BackendError: fused or unknown projections, windows, soft caps.
        ShapeError: layers that the decoder has not.
    """
    layers: Any = getattr(decoder, "layers", None) or []
    parts = ("input_layernorm", "self_attn")
    fits = len(layers) and hasattr(decoder, "rotary_emb") and all(hasattr(x, p) for x in layers for p in parts)
    if not fits or not all(hasattr(x.self_attn, p) for x in layers for p in ("q_proj", "k_proj", "scaling")):
        raise BackendError(
            f"prune: {pruner.name} must have a decoder with q_proj, k_proj and rotary embeddings (Llama, Mistral, "
            f"Qwen); got {type(decoder).__name__}. Use a pruner of the vision side, such as vtc_cls."
        )
    config = decoder.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or (
        getattr(config, "sliding_window", None) and type(decoder).__name__ == "MistralModel"
    ):
        raise BackendError(
            f"prune: {pruner.name} must have a decoder with full attention in every layer; got {sorted(kinds)} and a "
            f"window of {getattr(config, 'sliding_window', None)}. Windows would count tokens that are gone."
        )
    if any(getattr(x.self_attn, "attn_logit_softcapping", None) for x in layers):
        raise BackendError(f"prune: {pruner.name} must have a decoder without soft caps; got one. Use vtc_cls.")
    pruner.drop_layers(len(layers))


@dataclass
class View:
    """What a run of layers sees.

    Attributes:
        stage: as it will be remembered.
        positions: (batch, width) of this call's tokens.
        attention: mask as the model's attention wants it.
        embeddings: rotary cosines and sines of `positions`.
    """

    stage: Stage
    positions: Tensor
    attention: Any
    embeddings: Any


class DecoderRun:
    """One call of a decoder whose layers do not all see the same tokens.

    Args:
        decoder: the module with the layers.
        past: what the cache will have seen of the first layers after the call.
        stages: of the cache so far (a call that continues), empty for a prompt.
        positions: (batch, width) position ids of the first layers.
        cache: of the call, or None.
    """

    def __init__(self, decoder: Any, past: Past, stages: tuple[Stage, ...], positions: Tensor, cache: Any):
        self.decoder, self.past, self.positions, self.cache = decoder, past, positions, cache
        self.thread = threading.get_ident()
        self.views: list[View] = []
        self.continued = list(stages)

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Within, calls of the decoder by this thread are narrowed."""
        handles = [
            layer.register_forward_pre_hook(self._before(index), with_kwargs=True)
            for index, layer in enumerate(self.decoder.layers)
        ]
        handles += self._more_hooks()
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _more_hooks(self) -> list[Any]:
        return []

    def stages(self) -> tuple[Stage, ...]:
        """What to remember of later layers."""
        return tuple(view.stage for view in self.views)

    def _before(self, index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if threading.get_ident() != self.thread:
                return None
            hidden = args[0] if args else kwargs.pop("hidden_states")
            hidden = self._enter(index, hidden, kwargs)
            if self.views:
                view = self.views[-1]
                kwargs |= {"attention_mask": view.attention, "position_embeddings": view.embeddings}
                kwargs["position_ids"] = view.positions
            return (hidden, *args[1:]), kwargs

        return hook

    def _enter(self, index: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """A layer is about to run: continue the stage that begins with it."""
        if self.continued and self.continued[0].layer == index:
            stage = self.continued.pop(0)
            width = hidden.shape[1]
            own = self.past.mask[:, self.past.mask.shape[1] - width :]
            positions = self.positions.expand(hidden.shape[0], -1)
            if stage.compact:  # counted anew from the first token on, whatever the first layers do
                counted = self.past.removed if self.past.compact else 0
                positions = positions - (stage.removed - counted)
            self._see(replace(stage, mask=torch.cat([stage.mask, own], dim=1)), positions, hidden)
        return hidden

    def _see(self, stage: Stage, positions: Tensor, hidden: Tensor) -> None:
        attention = causal_mask(self.decoder.config, hidden, stage.mask.long(), self.cache, stage.layer, positions)
        embeddings = self.decoder.rotary_emb(hidden, position_ids=positions)
        self.views.append(View(stage, positions, attention, embeddings))


class PromptRun(DecoderRun):
    """A prompt with images: tokens are dropped on the way.

    Args:
        pruner: says where and which.
        visual: (batch, width) bool.
        prompt: (batch, width) bool, False from the first label on: answers do not choose what they are answered from.
        compact: whether positions are counted anew behind each drop.
        others: as of `DecoderRun`.
    """

    def __init__(self, pruner: DecoderPruner, visual: Tensor, prompt: Tensor, compact: bool, **others: Any):
        super().__init__(stages=(), **others)
        self.pruner, self.visual, self.prompt, self.compact = pruner, visual, prompt, compact
        layers = self.decoder.layers
        if any(layer.training and getattr(layer, "gradient_checkpointing", False) for layer in layers):
            raise ConfigError(
                f"prune: gradient checkpointing must be off for {pruner.name}; it is on, and would run layers again "
                "with other tokens. Call model.gradient_checkpointing_disable()."
            )
        self.drops = pruner.drop_layers(len(layers))
        self.mask = self.past.mask
        self.original = (visual & self.mask).sum(-1)
        self.columns = torch.arange(visual.shape[1], device=visual.device).expand_as(visual)
        self.rows = torch.zeros_like(visual)
        self.seen: dict[int, dict[str, Any]] = {}

    def take_labels(self, labels: Tensor) -> Tensor:
        """(batch, width) labels of the prompt to those of the tokens that reach the end."""
        columns = self.columns.to(labels.device)
        return labels.gather(1, columns.clamp(min=0)).masked_fill(columns < 0, -100)

    def kept(self, visual: Tensor) -> list[Tensor]:
        """Of each row with images, which of its visual tokens reached the end, (n,) int64 each."""
        order, columns = visual.long().cumsum(1) - 1, self.columns.to(visual.device)
        rows = [(order[b], visual[b], columns[b][columns[b] >= 0]) for b in range(visual.shape[0]) if visual[b].any()]
        return [places[own[is_visual[own]]] for places, is_visual, own in rows]

    def _more_hooks(self) -> list[Any]:
        """Queries and keys of layers that score a drop behind them."""
        handles = []
        for scoring in {scoring for layer, scoring in self.drops.items() if scoring != layer}:
            attention = self.decoder.layers[scoring].self_attn
            for name in ("q_proj", "k_proj"):
                handles.append(getattr(attention, name).register_forward_hook(self._keep_output(scoring, name)))
        return handles

    def _keep_output(self, layer: int, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if threading.get_ident() == self.thread:
                self.seen.setdefault(layer, {})[name] = output.detach()

        return hook

    def _enter(self, index: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        if index == 0:
            self.rows = self.pruner.query_rows(hidden.detach(), self.visual, self.prompt)
        if index in self.drops:
            hidden = self._drop(index, hidden, kwargs)
        embeddings = self.views[-1].embeddings if self.views else kwargs["position_embeddings"]
        if index in self.drops.values():
            self.seen.setdefault(index, {})["embeddings"] = embeddings
        return hidden

    def _drop(self, index: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Score, choose, narrow."""
        step = DecoderStep(
            layer=index,
            num_layers=len(self.decoder.layers),
            scores_row=self._scores(index, hidden, kwargs),
            is_visual=self.visual,
            mask=self.mask,
            original_visual=self.original,
            hidden_states=hidden,
        )
        count = self.mask.sum(1, keepdim=True)
        keep = self.pruner.keep(step)
        extras = self.pruner.merged(step, keep)
        if extras is not None:
            hidden, keep = self._insert(hidden, keep, extras)
        if bool((keep | ~self.mask).all()):
            return hidden
        layout = narrow(keep, self.mask, self.positions, compact=False)
        before = self.views[-1].stage.removed if self.views else self.past.removed
        gone = count - layout.mask.sum(1, keepdim=True)
        positions = layout.position_ids
        if self.compact:
            start = self.positions.expand_as(self.mask).masked_fill(~self.mask, sys.maxsize).amin(1, keepdim=True)
            positions = (start + layout.mask.long().cumsum(1) - 1) * layout.mask
        self.visual, self.rows = layout.take(self.visual), layout.take(self.rows)
        self.columns = layout.take(self.columns, -1)
        self.mask, self.positions = layout.mask, positions
        hidden = layout.take(hidden)
        self._see(Stage(index, layout.mask, before + gone, self.compact), positions, hidden)
        return hidden

    def _insert(self, hidden: Tensor, keep: Tensor, extras: Extras) -> tuple[Tensor, Tensor]:
        """Put merged tokens behind the visual tokens that stay: (batch, width + more) of everything."""
        width, more = hidden.shape[1], extras.tokens.shape[1]
        places = torch.arange(width, device=hidden.device)
        anchor = torch.where(self.visual & keep & self.mask, places, -1).amax(1)
        first = torch.where(self.visual & self.mask, places, width).amin(1)
        anchor = torch.where(anchor < 0, first - 1, anchor)[:, None]
        keys = torch.cat([2 * places.expand_as(keep), (2 * anchor + 1).expand(-1, more)], dim=1)
        order = keys.argsort(dim=1, stable=True)
        position = self.positions.expand_as(keep).gather(1, anchor.clamp(0, max(width - 1, 0))).expand(-1, more)
        self.positions = torch.cat([self.positions.expand_as(keep), position], 1).gather(1, order)
        self.visual = torch.cat([self.visual, extras.mask], 1).gather(1, order)
        self.rows = torch.cat([self.rows, torch.zeros_like(extras.mask)], 1).gather(1, order)
        self.columns = torch.cat([self.columns, torch.full_like(position, -1)], 1).gather(1, order)
        self.mask = torch.cat([self.mask, extras.mask], 1).gather(1, order)
        keep = torch.cat([keep, extras.mask], 1).gather(1, order)
        both = torch.cat([hidden, extras.tokens.to(hidden)], 1)
        return both.gather(1, order.to(hidden.device)[..., None].expand(-1, -1, hidden.shape[2])), keep

    def _scores(self, index: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """What the pruner makes of the attention of the query rows in the scoring layer: (batch, width) float32."""
        scoring = self.drops[index]
        layer = self.decoder.layers[scoring]
        with torch.no_grad():
            if scoring == index:
                normed = layer.input_layernorm(hidden.detach())
                q, k = layer.self_attn.q_proj(normed), layer.self_attn.k_proj(normed)
                embeddings = self.views[-1].embeddings if self.views else kwargs["position_embeddings"]
            else:
                made = self.seen.pop(scoring)
                q, k, embeddings = made["q_proj"], made["k_proj"], made["embeddings"]
            seen = attention_rows(layer.self_attn, q, k, embeddings, self.rows, self.mask, self.visual)
            return self.pruner.scores(seen).to(self.mask.device)  # layers may live on several devices


def attention_rows(
    attention: Any, q: Tensor, k: Tensor, embeddings: Any, rows: Tensor, mask: Tensor, visual: Tensor
) -> RowAttention:
    """Causal softmax attention of some rows, by an attention module's own scale and rotation.

    Args:
        attention: LlamaAttention or alike.
        q, k: (batch, width, ...) projected, not rotated.
        embeddings: rotary cosines and sines, (batch or 1, width, headdim).
        rows: (batch, width) bool, the queries.
        mask: (batch, width) bool, False at padding.
        visual: (batch, width) bool.
    """
    batch, width = mask.shape
    rows, mask, visual = (t.to(q.device) for t in (rows, mask, visual))
    q, k = (t.unflatten(-1, (-1, attention.head_dim)) for t in (q, k))
    order = (~rows).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(rows.sum(1).max())]
    chosen = rows.gather(1, order)
    q = q.gather(1, order[..., None, None].expand(-1, -1, *q.shape[2:]))
    for name in ("q_norm", "k_norm"):
        norm = getattr(attention, name, None)
        if norm is not None and name == "q_norm":
            q = norm(q)
        elif norm is not None:
            k = norm(k)
    cos, sin = (t.to(q.device).expand(batch, -1, -1) for t in embeddings)
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    pick = order[..., None].expand(-1, -1, cos.shape[2])
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    ones = torch.ones_like(cos)[:, None]
    q, _ = rotate(q, ones[:, :, :0], cos.gather(1, pick), sin.gather(1, pick))
    ones, k = rotate(ones, k, cos, sin)
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    q = q.to(kind).unflatten(1, (k.shape[1], -1))
    logits = torch.einsum("bkgrd,bknd->bkgrn", q, k.to(kind)) * attention.scaling
    seen = mask[:, None] & (torch.arange(width, device=mask.device) <= order[..., None])
    weights = logits.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1).flatten(1, 2)
    weights = weights.masked_fill(~chosen[:, None, :, None], 0).nan_to_num(0.0)
    turned = ones[:, 0].to(kind)
    return RowAttention(weights, chosen, visual & mask, turned.gather(1, pick), turned)
