"""A model that prunes before its own forward: calls narrowed, caches annotated, `generate` as it was.

What `mmkernels.prune` puts in front of a model's class, and models with a pruner built in derive from.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mmkernels.errors import BackendError, ConfigError
from mmkernels.interop.prune_call import Narrowed, Past, narrow_call, recall, remember
from mmkernels.interop.prune_decoder import DecoderRun, PromptRun
from mmkernels.interop.prune_layout import ImageTokens
from mmkernels.interop.prune_seams import Choice, Llava, MLMamba, seam_of
from mmkernels.interop.transformers import cached_tokens
from mmkernels.pruning.pruner import DecoderPruner


@dataclass
class Pruning:
    """How a model prunes, kept on the model.

    Attributes:
        choice: pruner of the vision side.
        decoder: pruner between layers of the decoder.
        compact: whether positions are counted anew where the vision side drops tokens.
        decoder_compact: whether they are between layers of the decoder.
        kept: of the last call with images, the patches that each image kept (crops counted through; -1: no patch); with
            a pruner of the decoder, for each row with images, which of all its visual tokens reached the end.
    """

    choice: Choice
    decoder: DecoderPruner | None = None
    compact: bool = True
    decoder_compact: bool = True
    kept: list[Tensor] = field(default_factory=list)


class PrunedModel:
    """What `prune` puts in front of a model's class."""

    _pruning: Pruning
    _stock: type

    def _maybe_prepare_encoder_kwargs_for_generation(
        self, inputs_tensor: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """`generate` encodes images before it repeats rows: so do we, pruned, once an image."""
        pruning: Pruning | None = self.__dict__.get("_pruning")
        config = next((a for a in (*args, *kwargs.values()) if hasattr(a, "prefill_chunk_size")), None)
        chunk = None if config is None else config.prefill_chunk_size
        if pruning is not None and chunk is not None and model_kwargs.get("pixel_values") is not None:
            raise ConfigError(
                f"generate: prefill_chunk_size must be left out with images that are pruned; got {chunk}. What goes is "
                "known in one call only."
            )
        here = pruning is not None and pruning.choice.pruner is not None and seam_of(self).placeholders
        if pruning is not None and here and model_kwargs.get("pixel_values") is not None:
            images = take_images(seam_of(self), pruning, model_kwargs)
            if images is not None:
                model_kwargs["mm_encoder_outputs"] = {"image": images}
            return model_kwargs
        return super()._maybe_prepare_encoder_kwargs_for_generation(  # type: ignore[misc]
            inputs_tensor, model_kwargs, *args, **kwargs
        )

    def _expand_multimodal_outputs(
        self, input_ids: Any, mm_encoder_output: Any, expand_size: int = 1, **kwargs: Any
    ) -> Any:
        """Repeat the images of each row as often as the row: all of them in order, then again."""
        images = mm_encoder_output.get("image")
        if not isinstance(images, list):
            return super()._expand_multimodal_outputs(input_ids, mm_encoder_output, expand_size, **kwargs)  # type: ignore[misc]
        counts, rows = (input_ids == seam_of(self).image_token_id).sum(-1).tolist(), []
        waiting = list(images)
        for count in counts:
            row: list[ImageTokens] = []
            while waiting and sum(image.full for image in row) < count:
                row.append(waiting.pop(0))
            rows += row * expand_size
        return {**mm_encoder_output, "image": rows + waiting}

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles name the stock class; its pruned subclass is made again."""
        stock = type(self).__dict__.get("_stock")
        if stock is None:
            return super().__reduce_ex__(protocol)
        return _revive, (stock,), self.__dict__


def _revive(stock: type) -> Any:
    return object.__new__(pruned_class(stock))


_made: dict[type, type] = {}


def pruned_class(base: type) -> type:
    """`base` that prunes; same name, so that a saved configuration names the stock architecture."""
    if base not in _made:
        stock: Callable[..., Any] = base.forward  # type: ignore[attr-defined]
        signature = inspect.signature(stock)
        names = [name for name, p in signature.parameters.items() if p.kind is not p.VAR_KEYWORD][1:]

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return forward_pruned(self, stock, {**dict(zip(names, args, strict=False)), **kwargs})

        forward.__signature__ = signature  # type: ignore[attr-defined]
        forward.__doc__ = stock.__doc__
        members: dict[str, Any] = {
            "forward": forward,
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "_stock": base,
        }
        if any(kind.__name__ in MLMamba.names for kind in base.__mro__):
            members["get_image_features"] = _image_features
        _made[base] = type(base.__name__, (PrunedModel, base), members)
    return _made[base]


def _image_features(self: Any, pixel_values: Tensor) -> Tensor:
    """Image embeddings of a model without placeholders, pruned."""
    pruning: Pruning = self._pruning
    seam = seam_of(self)
    assert isinstance(seam, MLMamba)
    tokens, patches = seam.features(pixel_values, pruning.choice)
    pruning.kept = patches
    return tokens


def take_images(seam: Llava, pruning: Pruning, given: dict[str, Any]) -> list[ImageTokens] | None:
    """The pruned images of a call, from its pixels or from `generate`, which has encoded them already."""
    encoded = given.get("mm_encoder_outputs") or {}
    if isinstance(encoded.get("image"), list):
        del given["mm_encoder_outputs"]
        for name in ("pixel_values", "image_sizes", "vision_feature_layer", "vision_feature_select_strategy"):
            if name in given:
                given[name] = None
        return list(encoded["image"])
    if encoded.get("image") is not None:
        raise ConfigError(
            "prune: mm_encoder_outputs must be left out; got images that were not pruned. Pass pixel_values."
        )
    images = seam.take(given, pruning.choice)
    if images is not None:
        pruning.kept = [image.patches.detach() for image in images]
    return images


@contextmanager
def _compiled_attention(seam: Llava) -> Iterator[None]:
    """Within, say which attention to take instead where flex attention does not compile."""
    try:
        yield
    except RuntimeError as error:
        failed = any(kind.__name__ == "BackendCompilerFailed" for kind in type(error).__mro__)
        if not failed or seam.config.get_text_config()._attn_implementation != "flex_attention":
            raise
        raise BackendError(
            f"prune: flex_attention must compile; got {type(error).__name__} of torch {torch.__version__}. On CPU it "
            "does not build for a cache that grows, pruned or not. Call model.set_attn_implementation('sdpa')."
        ) from error


def forward_pruned(model: Any, stock: Callable[..., Any], given: dict[str, Any]) -> Any:
    """`stock(model, **given)` with the tokens that stay.

    Args:
        model: a model that `prune` is attached to; without, this is the stock call.
        stock: its forward pass.
        given: the arguments of the call by name.
    """
    pruning: Pruning | None = model.__dict__.get("_pruning")
    past = recall(given.get("past_key_values"))
    if pruning is None and past is None:
        return stock(model, **given)
    seam = seam_of(model)
    if not seam.placeholders:
        return stock(model, **given)
    if pruning is not None and pruning.decoder is not None and _has_images(given, seam):
        return _prompt_through_layers(model, stock, given, seam, pruning, past)
    images = None if pruning is None or pruning.choice.pruner is None else take_images(seam, pruning, given)
    if images is None and past is None:
        return stock(model, **given)
    if given.get("mma_spans") is not None:
        raise ConfigError(
            "prune: the model must be made modality-mutual first and pruned afterwards; got spans of the unpruned "
            "prompt. Detach, call make_modality_mutual, and prune again."
        )
    compact = past.compact if past is not None else pruning is None or pruning.compact
    call = _narrow(given, seam, images, past, compact=compact)
    if images is not None:
        seam.hand_over(given, images)
    if past is None or not past.stages:
        with _compiled_attention(seam):
            outputs = stock(model, **given)
        return _remembered(outputs, given, call.past if call.changed else None)
    run = DecoderRun(seam.decoder, call.past, past.stages, given["position_ids"], given["past_key_values"])
    with run.hooked(), _compiled_attention(seam):
        outputs = stock(model, **given)
    return _remembered(outputs, given, replace(call.past, stages=run.stages()))


def _narrow(given: dict[str, Any], seam: Llava, images: Any, past: Past | None, **options: bool) -> Narrowed:
    always = options.pop("always", past is not None and bool(past.stages))
    token, start = seam.image_token_id, seam.position_start
    return narrow_call(given, images, past, image_token_id=token, position_start=start, always=always, **options)


def _remembered(outputs: Any, given: dict[str, Any], past: Past | None) -> Any:
    cache = getattr(outputs, "past_key_values", None) or given.get("past_key_values")
    if cache is not None and past is not None:
        remember(cache, past)
    return outputs


def _has_images(given: dict[str, Any], seam: Llava) -> bool:
    encoded = given.get("mm_encoder_outputs") or {}
    return given.get("pixel_values") is not None or encoded.get("image") is not None


def _prompt_through_layers(
    model: Any, stock: Callable[..., Any], given: dict[str, Any], seam: Llava, pruning: Pruning, past: Past | None
) -> Any:
    """A prompt with images whose tokens are dropped between layers; the loss is that of those that reach the end."""
    pruner = pruning.decoder
    assert pruner is not None
    ids = given.get("input_ids")
    if past is not None or cached_tokens(given.get("past_key_values")):
        raise ConfigError(
            f"prune: {pruner.name} must see a prompt whole; got images behind cached tokens. Prefill in one call (no "
            "prefill_chunk_size), with a new cache for a new image."
        )
    if ids is None or isinstance(given.get("logits_to_keep"), Tensor):
        raise ConfigError(
            f"prune: {pruner.name} must get input_ids, and for logits_to_keep a number; got "
            f"{'inputs_embeds' if ids is None else 'indices, whose columns move'}. Pass what the processor made."
        )
    images = None if pruning.choice.pruner is None else take_images(seam, pruning, given)
    whole = ids == seam.image_token_id
    call = _narrow(given, seam, images, None, compact=pruning.compact, always=True)
    labels = given.pop("labels", None)
    if images is not None:
        seam.hand_over(given, images)
    prompt = call.past.mask
    if labels is not None:
        prompt = prompt & ((labels != -100).cumsum(-1) == 0)
    cache, positions = given.get("past_key_values"), given["position_ids"]
    visual = whole if call.visual is None else call.visual
    others = {"decoder": seam.decoder, "past": call.past, "positions": positions, "cache": cache}
    run = PromptRun(pruner, visual, prompt, pruning.decoder_compact, **others)
    with run.hooked(), _compiled_attention(seam):
        outputs = stock(model, **given)
    pruning.kept = run.kept(visual)
    if images is not None:
        pruning.kept = _in_the_whole(pruning.kept, visual, whole, images)
    if labels is not None:
        outputs = _with_loss(model, outputs, run.take_labels(labels), given)
    past = replace(call.past, stages=run.stages()) if run.stages() or call.changed else None
    return _remembered(outputs, given, past)


def _in_the_whole(kept: list[Tensor], visual: Tensor, whole: Tensor, images: list[ImageTokens]) -> list[Tensor]:
    """Places among the tokens that the vision side left of a row, as places among all that the row had."""
    rows, waiting, left = [], list(images), iter(kept)
    for had, stays in zip(whole.sum(1).tolist(), visual.any(1).tolist(), strict=True):
        places, start = [], 0
        while start < had:
            image = waiting.pop(0)
            places.append(image.places.to(visual.device) + start)
            start += image.full
        if stays:
            rows.append(torch.cat(places)[next(left)])
    return rows


def _with_loss(model: Any, outputs: Any, labels: Tensor, given: dict[str, Any]) -> Any:
    if not hasattr(outputs, "logits"):
        raise ConfigError("prune: return_dict must be left True with labels and layers that drop tokens; got tuples.")
    counted = {name: given[name] for name in ("num_items_in_batch",) if name in given}
    size = model.config.get_text_config().vocab_size
    loss = model.loss_function(logits=outputs.logits, labels=labels, vocab_size=size, **counted)
    return type(outputs)(**{**outputs, "loss": loss})
