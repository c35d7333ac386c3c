"""MMMambaConfig: the shape of a decoder-only vision-language model whose mixers are attention, Mamba-2, or both.

Sources: mmMamba (arXiv 2502.13145) and its teacher HoVLE (arXiv 2412.16158); one configuration describes either.
"""

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from mmkernels.errors import ConfigError

FULL, LINEAR = "full_attention", "linear_attention"
_ROPE_TYPES = ("default", "dynamic")


def head_interleaved(num_layers: int, interval: int = 4) -> tuple[int, ...]:
    """The layers that keep softmax attention when the first of every `interval` does (mmMamba's hybrid, section 4.5).

    >>> head_interleaved(32, 4)
    (0, 4, 8, 12, 16, 20, 24, 28)
    """
    if interval < 1:
        raise ConfigError(f"head_interleaved: interval must be at least 1; got {interval}. 4 is the paper's.")
    return tuple(range(0, num_layers, interval))


def layer_types_keeping(num_layers: int, keep_attention: Iterable[int]) -> list[str]:
    """`layer_types` with softmax attention at the given global layer indices and Mamba-2 everywhere else.

    >>> layer_types_keeping(3, [0])
    ['full_attention', 'linear_attention', 'linear_attention']
    """
    keep = set(keep_attention)
    outside = sorted(index for index in keep if not 0 <= index < num_layers)
    if outside:
        raise ConfigError(
            f"layer_types_keeping: keep_attention must hold layer indices in [0, {num_layers}); got {outside}. "
            "Indices count the embedding layers first."
        )
    return [FULL if index in keep else LINEAR for index in range(num_layers)]


