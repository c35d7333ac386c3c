"""The two kinds of distillation step as functions of (student, teacher, batch), and the parameters each stage trains.

Source: mmMamba (arXiv 2502.13145) section 4.2; where paper and official code differ, both are options.
"""

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.distill.linearize import layers_of, linear_layers
from mmkernels.distill.losses import layer_errors, logit_kl, token_mask
from mmkernels.errors import ConfigError, DataError, ShapeError, nearest

MODEL_INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "attention_mask", "position_ids", "mm_token_type_ids")
TARGETS = ("context", "block_output")
# patterns of names inside a linear layer's mixer
TRAINABLE: dict[str, tuple[str, ...]] = {
    "mixer_new": ("in_proj.*", "conv1d.*", "g_proj.*", "g_norm.*", "D", "q_norm.*", "k_norm.*"),
    "mixer_decay": ("dt_bias", "A_log_bias"),
    "qkv": ("q_proj.*", "k_proj.*", "v_proj.*"),
    "o_proj": ("o_proj.*",),
}


def trainable_names(student: Any, trainable: Sequence[str]) -> list[str]:
    """Names of the parameters that a stage trains, in the model's order.

    Args:
        student: a model with linear layers.
        trainable: sets (`TRAINABLE`: "mixer_new", "mixer_decay", "qkv", "o_proj": only inside linear layers) or
            patterns of full parameter names with a dot or a star, e.g. "*.mlp.*".

    Raises:
        ConfigError: an unknown set, or an entry that matches no parameter.
    """
    modules = {id(module): name for name, module in student.named_modules()}
    layers = layers_of(student, "trainable_names")
    mixers = tuple(f"{modules[id(layers[i].mixer)]}." for i in linear_layers(student))
    names = [name for name, _ in student.named_parameters()]
    chosen: set[str] = set()
    for entry in trainable:
        if entry in TRAINABLE:
            inside = [(name, prefix) for name in names for prefix in mixers if name.startswith(prefix)]
            patterns = TRAINABLE[entry]
            found = {n for n, prefix in inside if any(fnmatch.fnmatchcase(n[len(prefix) :], p) for p in patterns)}
        elif "." in entry or "*" in entry:
            found = {name for name in names if fnmatch.fnmatchcase(name, entry)}
        else:
            raise ConfigError(
                f"trainable_names: trainable must hold known sets or patterns of names; got {entry!r}. "
                f"{nearest(entry, TRAINABLE)}"
            )
        if not found:
            raise ConfigError(
                f"trainable_names: trainable must match parameters of the student; got {entry!r}, which matches none "
                f"(linear layers: {linear_layers(student)}). Linearize the model, or correct the pattern."
            )
        chosen |= found
    return [name for name in names if name in chosen]


def set_trainable(student: Any, trainable: Sequence[str]) -> list[str]:
    """Sets `requires_grad` on exactly the parameters of `trainable_names` and returns their names."""
    names = trainable_names(student, trainable)
    wanted = set(names)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in wanted)
    return names


@dataclass
class MixerRecord:
    """What went through the mixers in one forward pass, by global layer index; all (batch, seqlen, channels)."""

    inputs: dict[int, Tensor] = field(default_factory=dict)
    contexts: dict[int, Tensor] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)


