"""MLMambaForConditionalGeneration: frozen towers, a scan connector, and a Mamba-2 language model behind the image.

Source: ML-Mamba (arXiv 2407.19832, section 3) and its released code; the language model is state-spaces' Mamba-2.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from mmkernels.errors import ConfigError, ShapeError
from mmkernels.interop.transformers import RecurrentGenerationMixin, cached_tokens, recurrent_padding_mask
from mmkernels.layers.scan_connector import Mamba2ScanConnector
from mmkernels.models.mamba2.modeling_mamba2 import Mamba2LMForCausalLM
from mmkernels.models.ml_mamba.configuration_ml_mamba import MLMambaConfig
from mmkernels.models.ml_mamba.layout_ml_mamba import ImageFirst, image_first
from mmkernels.models.ml_mamba.vision_ml_mamba import FusedVisionTower
from mmkernels.ops.token_pruning.api import prune_tokens


class MLMambaPreTrainedModel(PreTrainedModel):
    """What the model tells transformers about itself."""

    config_class = MLMambaConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = False
    _supports_sdpa = True  # the towers'
    _supports_attention_backend = True
    _is_stateful = True  # a recurrent state cannot be rolled back to fewer tokens
    _no_split_modules = ["Mamba2Block", "FusedVisionTower", "Mamba2ScanConnector"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["dt_bias", "A_log", "D"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Towers and language model are models of their own and draw their weights themselves.
        if isinstance(module, Mamba2ScanConnector):
            loaded = [p for p in module.parameters() if getattr(p, "_is_hf_initialized", False)]
            values = [p.clone() for p in loaded]
            module.reset_parameters()
            for parameter, value in zip(loaded, values, strict=True):
                parameter.copy_(value)


class MLMambaForConditionalGeneration(MLMambaPreTrainedModel, RecurrentGenerationMixin):
    """Next-token logits of text behind an image, or of text alone, in time linear in both.

    Every row is [image embeddings | text], without placeholders: input_ids, masks, labels, logits and the length of
    the cache count text only.

    Example:
        >>> model = MLMambaForConditionalGeneration.from_pretrained(folder)  # doctest: +SKIP
        >>> model.generate(**processor("What is shown?", images=image), max_new_tokens=32)  # doctest: +SKIP
    """

    _tied_weights_keys = {"language_model.lm_head.weight": "language_model.backbone.embedding.weight"}

    def __init__(self, config: MLMambaConfig):
        super().__init__(config)
        self.vision_tower = FusedVisionTower(config)
        self.connector = Mamba2ScanConnector(
            config.vision_width,
            config.hidden_size,
            variant=config.connector_variant,
            scan=config.connector_scan,
            num_layers=config.connector_layers,
            d_state=config.connector_state_size,
            headdim=config.connector_head_dim,
            expand=config.connector_expand,
            d_conv=config.connector_conv_kernel,
        )
        self.language_model = Mamba2LMForCausalLM(config.text_config)
        if config.freeze_vision:
            self.vision_tower.requires_grad_(False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token table."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token table."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.language_model.get_output_embeddings()

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Image embeddings as the language model reads them: (images, num_image_tokens, hidden).

        With `num_keep` the best-scored patches are kept in their order.  They are chosen behind the connector's scan,
        which needs the whole grid, and in front of its projector, which then has less to do; the scores are the towers'
        (see `FusedVisionTower.forward`).

        Args:
            pixel_values: (images, towers, channels, size, size).
        """
        features, scores = self.vision_tower(pixel_values)
        hidden = self.connector.mix(features.to(self.connector.entry.weight.dtype), self.config.grid)
        if self.config.num_keep is not None:
            hidden = prune_tokens(hidden, scores, num_keep=self.config.num_keep).tokens
        return self.connector.projector(hidden)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        has_image: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the text, and the next-token loss when labels are given.

        Args:
            input_ids: (batch, seqlen), text only: the image has no placeholder.
            pixel_values: (batch, towers, channels, size, size), an image for each row, in the first call only.
            has_image: (batch,) bool, False for rows of text whose pixels are not looked at; default: all rows have one.
            attention_mask: (batch, cached + seqlen), 0 = padding, anywhere; padding changes no state.
            position_ids: accepted and ignored: order comes from the recurrence.
            past_key_values: `DynamicCache(config=model.config)`; any number of new tokens may follow a warm cache.
            inputs_embeds: (batch, seqlen, hidden) text embeddings instead of input_ids.
            labels: (batch, seqlen), -100 = no loss.  The first token of a text behind an image has a loss, too: the
                image's last embedding predicts it.
            use_cache: default: the language model's configuration, and never in training mode.
            logits_to_keep: the last so many columns (0 = all), or indices.
            **kwargs: handed to the loss (e.g. num_items_in_batch).

        Returns:
            CausalLMOutputWithPast; logits (batch, kept, vocab_size) of the text's columns.  At padding they are those
            of the row's last token before it, so that rows padded on the right go on from their last real token.

        Raises:
            ShapeError: pixels, mask or labels that do not fit.
            ConfigError: arguments that exclude each other; an image behind cached text.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ConfigError("MLMamba: one of input_ids and inputs_embeds must be given; got both or none.")
        past = cached_tokens(past_key_values)
        text = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        mask = self._padding(attention_mask, text, past)
        images, has_image = self._images(pixel_values, has_image, text, past)
        before = 0 if images is None else images.shape[1]
        rows = None
        if mask is not None or images is not None or labels is not None:  # else decoding: nothing to lay out
            rows = image_first(text, mask, images, has_image)
        outputs = self.language_model.backbone(
            inputs_embeds=text if rows is None else rows.embeds,
            attention_mask=None if rows is None else _with_cached(rows.mask, past),
            past_key_values=past_key_values,
            use_cache=use_cache,
            uncounted=before,
            output_hidden_states=kwargs.pop("output_hidden_states", None),
            output_attentions=kwargs.pop("output_attentions", None),
        )
        hidden = outputs.last_hidden_state
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        loss = None
        if rows is None:
            logits = self.language_model.logits(hidden[:, keep])
        elif labels is None:
            logits = self.language_model.logits(_at(hidden, rows.places[:, 1:][:, keep]))
        else:
            every = self.language_model.logits(_at(hidden, rows.places))
            loss = self._loss(every[:, :-1].contiguous(), labels, rows, **kwargs)
            logits = every[:, 1:][:, keep]
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )

    def _loss(self, logits: Tensor, labels: Tensor, rows: ImageFirst, **kwargs: Any) -> Tensor:
        """Cross-entropy of each label by the logits of what precedes it, (batch, seqlen, vocab_size)."""
        if labels.shape != logits.shape[:2]:
            raise ShapeError(
                f"MLMamba: labels must have shape {tuple(logits.shape[:2])}, text only; got {tuple(labels.shape)}. "
                "Image embeddings have no labels."
            )
        targets = labels.masked_fill(rows.places[:, :-1] < 0, -100)  # nothing precedes it
        return self.loss_function(
            logits=logits, labels=None, shift_labels=targets.contiguous(), vocab_size=self.config.vocab_size, **kwargs
        )

    def _padding(self, attention_mask: Tensor | None, text: Tensor, past: int) -> Tensor | None:
        if attention_mask is not None and attention_mask.ndim == 2:
            wanted = (text.shape[0], past + text.shape[1])
            if tuple(attention_mask.shape) != wanted:
                raise ShapeError(
                    f"MLMamba: attention_mask must have shape {wanted}, {past} cached tokens included and images not; "
                    f"got {tuple(attention_mask.shape)}. Extend it to the whole text."
                )
        return recurrent_padding_mask(attention_mask, text.shape[1])

    def _images(
        self, pixel_values: Tensor | None, has_image: Tensor | None, text: Tensor, past: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Embeddings of the rows that have an image, and which these are; (None, None) without any."""
        if pixel_values is None:
            return None, None
        if past:
            raise ConfigError(
                f"MLMamba: pixel_values must come in the first call; got them behind {past} cached tokens. Leave them "
                "out: the state has seen the image already."
            )
        rows = text.shape[0]
        wanted = has_image is None or has_image.shape == (rows,)
        if pixel_values.shape[0] != rows or not wanted:
            raise ShapeError(
                f"MLMamba: pixel_values and has_image must have one entry for each of {rows} rows; got "
                f"{pixel_values.shape[0]} images{'' if wanted else f' and has_image {tuple(has_image.shape)}'}. "  # type: ignore[union-attr]
                "Give rows of text any pixels, and has_image False."
            )
        if has_image is None:
            return self.get_image_features(pixel_values), None
        having = has_image.to(torch.bool)
        if not bool(having.any()):
            return None, None
        return self.get_image_features(pixel_values[having]), having


def _at(hidden: Tensor, places: Tensor) -> Tensor:
    """Rows of hidden (batch, n, d) at places (batch, m); -1 reads the first."""
    return hidden.gather(1, places.clamp(min=0)[..., None].expand(-1, -1, hidden.shape[2]))


def _with_cached(mask: Tensor | None, past: int) -> Tensor | None:
    """The mask with columns for cached tokens in front."""
    return None if mask is None else torch.cat([mask.new_ones(mask.shape[0], past), mask], 1)
