"""Official AKI checkpoints to ours and back; official training files onto a base that has the vision tower.

Strict both ways: a missing, unexpected, misshapen or non-finite tensor stops the conversion and is named.
Source: names and shapes of the released AKI-4B-phi-3.5-mini and of its training files.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mmkernels.errors import CheckpointError, ConfigError
from mmkernels.models.aki.configuration_aki import AkiConfig, phi_3_5_mini, siglip_so400m
from mmkernels.models.aki.modeling_aki import AkiForConditionalGeneration
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

LAYOUTS = ("auto", "aki", "training", "mmkernels")
TARGETS = ("mmkernels", "official")

# Beginnings of names: ours, official.  Layers of the resampler are renamed one by one below.
_PREFIXES = (
    ("vision_tower.", "vision_encoder."),
    ("resampler.", "vision_tokenizer."),
    ("language_model.", "lang_model.model."),
    ("extra_embedding.", "lang_model.model.embed_tokens.additional_embedding."),
    ("lm_head.", "lang_model.lm_head."),
    ("extra_head.", "lang_model.lm_head.additional_fc."),
)
_RESAMPLER = (("attention.", "0."), ("mlp.norm.", "1.0."), ("mlp.up.", "1.1."), ("mlp.down.", "1.3."))
_BACKBONES = {
    "vision_encoder_path": "google/siglip-so400m-patch14-384",
    "lang_model_path": "microsoft/Phi-3.5-mini-instruct",
}


def official_name(ours: str) -> str:
    """The released checkpoint's name of one of our tensors.

    >>> official_name("resampler.layers.2.mlp.down.weight")
    'vision_tokenizer.layers.2.1.3.weight'
    """
    name = other_beginning(ours, _PREFIXES)
    if name is None:
        raise ConfigError(f"official_name: the name must be one of the model's; got {ours!r}.")
    found = re.fullmatch(r"(vision_tokenizer\.layers\.\d+\.)(.+)", name)
    if found is None:
        return name
    return found[1] + (other_beginning(found[2], _RESAMPLER) or "")


def convert_checkpoint(
    source: PathLike,
    destination: PathLike,
    *,
    layout: str = "auto",
    to: str = "mmkernels",
    base: PathLike | None = None,
    config: AkiConfig | None = None,
    overwrite: bool = False,
) -> Path:
    """Convert a checkpoint and check that every tensor arrived.

    Args:
        source: file or folder of weights.
        destination: folder to write, whole or not at all.
        layout: of the source: "aki" (released), "training" (official `.pt`, without the vision tower), "mmkernels", or
            "auto" to tell by its tensors.
        to: "mmkernels" or "official".
        base: for a training file: an AKI checkpoint in any complete layout, or a SigLIP one, that has the tower.
        config: instead of the source's (or base's) config.json; the released sizes if there is none and they fit.
        overwrite: replace an existing destination.

    Returns:
        The destination.

    Raises:
        CheckpointError: the source is damaged, incomplete or of another layout; the destination exists.
        ConfigError: an unknown option, or a configuration that names other backbones.

    Example:
        >>> convert_checkpoint("AKI-4B-phi-3.5-mini", "aki")  # doctest: +SKIP
        >>> convert_checkpoint("checkpoint_50000.pt", "tuned", base="aki")  # doctest: +SKIP
    """
    check_known(layout=(layout, LAYOUTS), to=(to, TARGETS))
    target = free_destination(destination, overwrite)
    ours, config = load_checkpoint(source, layout=layout, base=base, config=config)
    with written_whole(target) as folder:
        if to == "official":
            save_tensors({official_name(name): value for name, value in ours.items()}, folder)
            content = json.dumps(official_from_config(config), indent=2)
            (folder / "config.json").write_text(content + "\n", encoding="utf-8")
        else:
            save_model(AkiForConditionalGeneration, config, ours, folder, head="lm_head.weight")
    return target


def load_checkpoint(
    source: PathLike, *, layout: str = "auto", base: PathLike | None = None, config: AkiConfig | None = None
) -> tuple[dict[str, Tensor], AkiConfig]:
    """The weights of any checkpoint under our names, checked, and their configuration.

    Args, Raises: as `convert_checkpoint`.

    Returns:
        State dict and configuration: `AkiForConditionalGeneration(config).load_state_dict(state)` is strict.
    """
    path = Path(source)
    weights = {name.removeprefix("module."): value for name, value in read_weights(path).items()}
    layout = _detect(path, weights) if layout == "auto" else layout
    if (layout == "training") != (base is not None):
        raise ConfigError(
            f"load_checkpoint: base must be given for a training file, and only for one; got base={base} and layout "
            f"{layout!r}. Training files hold no vision tower."
        )
    if layout == "mmkernels":
        config = config or AkiConfig.from_pretrained(_folder(path))
        check_weights(path, weights, our_shapes(config))
        return weights, config
    tower: dict[str, Tensor] = {}
    if base is not None:
        tower, found = _tower(Path(base))
        config = config or found
    config = config or _read_config(_folder(path))
    shapes = our_shapes(config)
    if layout == "training":
        expected = {official_name(name): shape for name, shape in shapes.items()}
        wanted = {theirs: shape for theirs, shape in expected.items() if not theirs.startswith("vision_encoder.")}
        check_weights(path, weights, wanted)
        check_weights(base, tower, {theirs: shape for theirs, shape in expected.items() if theirs not in wanted})
        weights |= tower
    return under_our_names(path, weights, shapes, official_name), config


def our_shapes(config: AkiConfig) -> Shapes:
    """Name -> shape of every tensor of our model."""
    return model_shapes(AkiForConditionalGeneration, config)


def config_from_official(raw: Mapping[str, Any], where: object) -> AkiConfig:
    """Our configuration from the released config.json.

    Raises:
        ConfigError: other backbones than the released ones, whose sizes it does not say.
    """
    for field, known in _BACKBONES.items():
        if raw.get(field, known) != known:
            raise ConfigError(
                f"{where}: {field} must be {known!r}; got {raw[field]!r}. For other backbones pass config=."
            )
    latents, base = int(raw.get("num_vision_tokens", 144)), int(raw.get("initial_tokenizer_len", 32012))
    return AkiConfig(
        text_config=phi_3_5_mini(pad_token_id=raw.get("pad_token_id", 32011)),
        vision_config=siglip_so400m(),
        num_vision_tokens=latents,
        num_base_tokens=base,
        image_token_id=base,  # the first of the extra tokens
    )


def official_from_config(config: AkiConfig) -> dict[str, Any]:
    """The fields of a released config.json."""
    return {
        **_BACKBONES,
        "decoder_layers_attr_name": "model.layers",
        "initial_tokenizer_len": config.num_base_tokens,
        "pad_token_id": config.text_config.pad_token_id,
        "num_vision_tokens": config.num_vision_tokens,
        "base_img_size": None,
        "gradient_checkpointing": False,
        "tokenizer": None,
        "n_px": config.vision_config.image_size,
        "norm_mean": 0.5,
        "norm_std": 0.5,
    }


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _detect(path: Path, weights: Mapping[str, Tensor]) -> str:
    if "vision_tokenizer.latents" in weights:
        return "aki" if any(name.startswith("vision_encoder.") for name in weights) else "training"
    if "resampler.latents" in weights:
        return "mmkernels"
    raise CheckpointError(
        f"{path} must be an AKI checkpoint; got tensors like {listing(weights)}. Name the layout, or check the path."
    )


def _read_config(folder: Path) -> AkiConfig:
    if not (folder / "config.json").is_file():
        return AkiConfig()  # the only sizes ever released; check_weights refuses any other
    return config_from_official(read_json(folder / "config.json"), folder / "config.json")


def _tower(base: Path) -> tuple[dict[str, Tensor], AkiConfig | None]:
    """The vision tower of a checkpoint under official names, and the AKI configuration if it is one."""
    weights = {name.removeprefix("module."): value for name, value in read_weights(base).items()}
    for prefix in ("vision_encoder.", "vision_tower.", "vision_model."):
        part = {f"vision_encoder.{n.removeprefix(prefix)}": v for n, v in weights.items() if n.startswith(prefix)}
        if part:
            if prefix == "vision_model.":
                return part, None
            read = AkiConfig.from_pretrained if prefix == "vision_tower." else _read_config
            return part, read(_folder(base))
    raise CheckpointError(
        f"{base} must have a vision tower; got tensors like {listing(weights)}. Give an AKI or a SigLIP checkpoint."
    )
