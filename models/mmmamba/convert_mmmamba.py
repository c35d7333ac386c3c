"""Official HoVLE and mmMamba checkpoints to ours and back; official training files onto a base model.

Strict in every direction: a missing, unexpected, misshapen or non-finite tensor stops the conversion and is named.
Source: layouts of the released files (see layouts_mmmamba.py); configuration fields as their remote code reads them.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmkernels._progress import progress_bar
from mmkernels.errors import CheckpointError, ConfigError
from mmkernels.models.common.checkpoint_files import check_weights, listing, read_json, read_weights
from mmkernels.models.common.conversion import (
    PathLike,
    Shapes,
    check_known,
    free_destination,
    model_shapes,
    save_model,
    save_tensors,
    written_whole,
)
from mmkernels.models.mmmamba.configuration_mmmamba import FULL, LINEAR, MMMambaConfig
from mmkernels.models.mmmamba.layouts_mmmamba import (
    TRAINED,
    dead_shapes,
    dead_values,
    layer_prefixes,
    official_table,
    training_names,
)
from mmkernels.models.mmmamba.modeling_mmmamba import MMMambaForConditionalGeneration
from mmkernels.models.mmmamba.official_config import config_from_official, official_from_config

LAYOUTS = ("auto", "hovle", "mmmamba", "training", "mmkernels")
TARGETS = ("mmkernels", "official", "training")


def convert_checkpoint(
    source: PathLike | Sequence[PathLike],
    destination: PathLike,
    *,
    layout: str = "auto",
    to: str = "mmkernels",
    base: PathLike | None = None,
    config: MMMambaConfig | None = None,
    stage: int = 3,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Convert a checkpoint and check that every tensor arrived.

    Args:
        source: file or folder of weights; for training files, one or several in the order of the stages.
        destination: folder to write ("official", "mmkernels"), or file ("training"); written whole or not at all.
        layout: of the source: "hovle", "mmmamba" (official, deployed), "training" (official `.pt`), "mmkernels", or
            "auto" to tell by its tensors.
        to: "mmkernels", "official" (HoVLE's or mmMamba's layout, by the kind of the layers), or "training".
        base: the teacher a training file belongs to, in any layout but "training": gives all that training files lack.
            Layers that the last training file does not mention keep the base's attention.
        config: instead of the source's (or base's) config.json.
        stage: whose trainable tensors are written by to="training".
        overwrite: replace an existing destination.
        progress: show bars.

    Returns:
        The destination.

    Raises:
        CheckpointError: the source is damaged, incomplete or of another layout; the destination exists.
        ConfigError: an unknown option, or a configuration that the layout or the model cannot express.

    Example:
        >>> convert_checkpoint("HoVLE", "hovle-mmk")  # doctest: +SKIP
        >>> convert_checkpoint(["stage2.pt", "stage3.pt"], "student", base="hovle-mmk")  # doctest: +SKIP
        >>> convert_checkpoint("student", "student-official", to="official")  # doctest: +SKIP
    """
    check_known(layout=(layout, LAYOUTS), to=(to, TARGETS))
    paths = [Path(source)] if isinstance(source, str | Path) else [Path(one) for one in source]
    target = free_destination(destination, overwrite)
    ours, config = load_checkpoint(paths, layout=layout, base=base, config=config, progress=progress)
    with written_whole(target, folder=False) as partial:
        if to == "training":
            torch.save({"model_state_dict": _trained(ours, config, stage), "step": 0}, partial)
        elif to == "official":
            _write_official(ours, config, partial)
        else:
            wide = MMMambaForConditionalGeneration._keep_in_fp32_modules_strict or []
            state = {name: value.float() if name.rsplit(".", 1)[-1] in wide else value for name, value in ours.items()}
            save_model(MMMambaForConditionalGeneration, config, state, partial, head="lm_head.weight")
    return target


