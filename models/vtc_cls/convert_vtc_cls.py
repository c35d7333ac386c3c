"""LLaVA-1.5 checkpoints, liuhaotian's and llava-hf's, to ours and back.

Strict both ways: a missing, unexpected, misshapen or non-finite tensor stops the conversion and is named.
Source: tensor names of liuhaotian/llava-v1.5-7b, llava-hf/llava-1.5-7b-hf and openai/clip-vit-large-patch14-336.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmkernels.errors import CheckpointError, ConfigError
from mmkernels.models.common.checkpoint_files import check_weights, listing, read_json, read_weights
from mmkernels.models.common.conversion import (
    PathLike,
    Shapes,
    check_known,
    free_destination,
    model_shapes,
    other_beginning,
    save_model,
    save_tensors,
    under_our_names,
    written_whole,
)
from mmkernels.models.vtc_cls.configuration_vtc_cls import VTCCLSConfig, clip_l_336, vicuna_7b
from mmkernels.models.vtc_cls.modeling_vtc_cls import VTCCLSForConditionalGeneration

LAYOUTS = ("auto", "liuhaotian", "llava-hf", "mmkernels")
TARGETS = ("mmkernels", "liuhaotian", "llava-hf")

# Beginnings of names: ours, theirs.
_PREFIXES = {
    "liuhaotian": (
        ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
        ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
        ("model.vision_tower.", "model.vision_tower.vision_tower.vision_model."),
        ("model.language_model.", "model."),
        ("lm_head.", "lm_head."),
    ),
    "llava-hf": (
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
    ),
}
# Buffers that some versions of these programs saved: they follow from the sizes.
_BUFFERS = ("embeddings.position_ids", "rotary_emb.inv_freq")
_TABLES = ("model.language_model.embed_tokens.weight", "lm_head.weight")
_TOWER = "openai/clip-vit-large-patch14-336"


def their_name(ours: str, layout: str) -> str:
    """Another layout's name of one of our tensors.

    >>> their_name("model.multi_modal_projector.linear_2.bias", "liuhaotian")
    'model.mm_projector.2.bias'
    """
    name = other_beginning(ours, _PREFIXES[layout])
    if name is None:
        raise ConfigError(f"their_name: the name must be one of the model's; got {ours!r}. See model.state_dict().")
    return name


def convert_checkpoint(
    source: PathLike,
    destination: PathLike,
    *,
    layout: str = "auto",
    to: str = "mmkernels",
    base: PathLike | None = None,
    config: VTCCLSConfig | None = None,
    overwrite: bool = False,
) -> Path:
    """Convert a checkpoint and check that every tensor arrived.

    Args:
        source: file or folder of weights.
        destination: folder to write, whole or not at all.
        layout: of the source: "liuhaotian", "llava-hf", "mmkernels", or "auto" to tell by its tensors.
        to: "mmkernels", "liuhaotian" or "llava-hf".
        base: a CLIP checkpoint, for liuhaotian's files, which may come without the (frozen) tower.
        config: instead of the source's config.json; its sizes must fit.
        overwrite: replace an existing destination.

    Returns:
        The destination.

    Raises:
        CheckpointError: the source is damaged, incomplete or of another layout; the destination exists.
        ConfigError: an unknown option, or a configuration that names another tower.

    Example:
        >>> convert_checkpoint("llava-v1.5-7b", "vtc-cls", base="clip-vit-large-patch14-336")  # doctest: +SKIP
    """
    check_known(layout=(layout, LAYOUTS), to=(to, TARGETS))
    target = free_destination(destination, overwrite)
    ours, config = load_checkpoint(source, layout=layout, base=base, config=config)
    with written_whole(target) as folder:
        if to == "mmkernels":
            save_model(VTCCLSForConditionalGeneration, config, ours, folder, head="lm_head.weight")
        else:
            save_tensors({their_name(name, to): value for name, value in ours.items()}, folder)
            config.save_pretrained(folder)
    return target


def load_checkpoint(
    source: PathLike, *, layout: str = "auto", base: PathLike | None = None, config: VTCCLSConfig | None = None
) -> tuple[dict[str, Tensor], VTCCLSConfig]:
    """The weights of any checkpoint under our names, checked, and their configuration.

    Args, Raises: as `convert_checkpoint`.

    Returns:
        State dict and configuration: `VTCCLSForConditionalGeneration(config).load_state_dict(state)` is strict.
        liuhaotian's tables have no rows for the placeholder and padding: those rows are the mean of the others.
    """
    path = Path(source)
    weights = {name: value for name, value in read_weights(path).items() if not name.endswith(_BUFFERS)}
    layout = _detect(path, weights) if layout == "auto" else layout
    config = config or _read_config(path if path.is_dir() else path.parent, layout)
    shapes = our_shapes(config)
    if layout == "mmkernels":  # saved by transformers, which writes the decoder one level deeper
        deep, here = "model.language_model.model.", "model.language_model."
        weights = {here + n.removeprefix(deep) if n.startswith(deep) else n: v for n, v in weights.items()}
        check_weights(path, weights, shapes)
        return weights, config
    if layout == "llava-hf":  # later versions of transformers leave vision_model out
        old, new = "vision_tower.vision_model.", "vision_tower."
        weights = {
            old + n.removeprefix(new) if n.startswith(new) and not n.startswith(old) else n: v
            for n, v in weights.items()
        }
    if layout == "liuhaotian":
        weights = _with_tower(path, weights, base)
        weights = _with_rows(weights, {their_name(name, layout): shapes[name][0] for name in _TABLES})
    elif base is not None:
        raise ConfigError(
            f"load_checkpoint: base must be left out for layout {layout!r}; got {base}. Its files hold the tower."
        )
    return under_our_names(path, weights, shapes, lambda name: their_name(name, layout)), config


def our_shapes(config: VTCCLSConfig) -> Shapes:
    """Name -> shape of every tensor of our model."""
    return model_shapes(VTCCLSForConditionalGeneration, config)


def _detect(path: Path, weights: Mapping[str, Tensor]) -> str:
    for layout, mark in (
        ("liuhaotian", "model.mm_projector.0.weight"),
        ("llava-hf", "multi_modal_projector.linear_1.weight"),
        ("mmkernels", "model.multi_modal_projector.linear_1.weight"),
    ):
        if mark in weights:
            return layout
    raise CheckpointError(
        f"{path} must be a LLaVA-1.5 checkpoint; got tensors like {listing(weights)}. Name the layout if it is one."
    )


def _read_config(folder: Path, layout: str) -> VTCCLSConfig:
    if not (folder / "config.json").is_file():
        return VTCCLSConfig()  # LLaVA-1.5-7B; check_weights refuses any other
    raw = read_json(folder / "config.json")
    if layout != "liuhaotian":
        raw = {name: value for name, value in raw.items() if name not in ("model_type", "architectures")}
        return VTCCLSConfig(**raw)
    return config_from_liuhaotian(raw, folder / "config.json")


def config_from_liuhaotian(raw: Mapping[str, Any], where: object) -> VTCCLSConfig:
    """Our configuration from liuhaotian's config.json.

    Raises:
        ConfigError: another tower, projector or choice of features than LLaVA-1.5's.
    """
    known = {
        "mm_vision_tower": _TOWER,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
    }
    for name, wanted in known.items():
        if raw.get(name, wanted) != wanted:
            raise ConfigError(f"{where}: {name} must be {wanted!r}; got {raw[name]!r}. For other models pass config=.")
    taken = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    sizes = {name: raw[name] for name in (*taken, "max_position_embeddings", "rms_norm_eps") if name in raw}
    vocab = int(raw.get("vocab_size", 32000))
    rows = -(-(vocab + 2) // 64) * 64  # the placeholder, padding, and a round number
    text = vicuna_7b(**sizes, vocab_size=rows, pad_token_id=vocab + 1)
    return VTCCLSConfig(vision_config=clip_l_336(), text_config=text, image_token_index=vocab)


def _with_tower(path: Path, weights: dict[str, Tensor], base: PathLike | None) -> dict[str, Tensor]:
    prefix = "model.vision_tower.vision_tower.vision_model."
    has_tower = any(name.startswith(prefix) for name in weights)
    if has_tower != (base is None):
        raise ConfigError(
            f"load_checkpoint: base must be given exactly where a checkpoint has no vision tower; got base={base} and "
            f"{path} {'with' if has_tower else 'without'} one. The tower of LLaVA-1.5 is {_TOWER}."
        )
    if base is None:
        return weights
    read = {name: value for name, value in read_weights(Path(base)).items() if not name.endswith(_BUFFERS)}
    tower = {
        prefix + name.removeprefix("vision_model."): value
        for name, value in read.items()
        if name.startswith("vision_model.")
    }
    if not tower:
        raise CheckpointError(f"{base} must have a CLIP vision tower; got tensors like {listing(read)}. Give {_TOWER}.")
    return weights | tower


def _with_rows(weights: dict[str, Tensor], tables: Mapping[str, int]) -> dict[str, Tensor]:
    """Tables with as many rows as expected: new ones are the mean of the old, so that none is likelier than any."""
    longer = dict(weights)
    for name, rows in tables.items():
        table = weights.get(name)
        missing = 0 if table is None or table.ndim != 2 else rows - table.shape[0]
        if table is not None and 0 < missing <= 64:
            mean = table.float().mean(0, keepdim=True).to(table.dtype)
            longer[name] = torch.cat([table, mean.expand(missing, -1)])
    return longer
