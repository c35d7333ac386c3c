"""The two halves of attn_implementation="mmkernels_mma": masks of O(seqlen) integers, and attention over them.

The mask half turns what transformers knows (causal, window, packing, padding, cache) into an MMAMask once a
forward pass; the attention half adds the spans of the call, which reach it as the keyword `mma_spans`.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmkernels.errors import ConfigError
from mmkernels.interop.transformers import mask_shape, register_attention, row_intervals
from mmkernels.ops.mma_attention.api import mma_attention
from mmkernels.ops.mma_attention.mask import MMAMask, mma_mask

NAME = "mmkernels_mma"


@dataclass(frozen=True)
class PreparedMask:
    """What the mask half hands to every layer through the model.

    Args:
        mask: rows and keys of this call, without spans.
        kv_offset: absolute position of the first key (caches of windowed layers drop old ones).
        padding: the 2-D mask it was made from.
    """

    mask: MMAMask
    kv_offset: int
    padding: Tensor | None

    def to(self, device: torch.device | str, **_: Any) -> "PreparedMask":
        """Follow a layer to its device, as accelerate's hooks ask of anything with a `to`."""
        return PreparedMask(self.mask.to(device), self.kv_offset, self.padding)

    def contiguous(self) -> "PreparedMask":
        """Generation with a static cache asks this of every mask."""
        return self


def prepare_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any],
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: Any,
) -> PreparedMask:
    """The mask half of "mmkernels_mma": called by transformers once a forward pass and kind of layer."""
    shape, offset, device = mask_shape(mask_function), int(q_offset), torch.device(device)
    if shape is None:
        start, end = row_intervals(
            batch_size,
            q_length,
            kv_length,
            offset,
            device,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            use_vmap=use_vmap,
        )
        rects = torch.zeros(0, 5, dtype=torch.int32, device=device)
        return PreparedMask(MMAMask(start, end, rects, kv_length), kv_offset, attention_mask)
    padding = attention_mask
    if padding is not None:
        missing = kv_offset + kv_length - padding.shape[1]  # a static cache has room for tokens to come
        padding = torch.nn.functional.pad(padding, (0, max(missing, 0)))[:, kv_offset : kv_offset + kv_length]
    mask = mma_mask(
        q_length,
        kv_length,
        batch=batch_size,
        causal=shape == "causal",
        attention_mask=padding,
        past_length=offset - kv_offset if shape == "causal" else None,
        device=device,
    )
    return PreparedMask(mask, kv_offset, attention_mask)


class Calls(threading.local):
    """How many attention calls of this thread saw spans: those a model does not pass on must not be lost silently."""

    with_spans: int = 0


calls = Calls()


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: PreparedMask | Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    mma_spans: Tensor | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """The attention half of "mmkernels_mma", by transformers' contract: heads before tokens, cached keys included."""
    for name, remedy in (
        ("softcap", "It has no soft cap; use attn_implementation='eager'."),
        ("s_aux", "It has no attention sinks; use attn_implementation='eager'."),
        ("position_bias", "It adds no bias to the scores; use attn_implementation='eager'."),
        ("output_attentions", "It never forms the attention matrix; use 'eager', or mma_attention's mass_weights."),
    ):
        if rest.get(name) is not None and rest.get(name) is not False:
            raise ConfigError(f"{NAME}: {name} must be left out; the model asks for it. {remedy}")
    if dropout:
        raise ConfigError(f"{NAME}: dropout must be 0; got {dropout}. Set config.attention_dropout = 0.")
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        # as SDPA does there: float32 rotary tables have widened q and k, but not v
        q, k, v = (t.to(torch.get_autocast_dtype(q.device.type)) for t in (q, k, v))
    if isinstance(attention_mask, Tensor):
        raise ConfigError(
            f"{NAME}: attention_mask must be the (batch, seqlen) padding mask; got {tuple(attention_mask.shape)}. A "
            "dense 4-D mask belongs to attn_implementation='sdpa' or 'eager', without spans."
        )
    if attention_mask is not None:
        mask, offset = attention_mask.mask, attention_mask.kv_offset
    else:  # a model that makes no mask for this layer: its own flag says what the layer is
        causal = rest.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        kind = MMAMask.causal if causal else MMAMask.full
        mask, offset = kind(q.shape[1], k.shape[1], batch=q.shape[0], device=q.device), 0
    mask = mask if mask.device == q.device else mask.to(q.device)
    if mma_spans is not None:
        calls.with_spans += 1
        mask = _with_spans(mask, mma_spans.to(q.device), offset)
    out = mma_attention(q, k, v, mask, scale=scaling)
    assert isinstance(out, Tensor)
    return out.contiguous(), None


def _with_spans(mask: MMAMask, spans: Tensor, kv_offset: int) -> MMAMask:
    if kv_offset:
        spans = spans - torch.tensor([0, 0, 0, kv_offset, kv_offset], dtype=torch.int32, device=spans.device)
    return MMAMask(mask.row_start, mask.row_end, spans, mask.klen)


register_attention(NAME, attention, prepare_mask)
