"""Mamba2LMConfig: the shape of a Mamba-2 language model, and the five released ones.

Source: Dao and Gu, "Transformers are SSMs" (arXiv 2405.21060); configuration files of state-spaces/mamba2-*.
"""

import copy
import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from mmkernels.errors import ConfigError, nearest

OFFICIAL_SIZES = {  # layers, channels
    "130m": (24, 768),
    "370m": (48, 1024),
    "780m": (48, 1536),
    "1.3b": (48, 2048),
    "2.7b": (64, 2560),
}


@strict
class Mamba2LMConfig(PreTrainedConfig):
    """Configuration of `Mamba2LMForCausalLM`: embedding, Mamba-2 blocks, a last norm, a tied head.

    Args:
        vocab_size: tokens; logits have so many columns.
        pad_vocab_size_multiple: the embedding has vocab_size rows, rounded up to a multiple of this.
        hidden_size, num_hidden_layers: channels and blocks.
        state_size, conv_kernel, expand, head_dim, n_groups: of `mmkernels.layers.Mamba2Mixer`.
        chunk_size: tokens per chunk of the scan; a matter of speed only.
        time_step_limit: smallest and largest step size.
        rms_norm_eps: of the norms that open the blocks and of the last one.
        residual_in_fp32: keep the running sum in float32 whatever the dtype of the weights.

    Raises:
        ConfigError: sizes that contradict each other.

    Example:
        >>> Mamba2LMConfig.official("130m").num_heads
        24

    Source: parameter counts of the five official sizes (tests/models/test_mamba2_lm.py).
    """

    model_type = "mmkernels_mamba2"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 50277
    pad_vocab_size_multiple: int = 16
    hidden_size: int = 768
    num_hidden_layers: int = 24
    state_size: int = 128
    conv_kernel: int = 4
    expand: int = 2
    head_dim: int = 64
    n_groups: int = 1
    chunk_size: int | None = None
    time_step_limit: tuple[float, ...] | list[float] = (0.0, math.inf)
    use_bias: bool = False
    use_conv_bias: bool = True
    rmsnorm: bool = True
    norm_before_gate: bool = False
    skip_per_channel: bool = False
    rms_norm_eps: float = 1e-5
    residual_in_fp32: bool = True
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    pad_token_id: int | None = 0

    def __post_init__(self, **kwargs: Any) -> None:
        self.layer_types = kwargs.pop("layer_types", None) or ["linear_attention"] * self.num_hidden_layers
        super().__post_init__(**kwargs)
        low, high = self.time_step_limit
        self.time_step_limit = (float(low), float(high))  # a JSON file has lists

        def require(holds: bool, name: str, expectation: str, remedy: str) -> None:
            if not holds:
                raise ConfigError(f"Mamba2LMConfig: {name} must {expectation}; got {getattr(self, name)!r}. {remedy}")

        inner = self.expand * self.hidden_size
        require(self.head_dim > 0 and inner % self.head_dim == 0, "head_dim", f"divide {inner}", "Use 64.")
        groups = self.n_groups
        require(groups > 0 and self.num_heads % groups == 0, "n_groups", f"divide {self.num_heads}", "Use 1.")
        require(self.pad_vocab_size_multiple > 0, "pad_vocab_size_multiple", "be at least 1", "1 does not pad.")
        kinds = set(self.layer_types) - {"hybrid"}  # "hybrid": the view made by get_text_config
        every = len(self.layer_types) == self.num_hidden_layers and kinds <= {"linear_attention"}
        require(every, "layer_types", f"be 'linear_attention' {self.num_hidden_layers} times", "Leave it out.")

    @property
    def num_heads(self) -> int:
        """Heads of a mixer."""
        return self.expand * self.hidden_size // self.head_dim

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and of the head."""
        return -(-self.vocab_size // self.pad_vocab_size_multiple) * self.pad_vocab_size_multiple

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> "Mamba2LMConfig":
        """The configuration itself; with `decoder`, the view the stock cache is built from.

        A cache of recurrent states alone cannot tell how many tokens it has seen, which `generate` must know. In that
        view layer 0 is "hybrid" to the cache: beside its states it gets a byte per token (`interop.count_tokens`).
        """
        if not decoder or not self.layer_types:
            return self
        view = copy.copy(self)
        view.layer_types = ["hybrid", *self.layer_types[1:]]
        return view

    @classmethod
    def official(cls, size: str, **overrides: Any) -> "Mamba2LMConfig":
        """The configuration of state-spaces/mamba2-<size>: "130m", "370m", "780m", "1.3b" or "2.7b"."""
        if size not in OFFICIAL_SIZES:
            raise ConfigError(
                f"Mamba2LMConfig.official: size must be a released one; got {size!r}. {nearest(size, OFFICIAL_SIZES)}"
            )
        layers, channels = OFFICIAL_SIZES[size]
        return cls(**{"num_hidden_layers": layers, "hidden_size": channels, **overrides})
