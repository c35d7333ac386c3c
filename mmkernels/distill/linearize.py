"""Turns a trained attention model into a linear-time or hybrid student of the same class, and back at chosen layers.

Source: mmMamba (arXiv 2502.13145) sections 4.1 and 4.5.
"""

import copy
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mmkernels.distill.seeding import STRATEGIES, seed_mixer
from mmkernels.errors import ConfigError, nearest

FULL, LINEAR = "full_attention", "linear_attention"
PATTERNS: dict[str, Callable[[int, int], list[int]]] = {
    "head_interleaved": lambda n, k: list(range(0, n, k)),
    "tail_interleaved": lambda n, k: list(range(k - 1, n, k)),
    "head_stacked": lambda n, k: list(range(min(k, n))),
    "tail_stacked": lambda n, k: list(range(max(0, n - k), n)),
}
ModelT = TypeVar("ModelT", bound=Any)


def parse_keep_attention(keep_attention: str | Sequence[int], num_layers: int) -> tuple[int, ...]:
    """The global indices of the layers that keep softmax attention.

    Args:
        keep_attention: indices (embedding layers first; negative ones are refused), or "none", or a pattern "name:k":
            head_interleaved:k the first of every k layers, tail_interleaved:k the last of every k,
            head_stacked:k the first k, tail_stacked:k the last k.
        num_layers: layers of the whole model.

    Raises:
        ConfigError: an index out of range or given twice, or an unknown pattern.

    Example:
        >>> parse_keep_attention("head_interleaved:4", 32)
        (0, 4, 8, 12, 16, 20, 24, 28)

    Source: mmMamba section 4.5 and its ablation of placements (Table 6).
    """
    if isinstance(keep_attention, str):
        if keep_attention == "none":
            return ()
        match = re.fullmatch(r"([a-z_]+):(\d+)", keep_attention)
        name = match.group(1) if match else keep_attention.split(":")[0]
        if match is None or name not in PATTERNS or int(match.group(2)) < 1:
            raise ConfigError(
                f"linearize: keep_attention must be indices, 'none' or 'pattern:k', k >= 1; got {keep_attention!r}. "
                f"{nearest(name, ['none', *PATTERNS])}"
            )
        return tuple(PATTERNS[name](num_layers, int(match.group(2))))
    indices = tuple(keep_attention)
    wrong = [i for i in indices if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < num_layers]
    if wrong or len(set(indices)) != len(indices):
        raise ConfigError(
            f"linearize: keep_attention must hold different layer indices from 0 to {num_layers - 1}; got "
            f"{list(indices)}. Indices are global: embedding layers come first."
        )
    return tuple(sorted(indices))


