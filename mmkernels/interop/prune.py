"""mmkernels.prune: a transformers model that reads fewer visual tokens, for a block of code or for good.

The model's object gets a subclass of its own class, whose `forward` prunes first; the class itself, every weight and
the configuration stay as they are.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from mmkernels.errors import BackendError, ConfigError, nearest
from mmkernels.interop.prune_call import Narrowed, Past, narrow_call, recall, remember
from mmkernels.interop.prune_decoder import DecoderRun, PromptRun, check_decoder
from mmkernels.interop.prune_layout import ImageTokens
from mmkernels.interop.prune_merging import check_blocks
from mmkernels.interop.prune_seams import Choice, Llava, seam_of
from mmkernels.interop.transformers import cached_tokens
from mmkernels.pruning.pruner import DecoderPruner, TokenPruner
from mmkernels.pruning.registry import get_pruner
from mmkernels.pruning.tome import ToMe

Policy = Literal["compact", "original"]
_POLICIES = ("compact", "original")


@dataclass
class Pruning:
    """How a model prunes, kept on the model.

    Attributes:
        choice: pruner of the vision side.
        decoder: pruner between layers of the decoder.
        compact: whether positions are counted anew.
        kept: of the last call with images, the patches that each image kept (crops counted through; -1: no patch).
    """

    choice: Choice
    decoder: DecoderPruner | None = None
    compact: bool = True
    kept: list[Tensor] = field(default_factory=list)


class Attached:
    """A pruned model's handle: a context manager, or `detach()` when the time has come.

    Attributes:
        model: the model.
        pruner: what prunes it.
    """

    def __init__(self, model: Any, pruner: TokenPruner, pruning: Pruning, before: Pruning | None):
        self.model, self.pruner = model, pruner
        self._pruning, self._before = pruning, before

    @property
    def kept(self) -> list[Tensor]:
        """The patches each image of the last call kept, (n,) int64 each; crops counted through, -1: no patch."""
        return self._pruning.kept

    def detach(self) -> None:
        """Give the model back as it was.

        Raises:
            ConfigError: it was pruned again since, or is detached already.
        """
        if self.model.__dict__.get("_pruning") is not self._pruning:
            raise ConfigError(
                "detach: the model must be pruned by this handle; it is not any more. Detach the handles of one model "
                "in reverse order, each once."
            )
        if self._before is not None:
            self.model._pruning = self._before
            return
        del self.model.__dict__["_pruning"]
        stock = type(self.model).__dict__.get("_stock")
        if stock is not None:
            self.model.__class__ = stock

    def __enter__(self) -> "Attached":
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def __repr__(self) -> str:
        return f"Attached({type(self.model).__name__}, {self.pruner!r})"


def prune(
    model: Any,
    pruner: TokenPruner | str,
    *,
    position_policy: Policy = "compact",
    skip_padding: bool = True,
    **options: Any,
) -> Attached:
    """Make a model read fewer visual tokens, for a block of code or for good.

    Images are encoded as before, their tokens pruned, and the placeholders, mask, labels, positions and token types of
    every call narrowed to what stays.  Processor and `generate` are used as before: prompts have every placeholder, and
    `generate` returns them.  Logits of a direct call have one column a token that stays.

    Args:
        model: LlavaForConditionalGeneration, LlavaNextForConditionalGeneration, PaliGemmaForConditionalGeneration,
            AkiForConditionalGeneration, or the model inside one.  Others: `mmkernels.prune` says which.
        pruner: a TokenPruner, or its name with its options: `prune(model, "vtc_cls", num_keep=64)`.
        position_policy: "compact": positions are counted anew, as if the prompt were that short; "original": every
            token keeps the position it had.
        skip_padding: LLaVA-NeXT cuts the padding off its stitched tiles: True keeps those patches out of the choice,
            False chooses among all of them first, as the published programs do (then fewer than asked for remain).
        **options: of the pruner named.

    Returns:
        handle: a context manager; `handle.detach()` undoes it, `handle.kept` are the patches of the last call.

    Raises:
        BackendError: a model whose placeholders cannot be shrunk, or a tower whose queries and keys cannot be seen.
        ConfigError: an unknown pruner, layers out of range, an encoder without [CLS] for a pruner that needs one.
        ShapeError: more tokens to keep than an image has.

    Numerics: features of kept tokens are those of the unpruned model, bit for bit; keeping all of them changes no bit.
    Cost: the tower up to the last layer that is used, plus the rows of attention asked for; no attention maps, whatever
        the attention implementation.

    Example:
        >>> import mmkernels
        >>> with mmkernels.prune(model, "vtc_cls", num_keep=64):  # doctest: +SKIP
        ...     model.generate(**processor(images=image, text=prompt, return_tensors="pt"))

    Source: VTC-CLS, arXiv 2412.05819, for the family; checked against eager attention maps.
    """
    chosen = _pruner(pruner, options)
    if position_policy not in _POLICIES:
        raise ConfigError(
            f"prune: position_policy must be 'compact' or 'original'; got {position_policy!r}. "
            f"{nearest(str(position_policy), _POLICIES)}"
        )
    seam = seam_of(model)
    if isinstance(chosen, DecoderPruner):
        if not seam.plain_decoder or hasattr(model.config, "modality_mutual"):
            raise BackendError(
                f"prune: {chosen.name} must have a causal decoder; {type(model).__name__} lets images read what "
                "follows them. Use a pruner of the vision side, such as vtc_cls."
            )
        check_decoder(seam.decoder, chosen)
        pruning = Pruning(Choice(None), chosen)
    else:
        check_pruner(model, chosen)
        pruning = Pruning(Choice(chosen, skip_padding), compact=position_policy == "compact")
    before = model.__dict__.get("_pruning")
    if not isinstance(model, PrunedModel):
        model.__class__ = pruned_class(type(model))
    model._pruning = pruning
    return Attached(model, chosen, pruning, before)


def _pruner(pruner: TokenPruner | str, options: dict[str, Any]) -> TokenPruner:
    if isinstance(pruner, str):
        return get_pruner(pruner, **options)
    if not isinstance(pruner, TokenPruner):
        raise ConfigError(
            f"prune: pruner must be a TokenPruner or a name; got {type(pruner).__name__}. Make one with get_pruner."
        )
    if options:
        raise ConfigError(
            f"prune: options must come with a pruner's name; got {', '.join(options)} beside {pruner!r}. "
            "Give them to get_pruner."
        )
    return pruner


def check_pruner(model: Any, pruner: TokenPruner) -> None:
    """Refuse a pruner of the vision side that does not suit a model: all that can be known before an image comes.

    Raises:
        ConfigError: layers the encoder has not, or no [CLS].
        ShapeError: more tokens to keep than an image has.
    """
    seam = seam_of(model)
    encoder = seam.encoder()
    for tap in pruner.taps(encoder):
        if not 0 <= tap.layer < encoder.num_layers:
            raise ConfigError(
                f"prune: {pruner!r} must read layers 0 .. {encoder.num_layers - 1} of the encoder; it wants {tap}. "
                "Lower its number of layers."
            )
    if isinstance(pruner, ToMe):
        check_blocks(seam.tower)
        pruner.schedule(encoder)
    elif pruner.num_keep is not None and getattr(pruner, "scope", "image") == "image":
        pruner.count(encoder.grid[0] * encoder.grid[1])


class PrunedModel:
    """What `prune` puts in front of a model's class."""

    _pruning: Pruning
    _stock: type

    def _maybe_prepare_encoder_kwargs_for_generation(
        self, inputs_tensor: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """`generate` encodes images before it repeats rows: so do we, pruned, once an image."""
        pruning = self.__dict__.get("_pruning")
        here = pruning is not None and pruning.choice.pruner is not None
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
        members = {"forward": forward, "__module__": base.__module__, "__qualname__": base.__qualname__, "_stock": base}
        _made[base] = type(base.__name__, (PrunedModel, base), members)
    return _made[base]


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
    if pruning is not None and pruning.decoder is not None and _has_images(given, seam):
        return _prompt_through_layers(model, stock, given, seam, pruning.decoder, past)
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
        return _remembered(stock(model, **given), given, call.past if call.changed else None)
    run = DecoderRun(seam.decoder, call.past, past.stages, given["position_ids"], given["past_key_values"])
    with run.hooked():
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
    model: Any, stock: Callable[..., Any], given: dict[str, Any], seam: Llava, pruner: DecoderPruner, past: Past | None
) -> Any:
    """A prompt with images whose tokens are dropped between layers; the loss is that of those that reach the end."""
    ids, labels = given.get("input_ids"), given.pop("labels", None)
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
    call = _narrow(given, seam, None, None, compact=True, always=True)
    prompt = call.past.mask
    if labels is not None:
        prompt = prompt & ((labels != -100).cumsum(-1) == 0)
    cache, positions = given.get("past_key_values"), given["position_ids"]
    visual = ids == seam.image_token_id
    run = PromptRun(pruner, visual, prompt, decoder=seam.decoder, past=call.past, positions=positions, cache=cache)
    with run.hooked():
        outputs = stock(model, **given)
    if labels is not None:
        outputs = _with_loss(model, outputs, run.take_labels(labels), given)
    return _remembered(outputs, given, replace(call.past, stages=run.stages()) if run.stages() else None)


def _with_loss(model: Any, outputs: Any, labels: Tensor, given: dict[str, Any]) -> Any:
    if not hasattr(outputs, "logits"):
        raise ConfigError("prune: return_dict must be left True with labels and layers that drop tokens; got tuples.")
    counted = {name: given[name] for name in ("num_items_in_batch",) if name in given}
    size = model.config.get_text_config().vocab_size
    loss = model.loss_function(logits=outputs.logits, labels=labels, vocab_size=size, **counted)
    return type(outputs)(**{**outputs, "loss": loss})
