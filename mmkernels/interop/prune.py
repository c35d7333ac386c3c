"""mmkernels.prune: a transformers model that reads fewer visual tokens, for a block of code or for good.

The model's object gets a subclass of its own class, whose `forward` prunes first (prune_model.py); the class itself,
every weight and the configuration stay as they are.
"""

from collections.abc import Sequence
from dataclasses import replace
from types import MethodType
from typing import Any, Literal

from torch import Tensor

from mmkernels.errors import BackendError, ConfigError, nearest
from mmkernels.interop.prune_decoder import check_decoder
from mmkernels.interop.prune_merging import check_blocks
from mmkernels.interop.prune_model import PrunedModel, Pruning, pruned_class
from mmkernels.interop.prune_seams import Choice, seam_of
from mmkernels.pruning.pruner import DecoderPruner, TokenPruner
from mmkernels.pruning.registry import get_pruner
from mmkernels.pruning.tome import ToMe

Policy = Literal["compact", "original"]
_POLICIES = ("compact", "original")


class Attached:
    """A pruned model's handle: a context manager, or `detach()` when the time has come.

    Attributes:
        model: the model.
        pruner: what prunes it; a tuple of what was given as a list.
    """

    def __init__(
        self,
        model: Any,
        pruner: TokenPruner | tuple[TokenPruner, ...],
        pruning: Pruning,
        before: Pruning | None,
    ):
        self.model, self.pruner = model, pruner
        self._pruning, self._before = pruning, before

    @property
    def kept(self) -> list[Tensor]:
        """What the last call with images kept, (n,) int64 each.

        Of each image the patches, crops counted through, -1 for tokens of no patch; with a pruner of the decoder, of
        each row with images those of all its visual tokens that reached the end (a token made of several has the place
        it stands at).  Of the calls under this handle: not of those under another one inside it.
        """
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
            _rewire(self.model)

    def __enter__(self) -> "Attached":
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def __repr__(self) -> str:
        return f"Attached({type(self.model).__name__}, {self.pruner!r})"


def prune(
    model: Any,
    pruner: TokenPruner | str | Sequence[TokenPruner | str],
    *,
    position_policy: Policy | None = None,
    skip_padding: bool = True,
    **options: Any,
) -> Attached:
    """Make a model read fewer visual tokens, for a block of code or for good.

    Images are encoded as before, their tokens pruned, and the placeholders, mask, labels, positions and token types of
    every call narrowed to what stays.  Processor and `generate` are used as before: prompts have every placeholder, and
    `generate` returns them.  Logits of a direct call have one column a token that stays.

    A model has room for one pruner of the vision side and one between layers of its decoder.  Each takes the place of
    the one on its own side and works together with the one on the other, whichever came first: the decoder's sees what
    the vision side left, and its budget counts that.

    Args:
        model: LlavaForConditionalGeneration, LlavaNextForConditionalGeneration, PaliGemmaForConditionalGeneration,
            AkiForConditionalGeneration, MLMambaForConditionalGeneration, or the model inside one.
        pruner: a TokenPruner, or its name with its options: `prune(model, "vtc_cls", num_keep=64)`; or a list of two,
            one for each side, in any order.
        position_policy: "compact": positions are counted anew, as if the prompt were that short; "original": every
            token keeps the position it had.  None: compact, but between decoder layers what the pruner says.
        skip_padding: LLaVA-NeXT cuts the padding off its stitched tiles: True keeps those patches out of the choice,
            False chooses among all of them first, as the published programs do (then fewer than asked for remain).
        **options: of the pruner named.

    Returns:
        handle: a context manager; `handle.detach()` undoes it, `handle.kept` are the patches of the last call.

    Raises:
        BackendError: a model whose placeholders cannot be shrunk, or a tower whose queries and keys cannot be seen.
        ConfigError: an unknown pruner, two of one side, layers out of range, an encoder without [CLS] for a pruner that
            needs one.
        ShapeError: more tokens to keep than an image has.

    Numerics: features of kept tokens are those of the unpruned model, bit for bit; keeping all of them changes no bit.
    Cost: the tower up to the last layer that is used, plus the rows of attention asked for; no attention maps, whatever
        the attention implementation.  Without gradients on CPU, activations overwrite their inputs.

    Example:
        >>> import mmkernels
        >>> with mmkernels.prune(model, "vtc_cls", num_keep=64):  # doctest: +SKIP
        ...     model.generate(**processor(images=image, text=prompt, return_tensors="pt"))

    Source: VTC-CLS, arXiv 2412.05819, for the family; checked against eager attention maps.
    """
    chosen = _pruners(pruner, options)
    if position_policy is not None and position_policy not in _POLICIES:
        raise ConfigError(
            f"prune: position_policy must be 'compact' or 'original'; got {position_policy!r}. "
            f"{nearest(str(position_policy), _POLICIES)}"
        )
    before = getattr(model, "__dict__", {}).get("_pruning")
    pruning = _pruning(model, chosen, before, position_policy, skip_padding)
    if not isinstance(model, PrunedModel):
        if "forward" in model.__dict__ and "_old_forward" not in model.__dict__:
            raise ConfigError(
                "prune: model must have its class's forward; somebody has put another in front of it (mixed precision "
                "of accelerate does). Prune first, then prepare the model."
            )
        model.__class__ = pruned_class(type(model))
        _rewire(model)
    model._pruning = pruning
    return Attached(model, chosen[0] if len(chosen) == 1 else tuple(chosen), pruning, before)


