"""Every seam to transformers: version floor, `generate` for recurrent models, token counts, masks, attention functions.

Checked against transformers 5.22 and 5.23.  Any branch on its version belongs in this file and nowhere else.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, GenerationMixin
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, LinearAttentionCacheLayerMixin
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    create_causal_mask,
    sdpa_mask,
)

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


def register_attention(name: str, attention: Callable[..., Any], mask: Callable[..., Any]) -> None:
    """Make `attn_implementation=name` known: its attention function and its mask function, never one without the other.

    A model whose implementation has no mask function is given no mask at all, and padding is lost without a warning.
    """
    AttentionMaskInterface.register(name, mask)
    AttentionInterface.register(name, attention)


# Rows of a boolean mask that are made at a time when its intervals are read off.
_MASK_ROWS = 256
_NO_INTERVAL = (
    "mmkernels_mma: the model's mask must keep one interval of keys in every row; it keeps several. Open rectangles "
    "with make_modality_mutual instead of or_mask_function."
)


def mask_shape(mask_function: Callable[..., Any]) -> str | None:
    """Say "causal" or "full" for the two mask functions whose rows need not be looked at, else None."""
    return {causal_mask_function: "causal", bidirectional_mask_function: "full"}.get(mask_function)


def row_intervals(
    batch_size: int, q_length: int, kv_length: int, q_offset: int, device: torch.device, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """First key and one past the last key of every row of a mask transformers describes by a function of indices.

    Sliding windows, chunks, packed sequences and blocks are such masks.  Evaluated a few rows at a time.

    Args:
        **options: kv_offset, mask_function, attention_mask and use_vmap as a mask function gets them.

    Raises:
        ConfigError: some row keeps keys that are not one interval.
    """
    starts, ends = [], []
    for row in range(0, q_length, _MASK_ROWS):
        count = min(_MASK_ROWS, q_length - row)
        keep = sdpa_mask(
            batch_size, count, kv_length, q_offset + row, allow_is_causal_skip=False, device=device, **options
        )
        assert keep is not None
        kept = keep[:, 0]
        start = kept.int().argmax(-1)
        end = torch.where(kept.any(-1), kv_length - kept.flip(-1).int().argmax(-1), start)
        interval = ((end - start) == kept.sum(-1)).all()
        if torch.compiler.is_compiling():
            torch._assert_async(interval, _NO_INTERVAL)
        elif not bool(interval):
            raise ConfigError(_NO_INTERVAL)
        starts.append(start)
        ends.append(end)
    if not starts:
        return tuple(torch.zeros(batch_size, 0, dtype=torch.int32, device=device) for _ in range(2))  # type: ignore[return-value]
    return torch.cat(starts, 1).int(), torch.cat(ends, 1).int()


def attention_implementation(model: Any) -> str:
    """The name of the attention function a model's decoder uses."""
    return str(model.config.get_text_config()._attn_implementation)


def packed_boundaries(position_ids: torch.Tensor | None) -> torch.Tensor | None:
    """cu_seqlens of documents packed in one row, told by positions that start again; None when nothing is packed.

    Raises:
        ConfigError: several rows, some of them packed.
    """
    if position_ids is None or position_ids.ndim != 2 or position_ids.shape[1] == 0:
        return None
    breaks = position_ids.diff(dim=1) != 1
    if not bool(breaks.any()):
        return None
    if position_ids.shape[0] != 1:
        raise ConfigError(
            f"mmkernels_mma: packed documents must be in a batch of 1; got batch={position_ids.shape[0]} with "
            "position_ids that start again. Concatenate the rows."
        )
    edges = breaks[0].nonzero()[:, 0] + 1
    ends = edges.new_tensor([position_ids.shape[1]])
    return torch.cat([ends * 0, edges, ends]).int()


def prefill_chunk_size(model: Any, generation_config: Any, given: dict[str, Any]) -> int | None:
    """What `generate` will use: the keyword, the configuration passed, the model's."""
    for source in (given.get("prefill_chunk_size"), getattr(generation_config, "prefill_chunk_size", None)):
        if source is not None:
            return int(source)
    size = getattr(model.generation_config, "prefill_chunk_size", None)
    return None if size is None or generation_config is not None else int(size)


def cached_tokens(cache: Cache | None) -> int:
    """Tokens a cache has seen."""
    return 0 if cache is None else int(cache.get_seq_length())


def causal_mask(
    config: Any, embeds: torch.Tensor, mask: torch.Tensor, cache: Cache | None, layer: int, position_ids: torch.Tensor
) -> Any:
    """The mask that attention of one decoder layer wants, when that layer's part of the cache has a length of its own.

    Args:
        config: of the decoder.
        embeds: (batch, width, dim), for its shape, dtype and device.
        mask: (batch, columns) padding mask of that layer's part of the cache and the call.
        cache: of the call, or None.
        layer: the layer.
        position_ids: (batch, width).
    """
    alone = None
    if cache is not None:
        alone = DynamicCache()
        alone.layers = cache.layers[layer : layer + 1]
    return create_causal_mask(
        config=config, inputs_embeds=embeds, attention_mask=mask, past_key_values=alone, position_ids=position_ids
    )
