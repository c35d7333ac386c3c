"""One decoder layer with either mixer: softmax attention with rotary positions, or the Mamba-2 that replaces it.

Source: mmMamba (arXiv 2502.13145), section 4; HoVLE / InternLM2 for the attention layer.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mmkernels.layers import GroupedMamba2Mixer
from mmkernels.models.mmmamba.configuration_mmmamba import FULL, MMMambaConfig
from mmkernels.ops.gated_rms_norm.api import gated_rms_norm


class MMMambaRMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension, statistics in fp32."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., dim) to (..., dim)."""
        return gated_rms_norm(x, self.weight, eps=self.eps)


class Rotary(NamedTuple):
    """cos and sin for queries and keys, (batch or 1, 1, positions, head_dim); `late`: keys turn after the cache."""

    query: tuple[torch.Tensor, torch.Tensor]
    key: tuple[torch.Tensor, torch.Tensor]
    late: bool


class MMMambaRotaryEmbedding(nn.Module):
    """Angles position * theta^(-2i/d).  "dynamic": theta grows with the sequence (NTK-aware scaling).

    theta' = theta * max(1, f L / L_max - (f - 1))^(d / (d - 2)),   L = the row's last position + 1

    Nothing is kept between calls: a long input cannot change the result of a later short one.  Under "dynamic" theta
    moves as a sequence grows, so keys are cached unturned and turned by the current theta; otherwise they are cached
    turned.
    """

    def __init__(self, config: MMMambaConfig):
        super().__init__()
        rope = config.rope_parameters
        self.dim, self.theta = config.head_dim, float(rope["rope_theta"])
        self.dynamic = rope["rope_type"] == "dynamic"
        self.factor = float(rope.get("factor") or 1.0)
        self.max_length = config.max_position_embeddings

    def inverse_frequencies(self, position_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """(batch or 1, 1, dim / 2)."""
        exponents = torch.arange(0, self.dim, 2, device=position_ids.device, dtype=dtype) / self.dim
        if not self.dynamic:
            return torch.pow(self.theta, -exponents)[None, None]
        length = position_ids.amax(dim=-1, keepdim=True).to(dtype) + 1
        scale = (self.factor * length / self.max_length - (self.factor - 1)).clamp(min=1)
        theta = self.theta * scale ** (self.dim / (self.dim - 2))
        return (theta**-exponents)[:, None]

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, past: int) -> Rotary:
        """Angles of the (batch or 1, seqlen) positions, and of the `past` positions before them if keys turn late."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        frequencies = self.inverse_frequencies(position_ids, dtype)

        def turn(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            angles = (positions[..., None].to(dtype) * frequencies).repeat(1, 1, 2)[:, None]
            return angles.cos().to(x.dtype), angles.sin().to(x.dtype)

        query = turn(position_ids)
        if not self.dynamic or past == 0:
            return Rotary(query, query, self.dynamic)
        before = position_ids[:, :1] + torch.arange(-past, 0, device=position_ids.device)
        return Rotary(query, turn(torch.cat([before, position_ids], dim=1)), True)


def rotate(x: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Turn the pairs (x_i, x_{i + d/2}) by the given (cos, sin)."""
    cos, sin = turn
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(Q K^T * scaling + mask) V written out, probabilities in fp32; (batch, heads, seqlen, headdim) in."""
    groups = int(module.num_key_value_groups)  # type: ignore[arg-type]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    exact = torch.float64 if scores.dtype == torch.float64 else torch.float32
    weights = F.dropout(scores.softmax(dim=-1, dtype=exact).to(query.dtype), dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def one_token_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, *, scaling: float
) -> torch.Tensor:
    """Attention of one new token over a cache; the query heads of a group are its rows, so K and V are never repeated.

    On a CPU some 12 times faster than repeating a long cache at every step (4 over 2 heads of 32, 103K tokens).

    Args:
        query: (batch, heads, 1, headdim); key, value: (batch, kv_heads, length, headdim).
        mask: (batch, 1, 1, length), bool (True = may attend) or additive; None = everything.

    Returns:
        (batch, 1, heads, headdim).
    """
    batch, kv_heads = key.shape[:2]
    rows = query.reshape(batch, kv_heads, -1, query.shape[-1])  # (batch, kv_heads, heads of the group, headdim)
    out = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(batch, 1, -1, query.shape[-1])


class MMMambaAttention(nn.Module):
    """Causal grouped-query attention with rotary positions; the attention function is the one transformers selects."""

    def __init__(self, config: MMMambaConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        self.head_dim, self.scaling = config.head_dim, config.head_dim**-0.5
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        query_dim, kv_dim = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, query_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_dim, bias=False)
        self.o_proj = nn.Linear(query_dim, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        rotary: Rotary,
        causal_mask: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """(batch, seqlen, hidden) to the same; `padding_mask` and `seq_idx` are already part of `causal_mask`."""
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = rotate(self.q_proj(hidden_states).view(heads).transpose(1, 2), rotary.query)
        key = self.k_proj(hidden_states).view(heads).transpose(1, 2)
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        if not rotary.late:
            key = rotate(key, rotary.key)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        if rotary.late:
            key = rotate(key, rotary.key)
        if query.shape[2] == 1 and self.config._attn_implementation == "sdpa" and not self.training:
            return self.o_proj(one_token_attention(query, key, value, causal_mask, scaling=self.scaling).flatten(2))
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        dropout = self.config.attention_dropout if self.training else 0.0
        out, _ = attend(self, query, key, value, causal_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.o_proj(out.flatten(2))


class MMMambaMamba2(GroupedMamba2Mixer):
    """`GroupedMamba2Mixer` with its states in the stock cache: fp32 recurrent state, last inputs of the convolution."""

    def __init__(self, config: MMMambaConfig, layer_idx: int):
        super().__init__(
            config.hidden_size,
            nheads=config.num_attention_heads,
            nkvheads=config.num_key_value_heads,
            headdim=config.head_dim,
            d_conv=config.mixer_conv_kernel,
            chunk_size=config.mixer_chunk_size,
            conv_bias=config.mixer_conv_bias,
            use_gate=config.mixer_use_gate,
            use_D=config.mixer_use_d,
            use_qk_norm=config.mixer_use_qk_norm,
            eps=config.mixer_norm_eps,
            scale_input_by_dt=config.mixer_scale_input_by_dt,
        )
        self.layer_idx = layer_idx

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        *,
        rotary: Rotary | None = None,
        causal_mask: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """(batch, seqlen, hidden) to the same; order comes from convolution and decay, so `rotary` is not used."""
        if past_key_values is None:
            context = self.context(hidden_states, attention_mask=padding_mask, seq_idx=seq_idx)
            return self.o_proj(context)
        cache, layer = past_key_values, self.layer_idx
        conv_state, ssm_state = cache.get_conv_state(layer), cache.get_recurrent_state(layer)
        one_token = hidden_states.shape[1] == 1 and padding_mask is None and not torch.is_grad_enabled()
        if one_token and conv_state is not None and ssm_state is not None:
            return self.step(hidden_states[:, 0], conv_state, ssm_state)[:, None]  # in place: nothing to write back
        context, conv_state, ssm_state = self.context(
            hidden_states,
            attention_mask=padding_mask,
            conv_state=conv_state,
            ssm_state=ssm_state,
            return_states=True,
        )
        cache.update_conv_state(conv_state, layer)
        cache.update_recurrent_state(ssm_state, layer)
        return self.o_proj(context)


class MMMambaMLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x), no biases."""

    def __init__(self, config: MMMambaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., hidden) to (..., hidden)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MMMambaDecoderLayer(GradientCheckpointingLayer):
    """x + mixer(norm(x)), then x + mlp(norm(x)).  `mixer` is attention or Mamba-2; both have `o_proj`."""

    def __init__(self, config: MMMambaConfig, layer_idx: int):
        super().__init__()
        self.layer_idx, self.kind = layer_idx, config.layer_types[layer_idx]
        self.input_norm = MMMambaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mixer = (MMMambaAttention if self.kind == FULL else MMMambaMamba2)(config, layer_idx)
        self.mlp_norm = MMMambaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MMMambaMLP(config)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """(batch, seqlen, hidden) to the same; the keywords are the mixer's."""
        hidden_states = hidden_states + self.mixer(self.input_norm(hidden_states), **kwargs)
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))
