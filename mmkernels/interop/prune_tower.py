"""Run a vision tower as it is, and take along the few rows of attention a pruner asks for.

The tower keeps its attention implementation; queries and keys are read where the projections of the chosen layers hand
them on, which costs O(images heads tokens) memory.  It stops as soon as nobody needs another layer.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.errors import BackendError, ConfigError, ShapeError
from mmkernels.interop.prune_mlp import activations_in_place
from mmkernels.ops.token_pruning.api import cls_attention_scores
from mmkernels.ops.token_pruning.received import attention_column_scores
from mmkernels.pruning.pruner import Encoder, Tap

# How the two projections of an attention module are called: CLIP, SigLIP, ...; ViT, DINOv2.
_NAMES = (("q_proj", "k_proj"), ("query", "key"))


class TowerDone(Exception):  # noqa: N818  not an error
    """Raised by a hook, caught by `Tower.run`: every layer that somebody needs has run."""


@dataclass(frozen=True)
class Projections:
    """Queries and keys of one attention layer.

    Attributes:
        query, key: the modules that make them.
        num_heads: of both.
        scale: of their products.
        key_width: where the key's module makes the values too: its leading channels are the key.
    """

    query: nn.Module
    key: nn.Module
    num_heads: int
    scale: float
    key_width: int | None = None

    def split(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Both as (images, tokens, heads, headdim), without gradients: scores choose, they do not learn."""
        heads = (self.num_heads, -1)
        return query.detach().unflatten(-1, heads), key.detach()[..., : self.key_width].unflatten(-1, heads)


@dataclass
class Seen:
    """What a run has collected.

    Attributes:
        hidden: output of the layers that were asked for, (images, num_prefix + tokens, dim).
        taps: as in `VisionInputs`.
        last: the tower's own last hidden state (behind its final norm), if it ran to the end.
    """

    hidden: dict[int, Tensor] = field(default_factory=dict)
    taps: dict[Tap, Tensor] = field(default_factory=dict)
    last: Tensor | None = None


@dataclass(frozen=True)
class Tower:
    """Layers of attention over an image, seen from outside.

    Attributes:
        module: what is called.
        layers: its layers.
        projections: the queries and keys of each.
        num_prefix: leading tokens of its hidden states that are no patches.
        key_prefix: leading keys of its attention that stand for none of its tokens.
        head: pooling head with a learned probe.
    """

    module: Any
    layers: list[nn.Module]
    projections: list[Projections]
    num_prefix: int
    key_prefix: int
    head: Any = None

    def encoder(self, feature_layer: int, grid: tuple[int, int]) -> Encoder:
        """The facts a pruner decides by."""
        return Encoder(len(self.layers), feature_layer, self.num_prefix, grid, self.head is not None)

    def run(
        self,
        inputs: Tensor,
        *,
        num_tokens: int,
        layers: tuple[int, ...],
        taps: tuple[Tap, ...] = (),
        to_the_end: bool = False,
    ) -> Seen:
        """Encode images.

        Args:
            inputs: what the module takes.
            num_tokens: patches of an image.
            layers: whose outputs are wanted.
            taps: what else.
            to_the_end: whether the last hidden state behind the final norm is wanted as well.
        """
        seen = Seen()
        probes = [tap for tap in taps if tap.what == "probe_row"]
        stops = not (to_the_end or probes or _must_finish(self.module))
        wanted = _Wanted(self, seen, set(layers), taps, self.num_prefix + num_tokens, stops)
        with wanted.hooked(), activations_in_place(self.layers):
            try:
                outputs = self.module(inputs)
                seen.last = getattr(outputs, "last_hidden_state", outputs)
            except TowerDone:
                pass
        for tap in probes:
            assert seen.last is not None
            seen.taps[tap] = self._probe_row(seen.last)
        return seen

    def _probe_row(self, last: Tensor) -> Tensor:
        """Attention of the pooling head's probe, (images, tokens)."""
        attention, probe = self.head.attention, self.head.probe
        dim, heads = attention.embed_dim, attention.num_heads
        with torch.no_grad():
            weight, bias = attention.in_proj_weight, attention.in_proj_bias
            query = nn.functional.linear(probe.to(weight.dtype), weight[:dim], bias[:dim])
            key = nn.functional.linear(last.to(weight.dtype), weight[dim : 2 * dim], bias[dim : 2 * dim])
            q, k = (t.unflatten(-1, (heads, -1)) for t in (query.expand(last.shape[0], -1, -1), key))
            return cls_attention_scores(q, k, num_prefix=self.num_prefix)