def linearize(
    model: ModelT, keep_attention: str | Sequence[int] = (), *, seeding: str = "inherit_mimic", seed: int = 0
) -> ModelT:
    """A new model of the same class whose attention layers, but for the kept ones, are seeded Mamba-2 mixers.

    Every other parameter is a copy: the student never shares storage with the teacher.  `requires_grad` of copied
    parameters is the teacher's; new mixers require gradients.  Layers that are linear already stay as they are.

    Args:
        model: an mmMamba-family model (`decoder_layers()`, `config.layer_types`, mixers with q_proj .. o_proj).
        keep_attention: layers that keep attention, see `parse_keep_attention`.
        seeding: "scratch", "inherit" or "inherit_mimic", see `seed_mixer`.
        seed: seeds the new parameters; torch's global random state is not touched.

    Returns:
        The student, on the model's devices and in its dtypes, in its train/eval mode.

    Raises:
        ConfigError: a bad argument, a kept layer without attention, or a model of another family.

    Example:
        >>> student = linearize(teacher, "head_interleaved:4")  # doctest: +SKIP
        >>> student.config.layer_types[:2]  # doctest: +SKIP
        ['full_attention', 'linear_attention']

    Source: mmMamba sections 4.1, 4.5.
    """
    layers = layers_of(model, "linearize")
    if seeding not in STRATEGIES:
        raise ConfigError(f"linearize: seeding must be known; got {seeding!r}. {nearest(seeding, STRATEGIES)}")
    keep = parse_keep_attention(keep_attention, len(layers))
    types = list(model.config.layer_types)
    linear_already = [i for i in keep if types[i] != FULL]
    if linear_already:
        raise ConfigError(
            f"linearize: keep_attention must name layers that have attention; got {linear_already}, which are linear "
            "already. Use restore_attention(student, teacher, ..) to bring attention back."
        )
    new = [i for i, kind in enumerate(types) if kind == FULL and i not in keep]
    student = _skeleton(model, [LINEAR if i in new else kind for i, kind in enumerate(types)])
    generator = torch.Generator().manual_seed(seed)
    mixers: dict[int, nn.Module] = {}
    for i in new:
        old, mixers[i] = layers[i].mixer, student.decoder_layers()[i].mixer
        weights = [old.get_submodule(name).weight for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
        _materialise(student, mixers[i], weights[0])
        seed_mixer(mixers[i], *weights, strategy=seeding, generator=generator)  # type: ignore[arg-type]
    return _fill(student, model, mixers)


def restore_attention(student: ModelT, teacher: ModelT, keep_attention: str | Sequence[int]) -> ModelT:
    """A new model: the student with the teacher's attention back at the given layers; hybrids can start at any stage.

    Args:
        student: a (partly) linear model, usually after the layer-wise stages.
        teacher: the model it was made from, with attention at the kept layers.
        keep_attention: layers that get attention, see `parse_keep_attention`; layers that have it already keep theirs.

    Raises:
        ConfigError: a bad argument, or a teacher without attention at a kept layer.

    Source: mmMamba section 4.5: all layers are converted in stages 1 and 2, the hybrid is chosen at stage 3.
    """
    layers = layers_of(student, "restore_attention")
    given = layers_of(teacher, "restore_attention")
    keep = parse_keep_attention(keep_attention, len(layers))
    types = list(student.config.layer_types)
    if len(given) != len(layers) or any(teacher.config.layer_types[i] != FULL for i in keep):
        raise ConfigError(
            f"restore_attention: teacher must have {len(layers)} layers with attention at {list(keep)}; got "
            f"layer_types {teacher.config.layer_types}. Give the model that the student was made from."
        )
    back = [i for i in keep if types[i] != FULL]
    hybrid = _skeleton(student, [FULL if i in back else kind for i, kind in enumerate(types)])
    return _fill(hybrid, student, {i: given[i].mixer for i in back})


def layers_of(model: Any, function: str) -> list[Any]:
    """The layers of an mmMamba-family model in global order, or a clear refusal.

    Raises:
        ConfigError: the model has no `decoder_layers()` or no `config.layer_types` to match.
    """
    types = getattr(getattr(model, "config", None), "layer_types", None)
    if not callable(getattr(model, "decoder_layers", None)) or types is None:
        raise ConfigError(
            f"{function}: model must have decoder_layers() and config.layer_types; got {type(model).__name__}. "
            "Use MMMambaForConditionalGeneration."
        )
    return list(model.decoder_layers())


def linear_layers(model: Any) -> list[int]:
    """Global indices of the layers with a linear mixer."""
    return [i for i, kind in enumerate(model.config.layer_types) if kind == LINEAR]


def _skeleton(model: ModelT, layer_types: list[str]) -> ModelT:
    """A model without storage (meta device) of the same class and configuration but for the layer types."""
    config = copy.deepcopy(model.config)
    config.layer_types = layer_types
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return type(model)(config)


def _materialise(model: Any, mixer: nn.Module, like: Tensor) -> None:
    """Gives a meta mixer storage like the weight it replaces; float32 for decay parameters that the model keeps so."""
    keep_wide = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    mixer.to_empty(device=like.device)
    for name, parameter in mixer.named_parameters():
        wide = any(part in keep_wide for part in name.split("."))
        parameter.data = parameter.data.to(torch.promote_types(like.dtype, torch.float32) if wide else like.dtype)


def _fill(model: ModelT, source: Any, mixers: dict[int, nn.Module]) -> ModelT:
    """Loads a skeleton strictly: the given mixers by layer, everything else from `source`; flags and mode follow it."""
    names = {id(module): name for name, module in model.named_modules()}
    prefixes = {i: f"{names[id(layer.mixer)]}." for i, layer in enumerate(model.decoder_layers()) if i in mixers}
    state = {k: v for k, v in source.state_dict().items() if not k.startswith(tuple(prefixes.values()))}
    for i, mixer in mixers.items():
        state.update({prefixes[i] + name: value for name, value in mixer.state_dict().items()})
    model.load_state_dict(_clone_once(state), strict=True, assign=True)
    model.tie_weights()
    flags = {name: p.requires_grad for name, p in source.named_parameters() if name in state}
    for i, mixer in mixers.items():
        flags.update({prefixes[i] + name: p.requires_grad for name, p in mixer.named_parameters()})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flags[name])
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:  # not in state dicts; the source has computed it
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner).register_buffer(leaf, source.get_buffer(name).clone(), persistent=False)
    if getattr(source, "generation_config", None) is not None:
        model.generation_config = copy.deepcopy(source.generation_config)
    return model.train(source.training)


def _clone_once(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies in which tensors that were one (tied weights) stay one."""
    copies: dict[tuple[int, Iterable[int]], Tensor] = {}
    for tensor in state.values():
        key = (tensor.data_ptr(), tuple(tensor.shape))
        if key not in copies:
            copies[key] = tensor.detach().clone()
    return {name: copies[tensor.data_ptr(), tuple(tensor.shape)] for name, tensor in state.items()}
