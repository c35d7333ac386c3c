"""Mamba2LMForCausalLM: a Mamba-2 language model on this package's ops, with names as in state-spaces/mamba2-*.

Prefill runs `ssd_scan`, `causal_conv1d` and `gated_rms_norm`; a token of decoding is one native call and
one `decode_linear` for the head.  Source: Dao and Gu, "Transformers are SSMs" (arXiv 2405.21060).
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from mmkernels.errors import ConfigError, ShapeError
from mmkernels.interop.transformers import (
    RecurrentGenerationMixin,
    check_cache,
    count_tokens,
    recurrent_padding_mask,
)
from mmkernels.layers import GatedRMSNorm, Mamba2Block, Mamba2Mixer
from mmkernels.layers.mamba2_stack import StackStep
from mmkernels.models.mamba2.configuration_mamba2 import Mamba2LMConfig
from mmkernels.ops.decode_linear.api import decode_linear

_DECODE_ROWS = 16  # up to so many rows the head is bound by memory, and decode_linear is the faster product


def build_block(config: Mamba2LMConfig) -> Mamba2Block:
    """One block of the model."""
    mixer = Mamba2Mixer(
        config.hidden_size,
        d_state=config.state_size,
        d_conv=config.conv_kernel,
        expand=config.expand,
        headdim=config.head_dim,
        ngroups=config.n_groups,
        chunk_size=config.chunk_size,
        dt_limit=(config.time_step_limit[0], config.time_step_limit[1]),
        norm_before_gate=config.norm_before_gate,
        conv_bias=config.use_conv_bias,
        bias=config.use_bias,
        D_has_hdim=config.skip_per_channel,
        rmsnorm=config.rmsnorm,
    )
    return Mamba2Block(
        config.hidden_size, mixer=mixer, norm_eps=config.rms_norm_eps, residual_in_fp32=config.residual_in_fp32
    )


class Mamba2LMPreTrainedModel(PreTrainedModel):
    """What both classes tell transformers about themselves."""

    config_class = Mamba2LMConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = False
    _is_stateful = True  # a recurrent state cannot be rolled back to fewer tokens
    _no_split_modules = ["Mamba2Block"]
    _skip_keys_device_placement = ["past_key_values"]
    # exp and softplus of these few numbers decide how long a head remembers: bf16 would move half-lives by percents.
    _keep_in_fp32_modules_strict = ["dt_bias", "A_log", "D"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, Mamba2Mixer):
            # Drawn as a whole, after its children: step sizes and decays have distributions of their own.
            loaded = [p for p in module.parameters() if getattr(p, "_is_hf_initialized", False)]
            values = [p.clone() for p in loaded]
            module.reset_parameters()
            # Every block adds one sum to the running one: divided so that their number does not change its size.
            module.out_proj.weight /= self.config.num_hidden_layers**0.5
            for parameter, value in zip(loaded, values, strict=True):
                parameter.copy_(value)
        elif isinstance(module, GatedRMSNorm):
            init.ones_(module.weight)


class Mamba2LMModel(Mamba2LMPreTrainedModel):
    """Embedding, blocks, last norm; no head."""

    def __init__(self, config: Mamba2LMConfig):
        super().__init__(config)
        self.embedding = nn.Embedding(config.padded_vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(build_block(config) for _ in range(config.num_hidden_layers))
        self.norm_f = GatedRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self._stack = StackStep()
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token table."""
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token table."""
        self.embedding = cast(nn.Embedding, value)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        uncounted: int = 0,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states after the last norm; arguments as in `Mamba2LMForCausalLM.forward`.

        The cache's length leaves out the first `uncounted` positions: an image in front of the text has no token ids.
        """
        if kwargs.pop("output_attentions", None):
            raise ConfigError(
                "Mamba2LMModel: output_attentions must be False; got True. There is no attention: hook layer.mixer."
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise ConfigError("Mamba2LMModel: one of input_ids and inputs_embeds must be given; got both or none.")
        hidden = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        cache = self._cache(use_cache, past_key_values)
        mask = self._padding(attention_mask, hidden, cache)
        if cache is not None:
            count_tokens(cache, hidden[:, uncounted:])
        if self._steps(hidden, mask, cache):
            total, states = self._step(hidden[:, 0], cast(Cache, cache), bool(output_hidden_states))
        else:
            total, states = self._scan(hidden, mask, cache, bool(output_hidden_states))
        hidden = self.norm_f(total).to(self.norm_f.weight.dtype)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=cache,
            hidden_states=(*states, hidden) if output_hidden_states else None,
        )

    def _cache(self, use_cache: bool | None, cache: Cache | None) -> Cache | None:
        if cache is not None:
            check_cache(cache, self.config.layer_types)
            return cache
        wanted = self.config.use_cache and not self.training if use_cache is None else use_cache
        return DynamicCache(config=self.config) if wanted else None

    def _padding(self, attention_mask: Tensor | None, hidden: Tensor, cache: Cache | None) -> Tensor | None:
        if attention_mask is not None and attention_mask.ndim == 2:
            past = 0 if cache is None else int(cache.get_seq_length())
            wanted = (hidden.shape[0], past + hidden.shape[1])
            if tuple(attention_mask.shape) != wanted:
                raise ShapeError(
                    f"Mamba2LMModel: attention_mask must have shape {wanted}, {past} cached tokens included; got "
                    f"{tuple(attention_mask.shape)}. Extend it to the whole sequence."
                )
        return recurrent_padding_mask(attention_mask, hidden.shape[1])

    def _steps(self, hidden: Tensor, mask: Tensor | None, cache: Cache | None) -> bool:
        """Whether this is one token per row on warm states, to be updated in place."""
        if cache is None or hidden.shape[1] != 1 or mask is not None or torch.is_grad_enabled():
            return False
        return all(cache.get_recurrent_state(i) is not None for i in range(len(self.layers)))

    def _step(self, token: Tensor, cache: Cache, keep: bool) -> tuple[Tensor, list[Tensor]]:
        """The running sum after the last block, and before each (if kept)."""
        hidden, residual, states = token, cast(Tensor | None, None), []
        if not keep:
            places = range(len(self.layers))
            conv_states = [cast(Tensor, cache.get_conv_state(i)) for i in places]
            ssm_states = [cast(Tensor, cache.get_recurrent_state(i)) for i in places]
            taken = self._stack(self.layers, token, conv_states, ssm_states)
            if taken is not None:
                return (taken[0] + taken[1])[:, None], []
        for i, block in enumerate(self.layers):
            if keep:
                states.append((hidden if residual is None else residual + hidden)[:, None])
            conv_state, ssm_state = cache.get_conv_state(i), cache.get_recurrent_state(i)
            hidden, residual = cast(Mamba2Block, block).step(
                hidden, residual, cast(Tensor, conv_state), cast(Tensor, ssm_state)
            )
        return (hidden if residual is None else residual + hidden)[:, None], states

    def _scan(
        self, hidden: Tensor, mask: Tensor | None, cache: Cache | None, keep: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """The running sum after the last block, and before each (if kept)."""
        residual, states = cast(Tensor | None, None), []
        for i, block in enumerate(self.layers):
            if keep:
                states.append(hidden if residual is None else residual + hidden)
            if cache is None:
                hidden, residual = block(hidden, residual, attention_mask=mask)
                continue
            hidden, residual, conv_state, ssm_state = block(
                hidden,
                residual,
                attention_mask=mask,
                conv_state=cache.get_conv_state(i),
                ssm_state=cache.get_recurrent_state(i),
                return_states=True,
            )
            cache.update_conv_state(conv_state, i)
            cache.update_recurrent_state(ssm_state, i)
        return hidden if residual is None else residual + hidden, states


class Mamba2LMForCausalLM(Mamba2LMPreTrainedModel, RecurrentGenerationMixin):
    """Next-token logits of a Mamba-2 language model.

    Example:
        >>> model = Mamba2LMForCausalLM(Mamba2LMConfig.official("130m"))  # doctest: +SKIP
        >>> place_for_decode(model)  # doctest: +SKIP
        >>> model.generate(input_ids, max_new_tokens=32)  # doctest: +SKIP
    """

    _tied_weights_keys = {"lm_head.weight": "backbone.embedding.weight"}

    def __init__(self, config: Mamba2LMConfig):
        super().__init__(config)
        self.backbone = Mamba2LMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token table."""
        return self.backbone.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token table."""
        self.backbone.embedding = cast(nn.Embedding, value)

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and the shifted next-token loss when labels are given.

        Args:
            input_ids: (batch, seqlen).
            attention_mask: (batch, cached + seqlen), 0 = padding, on either side; padding changes no state.
            position_ids: accepted and ignored: order comes from the recurrence.
            past_key_values: `DynamicCache(config=model.config)`; any number of new tokens may follow a warm cache.
            inputs_embeds: (batch, seqlen, hidden) instead of input_ids.
            labels: (batch, seqlen), -100 = no loss.
            use_cache: default: the configuration's, and never in training mode.
            logits_to_keep: the last so many positions (0 = all), or indices.
            output_hidden_states: also return the running sum before every block and the normed output.
            **kwargs: handed to the loss (e.g. num_items_in_batch).

        Returns:
            CausalLMOutputWithPast; logits (batch, kept, vocab_size) in the model's dtype.

        Raises:
            ShapeError: a mask that does not fit.
            ConfigError: arguments that exclude each other.
        """
        outputs = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=kwargs.pop("output_attentions", None),
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
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """(batch, seqlen, hidden) to (batch, seqlen, vocab_size); rows that pad the table have no column."""
        return self._head(hidden)[..., : self.config.vocab_size]

    def _head(self, hidden: Tensor) -> Tensor:
        few = hidden.shape[0] * hidden.shape[1] <= _DECODE_ROWS and hidden.device.type == "cpu"
        if few and type(self.lm_head) is nn.Linear and not torch.is_grad_enabled():
            return decode_linear(hidden, self.lm_head.weight)
        return self.lm_head(hidden)