@strict
class MMMambaConfig(PreTrainedConfig):
    """Configuration of `MMMambaForConditionalGeneration`: vision patches, holistic embedding layers, decoder layers.

    Args:
        num_embedding_layers: causal layers run on image and text tokens alike before the decoder.
        num_hidden_layers: decoder layers; `total_layers` is the sum and what `layer_types` counts.
        layer_types: "full_attention" or "linear_attention" per layer, embedding layers first; None = all attention.
        rope_parameters: {"rope_type": "default" | "dynamic", "rope_theta": ..., "factor": ...}, for attention layers.
        image_size, patch_size: of one tile; the position table has (image_size / patch_size)^2 + 1 slots.
        downsample_ratio: 1/r: the pixel shuffle joins r x r patch tokens into one; 1.0 joins none.
        normalize_embedding_output: scale each token to unit length between embedding and decoder layers.
        mixer_*: options of `mmkernels.layers.GroupedMamba2Mixer`; the defaults are the released model's.

    Raises:
        ConfigError: sizes that contradict each other.

    Example:
        >>> MMMambaConfig.mmmamba_2b("hybrid").layer_types.count("full_attention")
        8

    Source: parameter counts of the named constructors equal the published 2.6B and 2.7B (tests/models).
    """

    model_type = "mmmamba"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 92553
    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_embedding_layers: int = 8
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_key_value_heads: int = 8
    rms_norm_eps: float = 1e-5
    if TYPE_CHECKING:  # None only until __post_init__ has filled them in
        head_dim: int
        layer_types: list[str]
        rope_parameters: dict[str, Any]
    else:
        head_dim: int | None = None
        layer_types: list[str] | None = None
        rope_parameters: dict | None = None
    max_position_embeddings: int = 32768
    attention_dropout: float = 0.0
    image_size: int = 448
    patch_size: int = 14
    num_channels: int = 3
    downsample_ratio: float = 0.5
    image_token_id: int = 92546
    normalize_embedding_output: bool = False
    mixer_conv_kernel: int = 2
    mixer_chunk_size: int | None = None
    mixer_conv_bias: bool = True
    mixer_use_gate: bool = True
    mixer_use_d: bool = False
    mixer_use_qk_norm: bool = False
    mixer_norm_eps: float = 1e-5
    mixer_scale_input_by_dt: bool = True
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = 2

    def __post_init__(self, **kwargs: Any) -> None:
        if self.head_dim is None:
            self.head_dim = self.hidden_size // max(self.num_attention_heads, 1)
        if self.layer_types is None:
            self.layer_types = [FULL] * self.total_layers
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": 1e6}
        super().__post_init__(**kwargs)
        self._check_sizes()
        self.validate_layer_type()

    @property
    def total_layers(self) -> int:
        """Embedding layers plus decoder layers."""
        return self.num_embedding_layers + self.num_hidden_layers

    @property
    def shuffle_factor(self) -> int:
        """r: the pixel shuffle joins r x r patch tokens into one image token."""
        return round(1.0 / self.downsample_ratio)

    @property
    def tokens_per_tile(self) -> int:
        """Image tokens of one tile of `image_size`."""
        return (self.image_size // self.patch_size // self.shuffle_factor) ** 2

    def _check_sizes(self) -> None:
        def require(holds: bool, name: str, expectation: str, remedy: str) -> None:
            if not holds:
                raise ConfigError(f"MMMambaConfig: {name} must {expectation}; got {getattr(self, name)!r}. {remedy}")

        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        require(heads > 0, "num_attention_heads", "be at least 1", "Give one head.")
        require(
            kv_heads > 0 and heads % kv_heads == 0,
            "num_key_value_heads",
            f"divide num_attention_heads ({heads})",
            "Use equal numbers for plain multi-head attention.",
        )
        require(self.head_dim % 2 == 0, "head_dim", "be even", "Rotary embedding turns pairs of channels.")
        ratio = self.downsample_ratio
        require(
            0 < ratio <= 1 and abs(ratio * round(1 / ratio) - 1) < 1e-6,
            "downsample_ratio",
            "be 1/r for a whole r",
            "0.5 joins 2 x 2 patches, 1.0 joins none.",
        )
        require(
            self.image_size % (self.patch_size * self.shuffle_factor) == 0,
            "image_size",
            f"be a multiple of patch_size x r = {self.patch_size * self.shuffle_factor}",
            "Otherwise border pixels would be dropped.",
        )
        require(self.mixer_conv_kernel >= 1, "mixer_conv_kernel", "be at least 1", "1 means no look-back.")
        rope_type = self.rope_parameters.get("rope_type", "default")
        if rope_type not in _ROPE_TYPES:
            raise ConfigError(
                f"MMMambaConfig: rope_parameters['rope_type'] must be one of {_ROPE_TYPES}; got {rope_type!r}. "
                "Other rotary scalings are not part of this model."
            )

    def validate_layer_type(self) -> None:
        """Check `layer_types` against both stacks (the base class knows of `num_hidden_layers` alone)."""
        wrong = sorted({kind for kind in self.layer_types if kind not in (FULL, LINEAR, "hybrid")})
        if wrong:
            raise ConfigError(
                f"MMMambaConfig: layer_types must hold {FULL!r} or {LINEAR!r}; got {wrong}. Rename the entries."
            )
        if len(self.layer_types) != self.total_layers:
            raise ConfigError(
                f"MMMambaConfig: layer_types must have {self.total_layers} entries (num_embedding_layers "
                f"{self.num_embedding_layers} + num_hidden_layers {self.num_hidden_layers}); got "
                f"{len(self.layer_types)}. List the embedding layers first."
            )

    @property  # type: ignore[misc]
    def per_layer_config(self) -> list["MMMambaConfig"]:  # type: ignore[override]
        """One entry per layer of both stacks: the stock cache makes as many layers as this has entries."""
        return [self] * self.total_layers

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> "MMMambaConfig":
        """The configuration itself; the view the stock cache is built from if no layer attends.

        A cache of recurrent states alone cannot tell how many tokens it has seen, which `generate` must know. In that
        view layer 0 is "hybrid" to the cache: beside its states it gets a byte per token (see `MMMambaMamba2.forward`).
        """
        if not decoder or not self.layer_types or FULL in self.layer_types:
            return self
        view = copy.copy(self)
        view.layer_types = ["hybrid", *self.layer_types[1:]]
        return view

    @classmethod
    def hovle_2b(cls, **overrides: Any) -> "MMMambaConfig":
        """The teacher, HoVLE-2.6B: 8 + 24 softmax layers of width 2048, dynamic-NTK rotary embedding."""
        rope = {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0}
        return cls(**{"rope_parameters": rope, **overrides})

    @classmethod
    def mmmamba_2b(cls, kind: Literal["linear", "hybrid"] = "linear", **overrides: Any) -> "MMMambaConfig":
        """mmMamba-2.7B: "linear" has no softmax layer left, "hybrid" keeps the first of every four."""
        if kind not in ("linear", "hybrid"):
            raise ConfigError(
                f"mmmamba_2b: kind must be 'linear' or 'hybrid'; got {kind!r}. The teacher is hovle_2b()."
            )
        keep = head_interleaved(32, 4) if kind == "hybrid" else ()
        return cls(**{"layer_types": layer_types_keeping(32, keep), **overrides})
