"""MMMambaForConditionalGeneration: a decoder-only vision-language model with attention, Mamba-2 or mixed layers.

The teacher (HoVLE) is the model whose every layer attends; a student has Mamba-2 layers in the places of `layer_types`.
Sources: mmMamba (arXiv 2502.13145), HoVLE (arXiv 2412.16158).
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from mmkernels.errors import ConfigError, ShapeError
from mmkernels.interop.transformers import (
    RecurrentGenerationMixin,
    check_cache,
    count_tokens,
    recurrent_padding_mask,
)
from mmkernels.models.mmmamba.configuration_mmmamba import FULL, LINEAR, MMMambaConfig
from mmkernels.models.mmmamba.layers_mmmamba import (
    MMMambaDecoderLayer,
    MMMambaMamba2,
    MMMambaRMSNorm,
    MMMambaRotaryEmbedding,
)
from mmkernels.models.mmmamba.vision_mmmamba import MMMambaProjector, MMMambaVisionEmbedding


class MMMambaPreTrainedModel(PreTrainedModel):
    """What both classes tell transformers about themselves."""

    config_class = MMMambaConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ["MMMambaDecoderLayer", "MMMambaVisionEmbedding"]
    _skip_keys_device_placement = ["past_key_values"]
    # exp and softplus of these few numbers decide how long a head remembers: bf16 would move half-lives by percents.
    _keep_in_fp32_modules_strict = ["dt_bias", "A_log_bias"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MMMambaVisionEmbedding):
            init.normal_(module.position_embedding, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, MMMambaMamba2):
            # Runs after the module's children: the generic rule must not have the last word on decay and step size.
            loaded = [p for p in module.parameters() if getattr(p, "_is_hf_initialized", False)]
            values = [p.clone() for p in loaded]
            module.reset_new_parameters()
            for parameter, value in zip(loaded, values, strict=True):
                parameter.copy_(value)

    def decoder_layers(self) -> list[MMMambaDecoderLayer]:
        """All layers in the order they run: embedding layers, then decoder layers (the indices of `layer_types`)."""
        model = self if isinstance(self, MMMambaModel) else self.model
        return [*model.embedding_layers, *model.layers]


def packed_index(position_ids: torch.Tensor) -> torch.Tensor | None:
    """Which packed sequence each token belongs to, when positions restart inside a row; None when no row restarts."""
    restarts = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if not torch.compiler.is_compiling() and not bool(restarts.any()):
        return None
    return F.pad(restarts.cumsum(dim=-1), (1, 0)).to(torch.int32)


class MMMambaModel(MMMambaPreTrainedModel):
    """Embeddings, vision path, holistic embedding layers, decoder layers, final norm; no head."""

    def __init__(self, config: MMMambaConfig):
        super().__init__(config)
        self._is_stateful = LINEAR in config.layer_types  # a recurrent state cannot be rolled back to fewer tokens
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.vision_embedding = MMMambaVisionEmbedding(config)
        self.projector = MMMambaProjector(config)
        first, total = config.num_embedding_layers, config.total_layers
        self.embedding_layers = nn.ModuleList(MMMambaDecoderLayer(config, i) for i in range(first))
        self.layers = nn.ModuleList(MMMambaDecoderLayer(config, i) for i in range(first, total))
        self.norm = MMMambaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = MMMambaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Image tokens of each tile: (tiles, channels, height, width) to (tiles, tokens, hidden)."""
        return self.projector(self.vision_embedding(pixel_values))

    def embed(self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None = None) -> torch.Tensor:
        """Token embeddings with image tokens put, in order, at the places that hold `image_token_id`.

        The placeholder's own row of the table is replaced, not blended: a NaN in it cannot spread.

        Raises:
            ShapeError: another number of places than of image tokens.
        """
        embeds = self.embed_tokens(input_ids)
        if pixel_values is None:
            return embeds
        features = self.get_image_features(pixel_values)
        places = input_ids == self.config.image_token_id
        wanted, given = int(places.sum()), features.shape[0] * features.shape[1]
        if wanted != given:
            raise ShapeError(
                f"MMMambaModel: input_ids must hold {given} image placeholders (id {self.config.image_token_id}), one "
                f"per image token of {features.shape[0]} tiles; got {wanted}. Build both with MMMambaProcessor."
            )
        return embeds.masked_scatter(places[..., None], features.to(embeds.dtype))

    def _embeds(
        self, input_ids: torch.Tensor | None, pixel_values: torch.Tensor | None, inputs_embeds: torch.Tensor | None
    ) -> torch.Tensor:
        if input_ids is not None and inputs_embeds is None:
            return self.embed(input_ids, pixel_values)
        if inputs_embeds is None or input_ids is not None:
            raise ConfigError("MMMambaModel: one of input_ids and inputs_embeds must be given; got both or none.")
        if pixel_values is not None:
            raise ConfigError(
                "MMMambaModel: pixel_values must come with input_ids; got inputs_embeds. "
                "Compute them with model.embed(input_ids, pixel_values)."
            )
        return inputs_embeds

    def _positions(
        self, attention_mask: torch.Tensor | None, embeds: torch.Tensor, past: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch, seqlen = embeds.shape[:2]
        if attention_mask is None or attention_mask.ndim != 2:
            return torch.arange(past, past + seqlen, device=embeds.device)[None], attention_mask
        if attention_mask.shape != (batch, past + seqlen):
            raise ShapeError(
                f"MMMambaModel: attention_mask must have shape {(batch, past + seqlen)}, {past} cached tokens "
                f"included; got {tuple(attention_mask.shape)}. Extend it to the whole sequence."
            )
        positions = attention_mask.long().cumsum(dim=-1).sub(1).clamp(min=0)
        return positions[:, past:], attention_mask

    def _masks(
        self,
        embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: Cache | None,
    ) -> dict[str, Any]:
        """What the layers need to know about positions: rotary angles, causal mask, padding mask, packed sequences."""
        kinds = set(self.config.layer_types)
        past = int(cache.get_seq_length()) if cache is not None else 0
        derived, attention_mask = self._positions(attention_mask, embeds, past)
        positions = derived if position_ids is None else position_ids
        masks: dict[str, Any] = {"rotary": None, "causal_mask": None, "padding_mask": None, "seq_idx": None}
        if FULL in kinds:
            masks["rotary"] = self.rotary(embeds, positions, past)
            masks["causal_mask"] = create_causal_mask(self.config, embeds, attention_mask, cache, position_ids)
        if LINEAR in kinds:
            masks["padding_mask"] = recurrent_padding_mask(attention_mask, embeds.shape[1])
            if position_ids is not None and attention_mask is None and cache is None:
                seq_idx = packed_index(position_ids)
                masks["seq_idx"] = None if seq_idx is None else seq_idx.expand(embeds.shape[0], -1)
        return masks

    def _cache(self, use_cache: bool | None, cache: Cache | None) -> Cache | None:
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if cache is None and use_cache:
            return DynamicCache(config=self.config)
        if cache is not None and LINEAR in self.config.layer_types:
            check_cache(cache, self.config.layer_types)
        return cache

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states after the final norm; arguments as in `MMMambaForConditionalGeneration.forward`."""
        if kwargs.pop("output_attentions", None):
            raise ConfigError(
                "MMMambaModel: output_attentions must be False; got True. A linear layer has no attention matrix: hook "
                "layer.mixer instead."
            )
        embeds = self._embeds(input_ids, pixel_values, inputs_embeds)
        cache = self._cache(use_cache, past_key_values)
        masks = self._masks(embeds, attention_mask, position_ids, cache)
        if cache is not None:
            count_tokens(cache, embeds)
        hidden, states = embeds, []
        for index, layer in enumerate(self.decoder_layers()):
            if index == self.config.num_embedding_layers and self.config.normalize_embedding_output:
                hidden = F.normalize(hidden, dim=-1)
            states.append(hidden)
            hidden = layer(hidden, past_key_values=cache, **masks, **kwargs)
        hidden = self.norm(hidden)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=cache,
            hidden_states=(*states, hidden) if output_hidden_states else None,
        )


class MMMambaForConditionalGeneration(MMMambaPreTrainedModel, RecurrentGenerationMixin):
    """Next-token logits from text and image tiles; teacher, linear and hybrid student alike.

    Example:
        >>> model = MMMambaForConditionalGeneration(MMMambaConfig.mmmamba_2b("hybrid"))  # doctest: +SKIP
        >>> model.generate(**processor("What is shown?", images=image), max_new_tokens=32)  # doctest: +SKIP
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MMMambaConfig):
        super().__init__(config)
        self.model = MMMambaModel(config)
        self._is_stateful = self.model._is_stateful
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token table."""
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token table."""
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Image tokens of each tile: (tiles, channels, height, width) to (tiles, tokens, hidden)."""
        return self.model.get_image_features(pixel_values)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_token_type_ids: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and the shifted next-token loss when labels are given.

        Args:
            input_ids: (batch, seqlen); `image_token_id` marks where image tokens go.
            pixel_values: (tiles, channels, height, width), all tiles of the batch in the order of their placeholders.
            attention_mask: (batch, cached + seqlen), 0 = padding, on either side; exact for every layer kind.
            position_ids: (batch, seqlen); derived from the mask when left out.  Without mask and cache, positions that
                restart inside a row mark packed sequences that no layer mixes.
            past_key_values: `DynamicCache(config=model.config)`; any number of new tokens may follow a warm cache.
            inputs_embeds: (batch, seqlen, hidden) instead of input_ids (see `MMMambaModel.embed`).
            labels: (batch, seqlen), -100 = no loss.
            use_cache: default: the configuration's, and never in training mode.
            logits_to_keep: the last so many positions (0 = all), or indices.
            mm_token_type_ids: (batch, seqlen), accepted for `generate` and processors; images are found by their
                placeholders.
            output_hidden_states: also return the inputs of every layer and the normed output.
            **kwargs: handed to the attention function and the loss (e.g. num_items_in_batch).

        Returns:
            CausalLMOutputWithPast; logits in the model's dtype.

        Raises:
            ShapeError: placeholders or mask that do not fit.
            ConfigError: arguments that exclude each other.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Any = None,
        **model_kwargs: Any,
    ) -> tuple[Any, dict[str, Any]]:
        # The generic rule repeats tile by tile; several tiles of one sample must stay together, in order.
        pixels = model_kwargs.pop("pixel_values", None)
        if pixels is not None and expand_size > 1:
            side = self.config.patch_size * self.config.shuffle_factor
            tokens = (pixels.shape[-2] // side) * (pixels.shape[-1] // side)
            tiles = (input_ids == self.config.image_token_id).sum(dim=-1) // tokens
            pixels = torch.cat([p for part in pixels.split(tiles.tolist()) for p in [part] * expand_size])
        ids, expanded = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if pixels is not None:
            expanded["pixel_values"] = pixels
        return ids, expanded