def _pruning(
    model: Any, chosen: list[TokenPruner], before: Pruning | None, policy: Policy | None, skip_padding: bool
) -> Pruning:
    """How a model will prune: as before, but for the sides that there is a new pruner for."""
    made = Pruning(Choice(None)) if before is None else replace(before, kept=[])
    for pruner in chosen:
        if isinstance(pruner, DecoderPruner):
            _check_decoder_pruner(model, pruner)
            made = replace(made, decoder=pruner, decoder_compact=(policy or pruner.position_policy) == "compact")
        else:
            check_pruner(model, pruner)
            made = replace(made, choice=Choice(pruner, skip_padding), compact=policy != "original")
    return made


def _check_decoder_pruner(model: Any, pruner: DecoderPruner) -> None:
    seam = seam_of(model)
    if not seam.plain_decoder or hasattr(model.config, "modality_mutual"):
        raise BackendError(
            f"prune: {pruner.name} must have a causal decoder; {type(model).__name__} lets images read what "
            "follows them. Use a pruner of the vision side, such as vtc_cls."
        )
    check_decoder(seam.decoder, pruner)


def _rewire(model: Any) -> None:
    """The forward that hooks of accelerate (device_map over several devices) wrap: the present class's."""
    if "_old_forward" in model.__dict__:
        model._old_forward = MethodType(type(model).forward, model)


def _pruners(given: Any, options: dict[str, Any]) -> list[TokenPruner]:
    """What was asked for: one pruner, or one for each side."""
    if isinstance(given, str):
        return [get_pruner(given, **options)]
    many = isinstance(given, list | tuple)
    if options:
        raise ConfigError(
            f"prune: options must come with a pruner's name; got {', '.join(options)} beside {given!r}. "
            "Give them to get_pruner."
        )
    chosen = [get_pruner(one) if isinstance(one, str) else one for one in (given if many else [given])]
    for one in chosen:
        if not isinstance(one, TokenPruner):
            raise ConfigError(
                f"prune: pruner must be a TokenPruner or a name; got {type(one).__name__}. Make one with get_pruner."
            )
    sides = [isinstance(one, DecoderPruner) for one in chosen]
    if not chosen or len(set(sides)) != len(sides):
        raise ConfigError(
            "prune: pruner must be one, or one of the vision side and one of the decoder; got "
            f"{' and '.join(one.name for one in chosen) or 'none'}. Take one of each side."
        )
    return chosen


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
        if not seam.merges:
            raise ConfigError(
                f"prune: tome must have a tower whose tokens are the image's; {type(model).__name__} mixes them behind "
                "it. Use a pruner that works before the projector, such as vtc_cls."
            )
        check_blocks(seam.tower)
        pruner.schedule(encoder)
    elif pruner.num_keep is not None and getattr(pruner, "scope", "image") == "image":
        pruner.count(encoder.grid[0] * encoder.grid[1])
