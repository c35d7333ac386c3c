"""AkiForConditionalGeneration: SigLIP, a Perceiver resampler, and a Phi-3 decoder whose image tokens read the question.

Source: AKI (arXiv 2503.02597, section 3); tensors of the released AKI-4B-phi-3.5-mini.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, Phi3Model, PreTrainedModel, SiglipVisionModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from mmkernels.errors import ConfigError, ShapeError
from mmkernels.interop.mma import ModalityMutual, forward_with_spans
from mmkernels.interop.mma_halves import NAME
from mmkernels.interop.prune_call import recall
from mmkernels.interop.prune_model import PrunedModel, Pruning, forward_pruned
from mmkernels.interop.prune_seams import Choice
from mmkernels.interop.transformers import cached_tokens
from mmkernels.models.aki.configuration_aki import AkiConfig
from mmkernels.models.aki.resampler_aki import PerceiverResampler
from mmkernels.pruning.registry import get_pruner


class AkiPreTrainedModel(PreTrainedModel):
    """What the model tells transformers about itself."""

    config_class = AkiConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ["Phi3DecoderLayer", "SiglipEncoderLayer", "PerceiverLayer"]
    _skip_keys_device_placement = ["past_key_values"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PerceiverResampler):
            init.normal_(module.latents, mean=0.0, std=1.0)


class AkiForConditionalGeneration(PrunedModel, ModalityMutual, AkiPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """Next-token logits from images and text; image tokens also read the question that follows them.

    Example:
        >>> model = AkiForConditionalGeneration.from_pretrained(folder)  # doctest: +SKIP
        >>> model.generate(**processor("What is shown?", images=image), max_new_tokens=32)  # doctest: +SKIP
    """

    def __init__(self, config: AkiConfig):
        super().__init__(config)
        text = config.text_config
        if text._attn_implementation is None:  # nobody asked for another: the only one that knows spans
            text._attn_implementation = NAME
        self.vision_tower = SiglipVisionModel(config.vision_config)
        self.vision_tower.use_head = False  # its weights belong to the checkpoint, its output is never read
        self.resampler = PerceiverResampler(
            config.vision_config.hidden_size,
            text.hidden_size,
            depth=config.resampler_depth,
            heads=config.resampler_heads,
            head_dim=config.resampler_head_dim,
            num_latents=config.num_vision_tokens,
            ff_mult=config.resampler_ff_mult,
        )
        self.language_model = Phi3Model(text)
        self.extra_embedding = nn.Embedding(config.num_extra_tokens, text.hidden_size)
        # Phi-3 has no such bias; AKI's released head does, and it is trained.
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=True)
        self.extra_head = nn.Linear(text.hidden_size, config.num_extra_tokens, bias=True)
        self.post_init()
        if config.num_keep is not None:
            received = get_pruner("vtc_cls", num_keep=config.num_keep, score_source="column", num_layers=1)
            self._pruning = Pruning(Choice(received))
        self.generation_config.suppress_tokens = [config.image_token_id]  # a placeholder stands for pixels, not text

    def get_input_embeddings(self) -> nn.Module:
        """The pretrained token table; ids from num_base_tokens on are in extra_embedding."""
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the pretrained token table."""
        self.language_model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        """The pretrained head; logits from num_base_tokens on come from extra_head."""
        return self.lm_head

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Refused: ids are split over two tables."""
        raise ConfigError(
            "resize_token_embeddings: the vocabulary must stay as it is; ids are split over two tables. Build a model "
            "with another num_extra_tokens and copy the weights."
        )

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Image tokens, unpruned: (images, 3, size, size) to (images, num_vision_tokens, hidden)."""
        return self.resampler(self.encode_images(pixel_values))

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Features of the tower: (images, 3, size, size) to (images, patches, width)."""
        vision = self.config.vision_config
        expected = (vision.num_channels, vision.image_size, vision.image_size)
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != expected:
            raise ShapeError(
                f"AkiForConditionalGeneration: pixel_values must have shape (images, {', '.join(map(str, expected))}); "
                f"got {tuple(pixel_values.shape)}. Let AkiProcessor resize the images."
            )
        return self.vision_tower(pixel_values.to(self.vision_tower.dtype)).last_hidden_state

    def embed(
        self, input_ids: Tensor, pixel_values: Tensor | None = None, image_tokens: Tensor | None = None
    ) -> Tensor:
        """Token embeddings with image tokens put, in order, at the places that hold `image_token_id`.

        Args:
            input_ids: (batch, seqlen).
            pixel_values: (images, 3, size, size).
            image_tokens: (total, hidden) instead: one for each place, of images that were pruned.

        Raises:
            ShapeError: another number of places than of image tokens, in the batch or, by parts of an image, in a row.
        """
        base = self.config.num_base_tokens
        embeds = self.get_input_embeddings()(input_ids.clamp(max=base - 1))
        extra = self.extra_embedding((input_ids - base).clamp(min=0))
        embeds = torch.where((input_ids >= base)[..., None], extra.to(embeds.dtype), embeds)
        places = input_ids == self.config.image_token_id
        if image_tokens is not None:
            if int(places.sum()) != image_tokens.shape[0]:
                raise ShapeError(
                    f"AkiForConditionalGeneration: input_ids must hold a placeholder (id {self.config.image_token_id}) "
                    f"for each of {image_tokens.shape[0]} image tokens; got {int(places.sum())}. Shrink both alike."
                )
            return embeds.masked_scatter(places[..., None], image_tokens.to(embeds.dtype))
        if pixel_values is None:
            return embeds
        features = self.get_image_features(pixel_values)
        each = self.config.num_vision_tokens
        counts = places.sum(-1)
        if int(counts.sum()) != features.shape[0] * each or bool((counts % each).any()):
            raise ShapeError(
                f"AkiForConditionalGeneration: input_ids must hold {each} placeholders (id "
                f"{self.config.image_token_id}) for each of {features.shape[0]} images; got {counts.tolist()} in the "
                "rows. Build both with AkiProcessor."
            )
        return embeds.masked_scatter(places[..., None], features.to(embeds.dtype))

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., hidden) to (..., vocab_size): the head's first num_base_tokens columns, then the extra head's."""
        return torch.cat([self.lm_head(hidden)[..., : self.config.num_base_tokens], self.extra_head(hidden)], dim=-1)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_token_type_ids: Tensor | None = None,
        context_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and the shifted next-token loss when labels are given.

        Args:
            input_ids: (batch, seqlen); num_vision_tokens times `image_token_id` where an image goes.
            pixel_values: (images, 3, size, size), all images of the batch in the order of their placeholders.
            attention_mask: (batch, cached + seqlen), 0 = padding, on either side.
            position_ids: (batch, seqlen); derived from the mask when left out.
            past_key_values: a cache.  An image and its question must come in one call; what follows may come in any
                number of calls.
            inputs_embeds: (batch, seqlen, hidden) instead of input_ids (see `embed`), with mm_token_type_ids to tell
                images.
            labels: (batch, seqlen), -100 = no loss.  No label may be on text that images read (it would leak).
            use_cache: default: the configuration's.
            logits_to_keep: the last so many positions (0 = all), or indices.
            mm_token_type_ids: (batch, seqlen), not 0 = image, instead of looking for `image_token_id`.
            context_mask: (batch, seqlen) bool, text that images may read at all; default all of the prompt.
            **kwargs: handed to the decoder and the loss (e.g. output_hidden_states, num_items_in_batch).

        Returns:
            CausalLMOutputWithPast; logits (batch, kept, vocab_size) in the model's dtype.

        Raises:
            ShapeError: placeholders, pixels or mask that do not fit.
            ConfigError: arguments that exclude each other; a prompt cut between image and question; an attention
                implementation that knows no spans.
            DataError: labels on text that images read.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ConfigError("AkiForConditionalGeneration: one of input_ids and inputs_embeds must be given.")
        given = {
            "input_ids": input_ids,
            "pixel_values": pixel_values,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
            **kwargs,
        }
        given |= {"mm_token_type_ids": mm_token_type_ids, "context_mask": context_mask}
        return forward_pruned(self, AkiForConditionalGeneration._with_spans, given)

    def _with_spans(
        self, mm_token_type_ids: Tensor | None, context_mask: Tensor | None, **given: Any
    ) -> CausalLMOutputWithPast:
        """The forward pass once images are pruned."""
        return forward_with_spans(self, AkiForConditionalGeneration._run, given, mm_token_type_ids, context_mask)

    def _run(
        self,
        input_ids: Tensor | None,
        pixel_values: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
        inputs_embeds: Tensor | None,
        labels: Tensor | None,
        use_cache: bool | None,
        logits_to_keep: int | Tensor,
        image_tokens: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """The forward pass once the spans of the call are known (they are in kwargs)."""
        past = cached_tokens(past_key_values)
        embeds = self._embeds(input_ids, pixel_values, image_tokens, inputs_embeds, past)
        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            if attention_mask.shape != (embeds.shape[0], past + embeds.shape[1]):
                raise ShapeError(
                    f"AkiForConditionalGeneration: attention_mask must have shape {(embeds.shape[0], past)} + the "
                    f"{embeds.shape[1]} tokens of the call; got {tuple(attention_mask.shape)}. It covers cached tokens."
                )
            position_ids = attention_mask.long().cumsum(-1).sub(1).clamp(min=0)[:, past:]
        outputs = self.language_model(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.logits(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _embeds(
        self,
        input_ids: Tensor | None,
        pixel_values: Tensor | None,
        image_tokens: Tensor | None,
        inputs_embeds: Tensor | None,
        past: int,
    ) -> Tensor:
        if image_tokens is not None:
            assert input_ids is not None  # they were shrunk together
            return self.embed(input_ids, image_tokens=image_tokens)
        if input_ids is None:
            if pixel_values is not None:
                raise ConfigError(
                    "AkiForConditionalGeneration: pixel_values must come with input_ids; got inputs_embeds. Compute "
                    "them with model.embed(input_ids, pixel_values)."
                )
            assert inputs_embeds is not None  # forward
            return inputs_embeds
        if pixel_values is None and past == 0 and bool((input_ids == self.config.image_token_id).any()):
            raise ConfigError(
                "AkiForConditionalGeneration: pixel_values must be given for the image placeholders in input_ids; got "
                "None. Build both with AkiProcessor."
            )
        return self.embed(input_ids, pixel_values)

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Any, past_key_values: Cache | None = None, attention_mask: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As for any decoder; a cache whose keys were turned by the short rotary factors is made anew once needed."""
        if self._outgrows(input_ids, past_key_values, attention_mask):
            if kwargs.get("inputs_embeds") is not None:
                raise ConfigError(
                    "generate: input_ids must be given for a text that outgrows original_max_position_embeddings; got "
                    "inputs_embeds, which cannot be read again. Pass the ids and pixel_values."
                )
            past_key_values = None
            kwargs |= {"next_sequence_length": None, "position_ids": None, "is_first_iteration": True}
        return super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, past_key_values=past_key_values, attention_mask=attention_mask, **kwargs
        )

    def _outgrows(self, input_ids: Tensor, cache: Cache | None, attention_mask: Any) -> bool:
        """Whether this step is the first whose longest row needs the long factors of LongRoPE."""
        rope, past = self.config.text_config.rope_parameters, cached_tokens(cache)
        limit = rope.get("original_max_position_embeddings") if rope["rope_type"] == "longrope" else None
        if limit is None or past == 0 or input_ids.shape[1] <= limit:
            return False
        pruned = recall(cache)
        if pruned is not None:
            held, new = pruned.mask.sum(-1), input_ids.shape[1] - pruned.full
            return int(held.max()) <= limit < int(held.max()) + new
        if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
            return past <= limit
        return int(attention_mask[:, :past].sum(-1).max()) <= limit < int(attention_mask.sum(-1).max())

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Any = None,
        **model_kwargs: Any,
    ) -> tuple[Any, dict[str, Any]]:
        # The generic rule repeats image by image; several images of one sample must stay together, in order.
        pixels = model_kwargs.pop("pixel_values", None)
        if pixels is not None and expand_size > 1:
            counts = (input_ids == self.config.image_token_id).sum(dim=-1) // self.config.num_vision_tokens
            pixels = torch.cat([p for part in pixels.split(counts.tolist()) for p in [part] * expand_size])
        ids, expanded = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if pixels is not None:
            expanded["pixel_values"] = pixels
        return ids, expanded