def load_checkpoint(
    source: PathLike | Sequence[PathLike],
    *,
    layout: str = "auto",
    base: PathLike | None = None,
    config: MMMambaConfig | None = None,
    progress: bool = False,
) -> tuple[dict[str, Tensor], MMMambaConfig]:
    """The weights of any checkpoint under our names, checked, and their configuration.

    Args, Raises: as `convert_checkpoint`.

    Returns:
        State dict and configuration: `MMMambaForConditionalGeneration(config).load_state_dict(state)` is strict.
    """
    paths = [Path(source)] if isinstance(source, str | Path) else [Path(one) for one in source]
    if not paths:
        raise CheckpointError("load_checkpoint: source must name at least one file; got none. Pass a path.")
    files = [read_weights(path) for path in paths]
    layout = _detect(paths[0], files[0]) if layout == "auto" else layout
    if layout == "training":
        return _onto_base(paths, files, base, config)
    if len(paths) > 1 or base is not None:
        raise ConfigError(
            f"load_checkpoint: base and several sources are for training files; got layout {layout!r}. "
            "Pass the folder of the checkpoint."
        )
    folder = paths[0] if paths[0].is_dir() else paths[0].parent
    config = config or _read_config(folder, files[0], layout)
    if layout == "mmkernels":
        weights = _untie(files[0], config)
        check_weights(paths[0], weights, our_shapes(config))
        return weights, config
    return _from_official(paths[0], files[0], config, progress), config


def our_shapes(config: MMMambaConfig) -> Shapes:
    """Name -> shape of every tensor of our model."""
    return model_shapes(MMMambaForConditionalGeneration, config)


def _detect(path: Path, weights: Mapping[str, Tensor]) -> str:
    names = list(weights)
    if any(name.startswith("model.") for name in names):
        return "mmkernels"
    if any(name.endswith("attention.wvkqgdt.weight") for name in names):
        return "mmmamba"
    if any(name.endswith("attention.in_proj.weight") for name in names):
        return "training"
    if any(name.endswith("attention.wqkv.weight") for name in names):
        return "hovle"
    raise CheckpointError(
        f"{path} must be a HoVLE, mmMamba, training or mmkernels checkpoint; got tensors like {listing(names)}. "
        "Name the layout, or check the path."
    )


def _read_config(folder: Path, weights: Mapping[str, Tensor], layout: str) -> MMMambaConfig:
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} must hold a config.json beside the weights; got none. Download it or pass config=."
        )
    if layout == "mmkernels":
        return MMMambaConfig.from_pretrained(folder)
    raw = read_json(folder / "config.json")
    kinds = {
        prefix: LINEAR if f"{prefix}.attention.wvkqgdt.weight" in weights else FULL
        for prefix in {name.split(".attention.")[0] for name in weights if ".attention." in name}
    }
    width = _conv_kernel(weights) or 2
    where = folder / "config.json"
    return config_from_official(raw, kinds, conv_kernel=width, dynamic_rope=layout == "hovle", where=where)


def _untie(weights: dict[str, Tensor], config: MMMambaConfig) -> dict[str, Tensor]:
    if config.tie_word_embeddings and "lm_head.weight" not in weights and "model.embed_tokens.weight" in weights:
        return {**weights, "lm_head.weight": weights["model.embed_tokens.weight"]}
    return weights


def _table(config: MMMambaConfig, shapes: Mapping[str, tuple[int, ...]]) -> list[Any]:
    """The official layout, refused if it has no room for a tensor of ours (options the official model lacks)."""
    table = official_table(config)
    homeless = shapes.keys() ^ {name for entry in table for name in entry.ours}
    if homeless:
        raise ConfigError(
            f"the official layout must hold every tensor of the model; got a difference in {listing(homeless)}. "
            "It has gate and convolution bias always, D and query/key norms never."
        )
    return table


def _from_official(
    path: Path, weights: Mapping[str, Tensor], config: MMMambaConfig, progress: bool
) -> dict[str, Tensor]:
    extra = [name for name in weights if "special_text_embeddings" in name]
    if extra:
        raise CheckpointError(
            f"{path} must have no special token tables (special_token_maps); got {listing(extra)}. "
            "Merge them into llm_text_embeddings first."
        )
    shapes = our_shapes(config)
    table, dead = _table(config, shapes), dead_shapes(config)
    wanted = {entry.official: entry.shape(shapes) for entry in table}
    check_weights(path, weights, {**wanted, **dead}, optional=dead)
    ours: dict[str, Tensor] = {}
    with progress_bar(len(table), "converting", show=progress) as bar:
        for entry in table:
            ours.update(entry.split(weights[entry.official], shapes, config))
            bar.update()
    return ours


