"""make_modality_mutual: a stock transformers decoder whose image tokens read the question that follows them.

`forward` finds the spans of a call once and hands them to attention (mma_halves.py).  AKI, arXiv 2503.02597, section 3.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from mmkernels.errors import BackendError, ConfigError, ShapeError
from mmkernels.interop.mma_halves import NAME, PreparedMask, calls
from mmkernels.interop.transformers import (
    attention_implementation,
    cached_tokens,
    packed_boundaries,
    prefill_chunk_size,
)
from mmkernels.ops.mma_attention.mask import local_spans, mma_mask
from mmkernels.ops.mma_attention.spans import build_mutual_spans, check_no_label_leak, ends_in_an_image, starts_of


@dataclass(frozen=True)
class MutualSettings:
    """How a model finds its spans: the arguments of `build_mutual_spans` that belong to a tokenizer, not to a call."""

    image_token_id: int | None = None
    prompt_end_token_id: int | Sequence[int] | None = None
    include_prompt_end: bool = True
    policy: str = "prompt"

    def can_tell(self, input_ids: Tensor | None, mm_token_type_ids: Tensor | None) -> bool:
        """Whether a call says which of its tokens are images."""
        return mm_token_type_ids is not None or (self.image_token_id is not None and input_ids is not None)


def make_modality_mutual(
    model: Any,
    *,
    image_token_id: int | None = None,
    prompt_end_token_id: int | Sequence[int] | None = None,
    include_prompt_end: bool = True,
    policy: str = "prompt",
) -> Any:
    """Make a stock decoder's image tokens read the question that follows them; returns the model, changed in place.

    Its attention becomes "mmkernels_mma", and `forward` and `generate` find the spans of each call by themselves: from
    input_ids with image_token_id, or from the keyword mm_token_type_ids, which both then accept.  In training the
    labels of a call end its prompts.  Weights, configuration class and every other argument stay as they are; the
    settings are kept in `model.config.modality_mutual` and saved with it.

    Args:
        model: any transformers decoder that uses the attention interface (Llama, Qwen2, Phi-3, SmolLM2, Mistral, ...),
            or a model around one that passes keywords on to it (LLaVA).
        image_token_id: placeholder of an image token in input_ids; None: only calls with mm_token_type_ids have images.
        prompt_end_token_id: the token, or tokens in a row, after which the answer starts; None: the whole prompt.
        include_prompt_end: whether images read that tag too.
        policy: "prompt", "own_segment" or "none", see `build_mutual_spans`.

    Returns:
        model.

    Raises:
        BackendError: the model's attention cannot be replaced.
        ConfigError: an unknown policy; and, from the calls afterwards: another attn_implementation with images
            (flash_attention_2 would drop the spans without a word), a prompt prefilled in chunks that cut a span, a 4-D
            attention_mask.

    Numerics: those of `mma_attention`; rows of padding are 0 in the attention output.
    Cost: one look at the ids a call; attention over what the mask keeps.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        ...                      vocab_size=64)
        >>> model = make_modality_mutual(LlamaForCausalLM(config), image_token_id=9, prompt_end_token_id=3)
        >>> model(torch.tensor([[1, 9, 9, 5, 6, 3, 8]])).logits.shape
        torch.Size([1, 7, 64])

    Source: checked against eager attention with the dense 4-D mask.
    """
    settings = MutualSettings(image_token_id, prompt_end_token_id, include_prompt_end, policy)
    build_mutual_spans(torch.zeros(1, 0, dtype=torch.int64), image_token_id=0, policy=policy)  # complains about policy
    if not getattr(model, "_supports_attention_backend", False):
        raise BackendError(
            f"make_modality_mutual: {type(model).__name__} must use transformers' attention interface; it does not. "
            "Pass a decoder such as Llama, Qwen2 or Phi-3."
        )
    if not isinstance(model, ModalityMutual):
        model.__class__ = _subclass(type(model))
    model.set_attn_implementation(NAME)
    model.config.modality_mutual = asdict(settings)
    return model


class ModalityMutual:
    """What make_modality_mutual puts in front of a model class: spans found before `forward`, checked in `generate`.

    A model class written for it lists it as its first base, has `config.modality_mutual` (the settings as a dict) and
    calls `forward_with_spans` from its `forward`.
    """

    config: Any

    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """`generate` of the model, after refusing what would be answered wrongly."""
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        settings = MutualSettings(**self.config.modality_mutual)
        types = kwargs.get("mm_token_type_ids")
        chunk = prefill_chunk_size(self, generation_config, kwargs)
        if settings.policy != "none" and (
            types is not None or (settings.image_token_id is not None and ids is not None)
        ):
            if kwargs.get("use_cache") is False and settings.prompt_end_token_id is None:
                raise ConfigError(
                    "generate: use_cache must be on when no prompt_end_token_id says where the question ends; got "
                    "False. Without a cache every new token would be read by the images as part of the question."
                )
            if chunk is not None:
                spans = _spans(
                    settings, ids, types, kwargs.get("context_mask"), kwargs.get("attention_mask"), None, None
                )
                _check_chunks(spans, chunk, cached_tokens(kwargs.get("past_key_values")))
        return super().generate(inputs, generation_config=generation_config, **kwargs)  # type: ignore[misc]


def _check_chunks(spans: Tensor, chunk: int, past: int) -> None:
    for b, q0, q1, k0, k1 in spans.tolist():
        cut = next((c for c in range(past + chunk, max(q1, k1), chunk) if c > q0), None)
        if cut is not None:
            raise ConfigError(
                f"generate: prefill_chunk_size must not cut an image from its question; got {chunk}, which cuts at "
                f"{cut} between queries {q0}..{q1 - 1} and keys {k0}..{k1 - 1} of batch row {b}. Leave it out."
            )


def _subclass(base: type) -> type:
    """`base` with spans: same name, so that a saved configuration names the stock architecture."""
    stock = base.forward  # type: ignore[attr-defined]
    parameters = inspect.signature(stock).parameters
    names = [name for name, p in parameters.items() if p.kind is not p.VAR_KEYWORD][1:]

    def forward(
        self: Any,
        *args: Any,
        mm_token_type_ids: Tensor | None = None,
        context_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        return forward_with_spans(self, stock, given, mm_token_type_ids, context_mask)

    added = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in ("mm_token_type_ids", "context_mask")]
    added = [p.replace(default=None, annotation=Tensor | None) for p in added if p.name not in parameters]
    rest = [p for p in parameters.values() if p.kind is p.VAR_KEYWORD]
    own = [parameters[name] for name in ("self", *names)]
    forward.__signature__ = inspect.Signature([*own, *added, *rest])  # type: ignore[attr-defined]
    forward.__doc__ = stock.__doc__
    members = {"forward": forward, "__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (ModalityMutual, base), members)


# Caches whose last prompt chunk ended in an image without a question: text in front of a prompt end must not follow.
_waiting: "WeakSet[Any]" = WeakSet()


def forward_with_spans(
    model: Any, stock: Callable[..., Any], given: dict[str, Any], types: Tensor | None, context: Tensor | None
) -> Any:
    """Find the spans of a call and hand them to `stock(model, **given)` as the keyword `mma_spans`.

    Args:
        model: a decoder, or a model around one, that passes keywords on to its attention layers.
        stock: its forward pass.
        given: the arguments of the call by name.
        types: mm_token_type_ids, see `build_mutual_spans`.
        context: context_mask, see `build_mutual_spans`.
    """
    settings = MutualSettings(**model.config.modality_mutual)
    ids, cache = given.get("input_ids"), given.get("past_key_values")
    past, padding = cached_tokens(cache), given.get("attention_mask")
    made = next(iter(padding.values()), None) if isinstance(padding, dict) else padding
    if isinstance(made, PreparedMask):  # generate made it already, for a static cache; here it is made again
        padding = given["attention_mask"] = made.padding
    spans, open_ended = given.pop("mma_spans", None), False
    if spans is None and settings.can_tell(ids, types):
        spans, open_ended = _find(settings, given, types, context, past, padding)
    if spans is not None and len(spans):
        given["mma_spans"] = _local(model, spans, given, past, padding)
    before = calls.with_spans
    outputs = stock(model, **given)
    if given.get("mma_spans") is not None and not torch.compiler.is_compiling() and calls.with_spans == before:
        raise BackendError(
            f"make_modality_mutual: {type(model).__name__} must pass keyword arguments on to its attention layers; the "
            "spans did not arrive. This architecture is not supported."
        )
    kept = cache if cache is not None else getattr(outputs, "past_key_values", None)
    if open_ended and kept is not None:
        _waiting.add(kept)
    return outputs


def _find(
    settings: MutualSettings,
    given: dict[str, Any],
    types: Tensor | None,
    context: Tensor | None,
    past: int,
    padding: Any,
) -> tuple[Tensor | None, bool]:
    """Spans of a call in absolute positions, and whether its last image still waits for the end of its prompt."""
    ids, cache = given.get("input_ids"), given.get("past_key_values")
    tokens: Tensor = ids if ids is not None else given["inputs_embeds"]
    width = tokens.shape[1]
    types = _own_part("mm_token_type_ids", types, past, width)
    _check_waiting(settings, ids, cache)
    images = types if types is not None else torch.eq(tokens, settings.image_token_id or 0)
    if settings.policy == "none" or not bool((images != 0).any()):
        return None, False
    context = _own_part("context_mask", context, past, width)
    valid = padding[:, past : past + width] if isinstance(padding, Tensor) and padding.ndim == 2 else None
    bounds = packed_boundaries(given.get("position_ids")) if padding is None and cache is None else None
    spans = _spans(settings, ids, types, context, valid, given.get("labels"), bounds)
    tag = settings.prompt_end_token_id
    waits = ids is not None and tag is not None and ends_in_an_image(ids, images, tag)
    return spans + torch.tensor([0, past, past, past, past], dtype=torch.int32, device=spans.device), waits


def _spans(
    settings: MutualSettings,
    ids: Tensor | None,
    types: Tensor | None,
    context: Tensor | None,
    padding: Tensor | None,
    labels: Tensor | None,
    bounds: Tensor | None,
) -> Tensor:
    return build_mutual_spans(
        ids,
        image_token_id=settings.image_token_id if types is None else None,
        mm_token_type_ids=types,
        prompt_end_token_id=settings.prompt_end_token_id if ids is not None else None,
        include_prompt_end=settings.include_prompt_end,
        labels=labels,
        context_mask=context,
        attention_mask=padding,
        cu_seqlens=bounds,
        policy=settings.policy,
    )


def _own_part(name: str, value: Tensor | None, past: int, width: int) -> Tensor | None:
    """The columns of this call: given alone, or as part of the whole sequence (what was generated since is text)."""
    if value is None or value.shape[-1] == width:
        return value
    if past == 0 or value.ndim != 2:
        raise ShapeError(
            f"forward: {name} must have shape (batch, {width}) like the tokens of the call; got {tuple(value.shape)}. "
            "One number for every token."
        )
    return torch.nn.functional.pad(value, (0, max(past + width - value.shape[1], 0)))[:, past : past + width]


def _local(model: Any, spans: Tensor, given: dict[str, Any], past: int, padding: Tensor | None) -> Tensor:
    """Check the spans of a call; q in rows of the call, k in absolute positions, on the model's device."""
    if attention_implementation(model) != NAME:
        raise ConfigError(
            f"forward: attn_implementation must be {NAME!r} for a prompt with images; got "
            f"{attention_implementation(model)!r}, which would drop what images may read (flash_attention_2 without a "
            f"word). Call model.set_attn_implementation({NAME!r})."
        )
    if padding is not None and not (isinstance(padding, Tensor) and padding.ndim == 2):
        raise ConfigError(
            "forward: attention_mask must be the (batch, seqlen) padding mask when there are spans; got "
            f"{getattr(padding, 'ndim', type(padding).__name__)} dimensions. A 4-D mask says everything itself: use "
            "attn_implementation='sdpa' and no images to look for."
        )
    tokens: Tensor = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
    batch, width = tokens.shape[:2]
    labels = given.get("labels")
    if labels is not None and past == 0:
        check_no_label_leak(labels, mma_mask(width, batch=batch, spans=spans, device=labels.device))
    rows = local_spans(spans, batch, past, width, past + width, plain_causal=True)
    return torch.tensor(rows, dtype=torch.int32).reshape(-1, 5).to(tokens.device)


def _check_waiting(settings: MutualSettings, ids: Tensor | None, cache: Any) -> None:
    if cache is None or cache not in _waiting or ids is None or settings.prompt_end_token_id is None:
        return
    if not bool(starts_of(ids, settings.prompt_end_token_id).any()):
        return
    if ids.shape[1] > 1:
        raise ConfigError(
            "forward: an image and its question must come in one call; got the end of a prompt whose image is in the "
            "cache already, where it could not read the question. Prefill them together."
        )
    _waiting.discard(cache)  # one token at a time is generation: a prompt end that the model itself says opens nothing