@contextmanager
def capture_mixers(model: Any, layers: Sequence[int] | None = None) -> Iterator[MixerRecord]:
    """Records, while open, each mixer's input u, its context (the input of W_O) and its output.

    Args:
        model: a model with `decoder_layers()`.
        layers: global indices; None = all.

    Yields:
        A `MixerRecord`, filled by every forward pass; the latest pass wins.  Nothing is computed twice or changed.
    """
    record = MixerRecord()
    all_layers = layers_of(model, "capture_mixers")
    handles = []

    def watch(index: int, mixer: nn.Module) -> None:
        def before(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            record.inputs[index] = args[0] if args else next(iter(kwargs.values()))

        def before_output(_: nn.Module, args: tuple) -> None:
            record.contexts[index] = args[0].flatten(2)

        def after(_: nn.Module, args: tuple, output: Any) -> None:
            record.outputs[index] = output[0] if isinstance(output, tuple) else output

        handles.append(mixer.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(mixer.get_submodule("o_proj").register_forward_pre_hook(before_output))
        handles.append(mixer.register_forward_hook(after))

    for index in range(len(all_layers)) if layers is None else layers:
        watch(index, all_layers[index].mixer)
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a data batch that the models take; labels and the like stay behind.

    Raises:
        DataError: neither input_ids nor inputs_embeds is there.
    """
    given = {name: batch[name] for name in MODEL_INPUTS if batch.get(name) is not None}
    if "input_ids" not in given and "inputs_embeds" not in given:
        raise DataError(f"model_inputs: batch must hold input_ids or inputs_embeds; got {sorted(batch)}. Fix the data.")
    return given


@dataclass(frozen=True)
class StageLoss:
    """A scalar to differentiate, and detached numbers worth logging."""

    loss: Tensor
    metrics: dict[str, Tensor]


def layerwise_loss(
    student: Any,
    teacher: Any,
    batch: Mapping[str, Any],
    *,
    target: str = "block_output",
    mask: str = "non_pad",
    scale: float = 1000.0,
    reduction: str = "element_mean",
) -> StageLoss:
    """Stages 1 and 2: every student mixer imitates the teacher's on the teacher's own hidden state.

    loss = scale * mean over linear layers i of MSE(mixer_i(u_i), teacher mixer_i(u_i)),  u_i = teacher mixer's input

    The network runs as the teacher, so errors do not pile up over depth and gradients are local to a layer.

    Args:
        student: its linear layers are trained; kept attention layers take no part.
        teacher: same layers, run under no_grad.
        batch: model inputs; `labels` or `answer_mask` for the mask "answer".
        target: "context" compares before W_O (official code), "block_output" after it (the paper's figure).
        mask: "all" (official code: padding included), "non_pad" or "answer".
        scale, reduction: see `layerwise_mse`.

    Returns:
        The loss and the metrics mse (unscaled mean), mse_max (the worst layer) and relative (mean of MSE over the mean
        square of the target: 1 = as bad as predicting zero).

    Raises:
        ConfigError: an unknown option, or a student without linear layers or of another depth.

    Source: mmMamba section 4.2, stages 1 and 2.
    """
    if target not in TARGETS:
        raise ConfigError(f"layerwise_loss: target must be known; got {target!r}. {nearest(target, TARGETS)}")
    chosen = linear_layers(student)
    layers = layers_of(student, "layerwise_loss")
    if not chosen or len(layers) != len(layers_of(teacher, "layerwise_loss")):
        raise ConfigError(
            f"layerwise_loss: student must have linear layers and the teacher's depth; got layer_types "
            f"{student.config.layer_types}. Make the student with linearize(teacher)."
        )
    inputs = model_inputs(batch)
    with torch.no_grad(), capture_mixers(teacher, chosen) as record:
        teacher(**inputs, use_cache=False, logits_to_keep=1)  # the head is not needed; one position is the least
    packing = _packing(inputs)
    ours = []
    for index in chosen:
        mixer = layers[index].mixer
        context = mixer.context(record.inputs[index], **packing).flatten(2)
        ours.append(context if target == "context" else mixer.o_proj(context))
    goals = [(record.contexts if target == "context" else record.outputs)[index] for index in chosen]
    counted = token_mask(mask, batch)
    errors = layer_errors(ours, goals, counted, reduction=reduction)
    with torch.no_grad():
        size = layer_errors([torch.zeros_like(goal) for goal in goals], goals, counted, reduction=reduction)
        relative = errors / size.clamp_min(torch.finfo(size.dtype).tiny)
        metrics = {"mse": errors.mean(), "mse_max": errors.max(), "relative": relative.mean()}
    return StageLoss(scale * errors.mean(), metrics)


def _packing(inputs: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """What a linear mixer must know of the sequence layout, as the model itself derives it."""
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if mask is not None or positions is None:
        return {"attention_mask": mask}
    from mmkernels.models.mmmamba.modeling_mmmamba import packed_index

    ids = packed_index(positions)
    tokens = inputs.get("input_ids", inputs.get("inputs_embeds"))
    return {"seq_idx": None if ids is None or tokens is None else ids.expand(tokens.shape[0], -1)}


def logit_loss(
    student: Any,
    teacher: Any,
    batch: Mapping[str, Any],
    *,
    temperature: float = 1.0,
    reduction: str = "sequence_sum",
    mask: str = "all",
) -> StageLoss:
    """Stage 3: the student, on its own hidden states, imitates the teacher's next-token distribution.

    loss = KL(teacher || student), see `logit_kl`.

    Args:
        student, teacher: models with one vocabulary; the teacher runs under no_grad.
        batch: model inputs; `labels` or `answer_mask` for the mask "answer".
        temperature, reduction: see `logit_kl`.
        mask: "all" (official code), "non_pad" or "answer".

    Returns:
        The loss and the metrics kl (per counted position) and agreement (share of positions with the same top word).

    Raises:
        ConfigError, ShapeError: see `logit_kl` and `token_mask`.

    Source: mmMamba section 4.2, stage 3.
    """
    inputs = model_inputs(batch)
    with torch.no_grad():
        goal = teacher(**inputs, use_cache=False).logits
    logits = student(**inputs, use_cache=False).logits
    counted = token_mask(mask, batch)
    loss = logit_kl(logits, goal, counted, temperature=temperature, reduction=reduction)
    with torch.no_grad():
        same = logits.argmax(-1) == goal.argmax(-1)
        positions = same.numel() if counted is None else int(counted.sum())
        agreement = (same if counted is None else same & counted).sum() / max(1, positions)
        per_token = loss.detach() * (1 if reduction == "token_mean" else goal.shape[0] / max(1, positions))
    return StageLoss(loss, {"kl": per_token, "agreement": agreement})


def check_pair(student: Any, teacher: Any) -> None:
    """Refuses a student and teacher that cannot be compared.

    Raises:
        ShapeError: another depth, width or vocabulary.
    """
    for name in ("vocab_size", "hidden_size"):
        ours, theirs = getattr(student.config, name), getattr(teacher.config, name)
        if ours != theirs:
            raise ShapeError(
                f"check_pair: student must have the teacher's {name} {theirs}; got {ours}. Use linearize(teacher)."
            )
    depth = len(layers_of(teacher, "check_pair"))
    if len(layers_of(student, "check_pair")) != depth:
        raise ShapeError(
            f"check_pair: student must have the teacher's {depth} layers; got {len(student.decoder_layers())}. "
            "Use linearize(teacher)."
        )