def _onto_base(
    paths: list[Path], files: list[dict[str, Tensor]], base: PathLike | None, config: MMMambaConfig | None
) -> tuple[dict[str, Tensor], MMMambaConfig]:
    if base is None:
        raise ConfigError(
            f"load_checkpoint: base must name the teacher of a training file; got none for {paths[0]}. "
            "Training files hold trained tensors only."
        )
    teacher, teacher_config = load_checkpoint(base, config=config)
    prefixes = [prefix for prefix, _ in layer_prefixes(teacher_config)]
    mentioned = {name.split(".attention.")[0] for name in files[-1]}
    kinds = [LINEAR if prefix in mentioned else FULL for prefix in prefixes]
    lost = [i for i, kind in enumerate(kinds) if kind == FULL and teacher_config.layer_types[i] != FULL]
    if lost:
        raise CheckpointError(
            f"{base} must have attention in the layers that {paths[-1]} does not mention; got linear layers at {lost}. "
            "Give the teacher as base, and the files of earlier stages before this one."
        )
    width = _conv_kernel(files[-1]) or teacher_config.mixer_conv_kernel
    changed = {"layer_types": kinds, "mixer_conv_kernel": width}
    student = MMMambaConfig.from_dict({**teacher_config.to_dict(), **changed})
    shapes = our_shapes(student)
    whole = MMMambaConfig.from_dict({**student.to_dict(), "layer_types": [LINEAR] * len(kinds)})
    every = our_shapes(whole)
    ours = {name: value for name, value in teacher.items() if name in shapes}
    for path, weights in zip(paths, files, strict=True):
        known = {official: name for part in training_names(whole, 2).values() for official, name in part.items()}
        check_weights(path, weights, {official: every[name] for official, name in known.items()}, optional=known)
        _check_even(path, weights)
        linear = {official for part in training_names(student, 2).values() for official in part}
        ours.update({known[key]: value for key, value in weights.items() if key in linear})
    absent = shapes.keys() - ours.keys()
    if absent:
        raise CheckpointError(
            f"{paths[-1]} and its base must together hold every tensor of the student; got none for {listing(absent)}. "
            "Official stage-3 files lack dt_bias and A_log_bias: pass the stage-2 file before them."
        )
    check_weights(paths[-1], ours, shapes)
    return ours, student


def _conv_kernel(weights: Mapping[str, Tensor]) -> int | None:
    """The convolution's width: the one size of a mixer that no official configuration gives."""
    widths = {value.shape[-1] for name, value in weights.items() if name.endswith("conv1d.weight")}
    return widths.pop() if len(widths) == 1 else None


def _check_even(path: Path, weights: Mapping[str, Tensor]) -> None:
    """All layers of a training file hold the same tensors."""
    per_layer: dict[str, set[str]] = {}
    for name in weights:
        prefix, part = name.split(".attention.")
        per_layer.setdefault(prefix, set()).add(part)
    fullest = max(per_layer.values(), key=len, default=set())
    lost = [f"{prefix}.attention.{part}" for prefix, parts in per_layer.items() for part in fullest - parts]
    if lost:
        raise CheckpointError(f"{path} must hold the same tensors for every layer; got none for {listing(lost)}.")


def _trained(ours: Mapping[str, Tensor], config: MMMambaConfig, stage: int) -> dict[str, Tensor]:
    if stage not in TRAINED:
        raise ConfigError(f"convert_checkpoint: stage must be 1, 2 or 3; got {stage}. Stages are the paper's.")
    names = training_names(config, stage)
    if not names:
        raise ConfigError("convert_checkpoint: a training file needs linear layers; got a model without. Linearize it.")
    return {official: ours[name].clone() for part in names.values() for official, name in part.items()}


def _write_official(ours: Mapping[str, Tensor], config: MMMambaConfig, folder: Path) -> None:
    table = _table(config, {name: tuple(value.shape) for name, value in ours.items()})
    weights = {entry.official: entry.join(ours, config) for entry in table}
    weights.update(dead_values(config, ours))
    folder.mkdir()
    # safetensors refuses tensors that share memory (tied tables)
    seen: set[int] = set()
    for name, value in weights.items():
        if value.data_ptr() in seen:
            weights[name] = value.clone()
        seen.add(value.data_ptr())
    save_tensors(weights, folder)
    dtype = str(ours["lm_head.weight"].dtype).removeprefix("torch.")
    content = json.dumps({**official_from_config(config), "torch_dtype": dtype}, indent=2)
    (folder / "config.json").write_text(content + "\n", encoding="utf-8")