class _Wanted:
    """The hooks of one run.  Other threads that use the same tower meanwhile are left alone."""

    def __init__(self, tower: Tower, seen: Seen, layers: set[int], taps: tuple[Tap, ...], num_tokens: int, stops: bool):
        self.tower, self.seen, self.layers, self.num_tokens, self.stops = tower, seen, layers, num_tokens, stops
        self.taps: dict[int, list[Tap]] = {}
        for tap in taps:
            if not 0 <= tap.layer < len(tower.layers):
                raise ConfigError(
                    f"prune: taps must name layers 0 .. {len(tower.layers) - 1} of the vision tower; got {tap}. "
                    "Lower the number of layers the pruner reads."
                )
            if tap.what != "probe_row":
                self.taps.setdefault(tap.layer, []).append(tap)
        self.left = len(layers) + len(self.taps)
        self.thread = threading.get_ident()

    @contextmanager
    def hooked(self) -> Iterator[None]:
        handles = [self.tower.layers[layer].register_forward_hook(self._output(layer)) for layer in self.layers]
        for layer in self.taps:
            waiting: dict[str, Tensor] = {}
            at = self.tower.projections[layer]
            handles.append(at.query.register_forward_hook(self._projected(layer, "query", waiting)))
            handles.append(at.key.register_forward_hook(self._projected(layer, "key", waiting)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _one_less(self) -> None:
        self.left -= 1
        if self.left == 0 and self.stops:
            raise TowerDone

    def _output(self, layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if threading.get_ident() != self.thread or layer in self.seen.hidden:
                return
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.shape[1] != self.num_tokens:
                raise ShapeError(
                    f"prune: the vision tower must have {self.tower.num_prefix} prefix tokens and one token a patch, "
                    f"{self.num_tokens} in all; got {hidden.shape[1]}. Towers that merge patches are not supported."
                )
            self.seen.hidden[layer] = hidden
            self._one_less()

        return hook

    def _projected(self, layer: int, which: str, waiting: dict[str, Tensor]) -> Callable[..., None]:
        """Queries and keys come in either order; with the second one the scores are made and both are free again."""

        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if threading.get_ident() != self.thread or self.taps[layer][0] in self.seen.taps:
                return
            waiting[which] = output
            if len(waiting) == 2:
                at = self.tower.projections[layer]
                q, k = at.split(waiting.pop("query"), waiting.pop("key"))
                for tap in self.taps[layer]:
                    self.seen.taps[tap] = tap_of(tap, q, k, at.scale, self.tower.key_prefix)
                self._one_less()

        return hook


def tap_of(tap: Tap, q: Tensor, k: Tensor, scale: float, key_prefix: int) -> Tensor:
    """What a tap asks for, from a layer's queries and keys, (images, tokens, heads, headdim) each."""
    with torch.no_grad():
        if tap.what == "keys":
            return k
        if tap.what == "cls_query":
            return q[:, 0]
        if tap.what == "column":
            return attention_column_scores(q, k, scale=scale, num_prefix=key_prefix)
        row = q[:, :1] if tap.what == "cls_row" else q.mean(dim=1, keepdim=True)
        return cls_attention_scores(row, k, scale=scale, num_prefix=key_prefix)


def vit(module: Any) -> Tower:
    """A vision transformer of transformers: CLIPVisionModel, SiglipVisionModel, Dinov2Model, ...

    Raises:
        BackendError: its layers do not stand in one ModuleList, or have no separate query and key projections.
    """
    layers, projections = _find_layers(module)
    names = {name.rsplit(".", 1)[-1] for name, _ in module.named_parameters()}
    prefix = int(bool(names & {"class_embedding", "cls_token"})) + int(
        getattr(module.config, "num_register_tokens", 0) or 0
    )
    head = getattr(module, "head", None)
    return Tower(module, layers, projections, prefix, prefix, head if hasattr(head, "probe") else None)


def resampler(module: Any, num_features: int) -> Tower:
    """A `PerceiverResampler` over so many features: its tokens are the latents, its keys those and the features."""
    projections = []
    for layer in module.layers:
        at = layer.attention
        inner = at.to_q.out_features
        projections.append(Projections(at.to_q, at.to_kv, at.heads, (inner // at.heads) ** -0.5, inner))
    return Tower(module, list(module.layers), projections, 0, num_features)


def _find_layers(module: Any) -> tuple[list[nn.Module], list[Projections]]:
    for part in module.modules():
        if isinstance(part, nn.ModuleList) and len(part):
            found = [_projections(layer, module.config) for layer in part]
            if all(found):
                return list(part), [at for at in found if at is not None]
    raise BackendError(
        "prune: the vision tower must have separate query and key projections in its layers (q_proj and k_proj, or "
        f"query and key); {type(module).__name__} has none. This tower is not supported."
    )


def _projections(layer: nn.Module, config: Any) -> Projections | None:
    for part in layer.modules():
        for names in _NAMES:
            query, key = (getattr(part, name, None) for name in names)
            if isinstance(query, nn.Module) and isinstance(key, nn.Module):
                heads = getattr(part, "num_heads", None) or getattr(part, "num_attention_heads", None)
                heads = int(heads or config.num_attention_heads)
                scale = getattr(part, "scale", None) or getattr(part, "scaling", None)
                width = int(getattr(query, "out_features", config.hidden_size))
                return Projections(query, key, heads, float(scale or (width // heads) ** -0.5))
    return None


def _must_finish(module: nn.Module) -> bool:
    """Whether somebody works behind the forward passes that stopping skips: offloading, sharding, checkpointing."""
    for part in module.modules():
        wrapped = hasattr(part, "_hf_hook") or any("FSDP" in b.__name__ for b in type(part).__mro__)
        if wrapped or (part.training and getattr(part, "gradient_checkpointing", False)):
            return True
    return False
