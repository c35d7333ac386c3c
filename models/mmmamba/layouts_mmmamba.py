"""Which official tensor holds which of ours: one table per layout, read in both directions.

Sources: tensor names and shapes of the released HoVLE and mmMamba checkpoints and of the official training files.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from mmkernels.models.mmmamba.configuration_mmmamba import FULL, MMMambaConfig

Shapes = Mapping[str, tuple[int, ...]]
# What each stage of the official training saves of a linear layer's mixer (stage 3 forgets steps and decays).
_NEW = ("in_proj.weight", "conv1d.weight", "conv1d.bias", "g_proj.weight", "g_norm.weight")
_STEPS, _QKV = ("dt_bias", "A_log_bias"), ("q_proj.weight", "k_proj.weight", "v_proj.weight")
TRAINED = {1: _NEW + _STEPS, 2: _NEW + _STEPS + _QKV, 3: _NEW + _QKV}


def split_grouped(weight: Tensor, groups: int, heads_per_group: int) -> list[Tensor]:
    """Rows of a fused projection, per group (its query heads | one key head | one value head), to W_Q, W_K, W_V."""
    grouped = rearrange(weight, "(g n d) ... -> g n d ...", g=groups, n=heads_per_group + 2)
    parts = grouped.split([heads_per_group, 1, 1], dim=1)
    return [rearrange(part, "g n d ... -> (g n d) ...").contiguous() for part in parts]


def join_grouped(parts: list[Tensor], groups: int, heads_per_group: int) -> Tensor:
    """The inverse of `split_grouped`."""
    counts = (heads_per_group, 1, 1)
    grouped = [rearrange(p, "(g n d) ... -> g n d ...", g=groups, n=n) for p, n in zip(parts, counts, strict=True)]
    return rearrange(torch.cat(grouped, dim=1), "g n d ... -> (g n d) ...").contiguous()


@dataclass(frozen=True)
class Entry:
    """One official tensor and the tensors of ours that it is made of, in row order."""

    official: str
    ours: tuple[str, ...]
    grouped: bool = False  # rows interleaved per kv group, not simply one part after the other

    def shape(self, shapes: Shapes) -> tuple[int, ...]:
        """Its shape, from the shapes of ours."""
        parts = [shapes[name] for name in self.ours]
        return (sum(part[0] for part in parts), *parts[0][1:]) if len(parts) > 1 else parts[0]

    def split(self, weight: Tensor, shapes: Shapes, config: MMMambaConfig) -> dict[str, Tensor]:
        """Ours, from the official tensor."""
        if len(self.ours) == 1:
            return {self.ours[0]: weight}
        if self.grouped:
            parts = split_grouped(weight, *_groups(config))
        else:
            parts = [part.contiguous() for part in weight.split([shapes[name][0] for name in self.ours])]
        return dict(zip(self.ours, parts, strict=True))

    def join(self, ours: Mapping[str, Tensor], config: MMMambaConfig) -> Tensor:
        """The official tensor, from ours."""
        parts = [ours[name] for name in self.ours]
        if len(parts) == 1:
            return parts[0]
        return join_grouped(parts, *_groups(config)) if self.grouped else torch.cat(parts)


def _groups(config: MMMambaConfig) -> tuple[int, int]:
    return config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads


def layer_prefixes(config: MMMambaConfig) -> list[tuple[str, str]]:
    """(official, ours) prefix of each layer, in global order."""
    first = [
        (f"embedding_model.encoder.{i}", f"model.embedding_layers.{i}") for i in range(config.num_embedding_layers)
    ]
    second = [(f"language_model.model.layers.{i}", f"model.layers.{i}") for i in range(config.num_hidden_layers)]
    return first + second


def official_table(config: MMMambaConfig) -> list[Entry]:
    """Every live tensor of a HoVLE checkpoint (all layers attend) or of a deployed mmMamba one."""
    vision, ours = "embedding_model.vision_embeddings", "model.vision_embedding"
    pairs = {
        f"{vision}.position_embedding": f"{ours}.position_embedding",
        f"{vision}.patch_embedding.weight": f"{ours}.patch_embedding.weight",
        f"{vision}.patch_embedding.bias": f"{ours}.patch_embedding.bias",
        "embedding_model.pixel_shuffle_proj.0.weight": "model.projector.linear_1.weight",
        "embedding_model.pixel_shuffle_proj.0.bias": "model.projector.linear_1.bias",
        "embedding_model.pixel_shuffle_proj.2.weight": "model.projector.linear_2.weight",
        "embedding_model.pixel_shuffle_proj.2.bias": "model.projector.linear_2.bias",
        "embedding_model.llm_text_embeddings.weight": "model.embed_tokens.weight",
        "language_model.model.norm.weight": "model.norm.weight",
        "language_model.output.weight": "lm_head.weight",
    }
    table = [Entry(official, (name,)) for official, name in pairs.items()]
    for (prefix, name), kind in zip(layer_prefixes(config), config.layer_types, strict=True):
        shared = {
            "attention_norm": "input_norm",
            "ffn_norm": "mlp_norm",
            "feed_forward.w1": "mlp.gate_proj",
            "feed_forward.w3": "mlp.up_proj",
            "feed_forward.w2": "mlp.down_proj",
        }
        table += [Entry(f"{prefix}.{a}.weight", (f"{name}.{b}.weight",)) for a, b in shared.items()]
        table += (_attention if kind == FULL else _mamba2)(f"{prefix}.attention", f"{name}.mixer")
    return table


def _attention(prefix: str, name: str) -> list[Entry]:
    fused = tuple(f"{name}.{part}_proj.weight" for part in "qkv")
    return [
        Entry(f"{prefix}.wqkv.weight", fused, grouped=True),
        Entry(f"{prefix}.wo.weight", (f"{name}.o_proj.weight",)),
    ]


def _mamba2(prefix: str, name: str) -> list[Entry]:
    fused = tuple(f"{name}.{part}_proj.weight" for part in ("v", "k", "q", "g", "in"))
    renamed = {"g_norm_swish_gate.weight": "g_norm.weight"}
    kept = ("o_proj.weight", "conv1d.weight", "conv1d.bias", "dt_bias", "A_log_bias")
    singles = {**renamed, **{key: key for key in kept}}
    return [
        Entry(f"{prefix}.wvkqgdt.weight", fused),
        *(Entry(f"{prefix}.{official}", (f"{name}.{ours}",)) for official, ours in singles.items()),
    ]


def dead_shapes(config: MMMambaConfig) -> dict[str, tuple[int, ...]]:
    """Official tensors that no computation reads: dropped when read, made up again when written."""
    return {
        "embedding_model.vision_embeddings.class_embedding": (1, 1, config.hidden_size),
        "language_model.model.tok_embeddings.weight": (config.vocab_size, config.hidden_size),
    }


def dead_values(config: MMMambaConfig, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stand-ins for the dead tensors: a zero class token, the text table once more."""
    text = ours["model.embed_tokens.weight"]
    maker: dict[str, Callable[[], Tensor]] = {
        "embedding_model.vision_embeddings.class_embedding": lambda: text.new_zeros(1, 1, config.hidden_size),
        "language_model.model.tok_embeddings.weight": lambda: text.clone(),
    }
    return {name: maker[name]() for name in dead_shapes(config)}


def training_names(config: MMMambaConfig, stage: int) -> dict[int, dict[str, str]]:
    """Layer -> {name in a training file: our name} for what a stage saves of each linear layer."""
    return {
        index: {f"{prefix}.attention.{part}": f"{name}.mixer.{part}" for part in TRAINED[stage]}
        for index, ((prefix, name), kind) in enumerate(zip(layer_prefixes(config), config.layer_types, strict=True))
        if kind != FULL
    }
