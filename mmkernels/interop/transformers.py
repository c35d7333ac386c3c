"""Every seam to transformers: the version floor, `generate` for recurrent models, token counts, padding masks.

Checked against transformers 5.22 and 5.23.  Any branch on its version belongs in this file and nowhere else.
"""

from typing import Any

import torch
import transformers
from transformers import GenerationMixin
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin

from mmkernels.errors import BackendError, ConfigError, ShapeError

FLOOR = (5, 22)


def check_version(version: str = transformers.__version__) -> None:
    """Raise unless transformers has the recurrent-state accessors of its cache (5.22) and is still 5.x.

    Raises:
        BackendError: naming the version found and the range that works.
    """
    numbers = version.split(".")[:2]
    found = tuple(int(part) for part in numbers if part.isdigit())
    if len(found) != 2 or not FLOOR <= found < (6, 0):
        raise BackendError(
            f"mmkernels.models: transformers must be >= {FLOOR[0]}.{FLOOR[1]} and < 6; got {version}. "
            "Install mmkernels[models]."
        )


check_version()


def is_padded(attention_mask: torch.Tensor) -> bool | torch.Tensor:
    """Whether a (batch, seqlen) mask masks anything; one synchronisation, skipped (True) while compiling."""
    return True if torch.compiler.is_compiling() else not bool(attention_mask.all())


def recurrent_padding_mask(attention_mask: torch.Tensor | None, seqlen: int) -> torch.Tensor | None:
    """The last `seqlen` columns of a 2-D padding mask, or None when they mask nothing.

    transformers' own helper takes every single-token call for unpadded.  That is wrong for a left-padded batch that is
    fed token by token from the start, so here one token is looked at like any other.

    Raises:
        ShapeError: a 4-D mask; a recurrence has no pairs of positions to mask.
    """
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2:
        raise ShapeError(
            "attention_mask must have shape (batch, seqlen) for a model with linear layers; got "
            f"{tuple(attention_mask.shape)}. Pass the padding mask."
        )
    local = attention_mask[:, attention_mask.shape[1] - seqlen :]
    return local if is_padded(local) else None


def check_cache(cache: Cache, layer_types: list[str]) -> None:
    """Refuse a cache that was not built for these layers.

    Raises:
        ConfigError: for instance `DynamicCache()` without a configuration, which makes attention layers only.
    """
    recurrent = [isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers]
    counts = any(isinstance(layer, CacheLayerMixin) for layer in cache.layers) or not cache.layers
    for index, kind in enumerate(layer_types):
        if (kind == "linear_attention") != (index < len(recurrent) and recurrent[index]) or not counts:
            raise ConfigError(
                f"past_key_values must hold a {kind} layer at index {index} and know its length; got a cache built for "
                "another model. Build it with DynamicCache(config=model.config)."
            )


def count_tokens(cache: Cache, tokens: torch.Tensor) -> None:
    """Tell a cache without attention layers of more tokens, (batch, seqlen, ...) (see `MMMambaConfig.get_text_config`).

    Its layer 0 also has an attention part; a key of one byte and an empty value per token make `get_seq_length` right.
    """
    if cache.layers and all(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers):
        marker = tokens.new_zeros((tokens.shape[0], 1, tokens.shape[1], 1), dtype=torch.uint8)
        cache.update(marker, marker[..., :0], 0)


class RecurrentGenerationMixin(GenerationMixin):
    """`generate` for models whose class name says "mamba" but whose `forward` takes `past_key_values`.

    GenerationMixin hands the cache to every such class as `cache_params` and then loses sight of it when it looks for
    `past_key_values` to slice inputs of a continued conversation; the two names are bridged where the cache is made.
    """

    config: Any

    def _prepare_cache_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        generation_config, model_kwargs, *rest = args
        given = model_kwargs.pop("past_key_values", None)
        if given is not None:
            model_kwargs["cache_params"] = given
        implementation = generation_config.cache_implementation
        recurrent = "linear_attention" in self.config.layer_types
        if recurrent and implementation not in (None, "dynamic", "offloaded"):
            raise ConfigError(
                f"generate: cache_implementation must be 'dynamic' or 'offloaded' for a model with linear layers; got "
                f"{implementation!r}. Recurrent states have a fixed size already."
            )
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *rest, **kwargs)  # type: ignore[misc]
        if "cache_params" in model_kwargs:
            model_kwargs["past_key_values"] = model_kwargs.pop("cache_params")
