"""ML-Mamba's four-part training file to ours and back, and a model put together from its pretrained parts.

Strict both ways: a missing, unexpected, misshapen or non-finite tensor stops the conversion and is named.
Source: keys and shapes of the released file, written by the official training code.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmkernels.errors import CheckpointError, ConfigError, nearest
from mmkernels.models.common.checkpoint_files import check_weights, listing, read_json, read_torch, read_weights
from mmkernels.models.common.conversion import (
    PathLike,
    Shapes,
    check_known,
    free_destination,
    model_shapes,
    save_model,
    written_whole,
)
from mmkernels.models.mamba2 import convert_mamba2
from mmkernels.models.mamba2.configuration_mamba2 import Mamba2LMConfig
from mmkernels.models.ml_mamba.configuration_ml_mamba import MLMambaConfig
from mmkernels.models.ml_mamba.modeling_ml_mamba import MLMambaForConditionalGeneration
from mmkernels.models.ml_mamba.vision_ml_mamba import TOWERS

LAYOUTS = ("auto", "ml-mamba", "mmkernels")
TARGETS = ("mmkernels", "official")
PARTS = ("llm_backbone", "mlp", "bidirectional_mamba", "projector")
FILE = "latest-checkpoint.pt"

_EMBEDDING, _HEAD = "language_model.backbone.embedding.weight", "language_model.lm_head.weight"
_TOWER = "vision_tower."
# Ours is one tensor with a row per direction; theirs are two, the second with "_b".
_DIRECTIONS = {"conv_weight": "conv1d.weight", "conv_bias": "conv1d.bias"}
_DIRECTIONS |= {name: name for name in ("dt_bias", "A_log", "D")}
_WHOLE = {"siglip": "siglip_vision_model", "clip": "clip_vision_model"}  # models whose tower is one of their halves


def official_names(ours: str) -> tuple[str, ...]:
    """Where one of our tensors is in the official file, "part/name"; two of them where directions are apart.

    >>> official_names("connector.layers.0.mixer.conv_bias")
    ('bidirectional_mamba/layers.0.mixer.conv1d.bias', 'bidirectional_mamba/layers.0.mixer.conv1d_b.bias')
    >>> official_names("connector.projector.4.bias")
    ('projector/projector.4.bias',)
    """
    if ours.startswith("language_model."):
        return (f"llm_backbone/{ours.removeprefix('language_model.')}",)
    if ours.startswith("connector.entry."):
        return (f"mlp/0.{ours.removeprefix('connector.entry.')}",)
    if ours.startswith("connector.projector."):
        return (f"projector/{ours.removeprefix('connector.')}",)
    name = ours.removeprefix("connector.")
    found = re.fullmatch(r"(layers\.\d+\.mixer\.)(\w+)", name)
    if found is None or found[2] not in _DIRECTIONS:
        return (f"bidirectional_mamba/{name}",)
    stem, dot, rest = _DIRECTIONS[found[2]].partition(".")
    return tuple(f"bidirectional_mamba/{found[1]}{stem}{suffix}{dot}{rest}" for suffix in ("", "_b"))


def to_official(ours: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The four parts of an official file from our tensors; the towers are left out, as there."""
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
    for name, value in ours.items():
        if name.startswith(_TOWER):
            continue
        theirs = official_names(name)
        pieces = [value] if len(theirs) == 1 else list(value.unbind(0))
        for their, piece in zip(theirs, pieces, strict=True):
            part, key = their.split("/", 1)
            # torch's convolutions have a dimension of 1 in the middle; tied tables stay one storage
            parts[part][key] = (
                piece if len(theirs) == 1 else piece[:, None].clone() if piece.ndim == 2 else piece.clone()
            )
    return parts


def from_official(flat: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Our tensors, towers excepted, from checked "part/name" ones."""
    ours = {}
    for name, shape in shapes.items():
        if not name.startswith(_TOWER):
            pieces = [flat[theirs] for theirs in official_names(name)]
            ours[name] = pieces[0] if len(pieces) == 1 else torch.stack([p.reshape(shape[1:]) for p in pieces])
    return ours


def convert_checkpoint(
    source: PathLike,
    destination: PathLike,
    *,
    layout: str = "auto",
    to: str = "mmkernels",
    vision: Sequence[PathLike] = (),
    config: MLMambaConfig | None = None,
    overwrite: bool = False,
) -> Path:
    """Convert a checkpoint and check that every tensor arrived.

    Args:
        source: the official file, or a folder with one, or a folder of ours.
        destination: folder to write, whole or not at all.
        layout: of the source: "ml-mamba", "mmkernels", or "auto" to tell by what is there.
        to: "mmkernels" (for from_pretrained) or "official" (latest-checkpoint.pt, without the towers).
        vision: folders of the pretrained towers, in the order of their channels; the official file has none.
        config: instead of what the shapes of an official file and the towers say.
        overwrite: replace an existing destination.

    Returns:
        The destination.

    Raises:
        CheckpointError: the source is damaged, incomplete or of another layout; the destination exists.
        ConfigError: an unknown option, towers missing or of another width, a model that the official file cannot hold.

    Example:
        >>> towers = ["dinov2-with-registers-large", "siglip-so400m-patch14-384"]
        >>> convert_checkpoint("latest-checkpoint.pt", "ml-mamba", vision=towers)  # doctest: +SKIP
    """
    check_known(layout=(layout, LAYOUTS), to=(to, TARGETS))
    target = free_destination(destination, overwrite)
    ours, config = load_checkpoint(source, layout=layout, vision=vision, config=config)
    if to == "official":
        _require_official(config)
    with written_whole(target) as folder:
        if to == "official":
            torch.save({"model": to_official(ours)}, folder / FILE)
        else:
            save_model(MLMambaForConditionalGeneration, config, ours, folder, head=_EMBEDDING)
    return target


def load_checkpoint(
    source: PathLike, *, layout: str = "auto", vision: Sequence[PathLike] = (), config: MLMambaConfig | None = None
) -> tuple[dict[str, Tensor], MLMambaConfig]:
    """The weights of a checkpoint under our names, checked, and their configuration.

    Args, Raises: as `convert_checkpoint`.

    Returns:
        State dict and configuration: `MLMambaForConditionalGeneration(config).load_state_dict(state)` is strict.
        Step-size biases, decays and skips are float32 whatever the file holds.
    """
    path = Path(source)
    official = path if path.is_file() and path.suffix != ".safetensors" else path / FILE
    if layout == "auto":
        layout = "ml-mamba" if official.is_file() else "mmkernels"
    if layout == "mmkernels":
        if vision:
            raise ConfigError("load_checkpoint: vision must be left out for a folder of ours; it holds its towers.")
        return _load_ours(path, config)
    flat = _read_parts(official)
    if not vision:
        raise ConfigError(
            f"load_checkpoint: vision must name the pretrained towers; got none for {official}, which holds no towers. "
            "Give dinov2-with-registers-large and siglip-so400m-patch14-384, in this order."
        )
    towers = [load_tower(folder) for folder in vision]
    config = config or config_from_official(flat, [tower.config for tower in towers])
    shapes = our_shapes(config)
    check_weights(official, flat, _official_shapes(shapes, config))
    head, table = flat["llm_backbone/lm_head.weight"], flat["llm_backbone/backbone.embedding.weight"]
    if config.tie_word_embeddings and not torch.equal(head, table):
        raise CheckpointError(f"{official} must hold one table for embedding and head; got two that differ.")
    ours = from_official(flat, shapes) | _tower_weights(towers)
    check_weights([str(folder) for folder in vision], ours, shapes)
    if config.tie_word_embeddings:
        ours[_HEAD] = ours[_EMBEDDING]
    return _widened(ours), config


def _load_ours(path: Path, config: MLMambaConfig | None) -> tuple[dict[str, Tensor], MLMambaConfig]:
    """A folder of ours, read by transformers, which knows by what names it has written its own towers."""
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"load_checkpoint: source must be ML-Mamba's {FILE} or a folder written by save_pretrained; got {path}. "
            "Check the path."
        )
    read_weights(path)  # damaged files are named here, transformers would not
    settings: dict[str, Any] = {} if config is None else {"config": config}
    loaded: Any = MLMambaForConditionalGeneration.from_pretrained(
        path, dtype="auto", output_loading_info=True, **settings
    )
    model, found = loaded
    weights = model.state_dict()
    _require_complete(path, found, weights)
    return weights, model.config


def _require_complete(path: Path, found: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Refuse what transformers would load with a warning."""
    lost = {*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}
    broken = [name for name, value in weights.items() if not bool(torch.isfinite(value).all())]
    if lost or broken:
        raise CheckpointError(
            f"{path} must hold every weight; got {len(lost)} missing or misshapen ({listing(lost)}) and {len(broken)} "
            f"not finite ({listing(broken)}). Download it again."
        )


def from_parts(
    language_model: PathLike, vision: Sequence[PathLike], *, image_size: int | None = None, **settings: Any
) -> MLMambaForConditionalGeneration:
    """A model to be trained: a pretrained language model and pretrained towers around a freshly drawn connector.

    Args:
        language_model: a Mamba-2 checkpoint in any layout `mmkernels.models.mamba2.load_checkpoint` reads.
        vision: folders of one or two towers, in the order of their channels.
        image_size: pixels of a side; None: what a tower with fixed positions says.
        **settings: further fields of `MLMambaConfig`, e.g. connector_variant.

    Raises:
        CheckpointError: a part that is missing, damaged or incomplete.
        ConfigError: parts that do not fit together.
    """
    further: dict[str, Any] = {} if image_size is None else {"image_size": image_size}
    state, text = convert_mamba2.load_checkpoint(language_model)
    towers = [load_tower(folder) for folder in vision]
    if not 1 <= len(towers) <= 2:
        raise ConfigError(f"from_parts: vision must name one or two towers; got {len(towers)}.")
    config = MLMambaConfig(
        text_config=text,
        **{**_tower_fields([tower.config for tower in towers]), **further},
        **{"connector_state_size": text.state_size, "connector_head_dim": text.head_dim, **settings},
    )
    model = MLMambaForConditionalGeneration(config)
    model.language_model.load_state_dict(state, strict=True)
    model.vision_tower.load_state_dict({n.removeprefix(_TOWER): v for n, v in _tower_weights(towers).items()})
    return model


def load_tower(folder: PathLike) -> Any:
    """A pretrained vision tower from a folder of transformers: a tower, or a CLIP or SigLIP model that has one.

    Raises:
        CheckpointError: no such folder, another model, or weights that are missing, misshapen or not finite.
    """
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise CheckpointError(f"load_tower: folder must hold config.json and weights; got {path}. Download the tower.")
    kind = str(read_json(path / "config.json").get("model_type"))
    kind = _WHOLE.get(kind, kind)
    if kind not in TOWERS:
        raise CheckpointError(
            f"load_tower: {path} must hold a known kind of tower; got {kind!r}. {nearest(kind, TOWERS)}"
        )
    cls = TOWERS[kind]
    config = cls.config_class.from_pretrained(path)
    if kind == "siglip_vision_model":
        config.vision_use_head = False  # pools the last layer, which nobody reads
    read_weights(path)  # damaged files are named here, transformers would not
    tower, found = cls.from_pretrained(path, config=config, output_loading_info=True)
    _require_complete(path, found, tower.state_dict())
    return tower


def our_shapes(config: MLMambaConfig) -> Shapes:
    """Name -> shape of every tensor of our model."""
    return model_shapes(MLMambaForConditionalGeneration, config)


def config_from_official(flat: Mapping[str, Tensor], towers: Sequence[Any]) -> MLMambaConfig:
    """The configuration an official file's shapes and its towers tell; the file itself has none.

    Raises:
        CheckpointError: the tensors that tell are missing.
        ConfigError: towers that have another width than the file's connector reads.
    """
    try:
        mixer = "llm_backbone/backbone.layers.0.mixer."
        rows, width = flat["llm_backbone/backbone.embedding.weight"].shape
        inner, heads = flat[f"{mixer}norm.weight"].shape[0], flat[f"{mixer}dt_bias"].shape[0]
        conv = flat[f"{mixer}conv1d.weight"]
        blocks = {name.split(".")[2] for name in flat if name.startswith("llm_backbone/backbone.layers.")}
        read = flat["mlp/0.weight"].shape[1]
        ours = flat["bidirectional_mamba/layers.0.mixer.dt_bias"].shape[0]
        scan = flat["bidirectional_mamba/layers.0.mixer.conv1d.weight"]
        scan_inner = flat["bidirectional_mamba/layers.0.mixer.norm.weight"].shape[0]
    except KeyError as error:
        raise CheckpointError(
            f"{FILE} must hold the four parts of ML-Mamba; got no {error}. Check the path."
        ) from error
    wide = sum(tower.hidden_size for tower in towers)
    if wide != read:
        raise ConfigError(
            f"config_from_official: towers must have {read} channels together; got {wide}. Check vision=."
        )
    text = Mamba2LMConfig(
        vocab_size=50277 if rows == 50288 else rows,  # GPT-NeoX's words, filled up to a multiple of 16
        pad_vocab_size_multiple=16 if rows == 50288 else 1,
        hidden_size=width,
        num_hidden_layers=len(blocks),
        expand=inner // width,
        head_dim=inner // heads,
        state_size=(conv.shape[0] - inner) // 2,
        conv_kernel=conv.shape[2],
    )
    return MLMambaConfig(
        text_config=text,
        **_tower_fields(towers),
        connector_layers=len({n.split(".")[1] for n in flat if n.startswith("bidirectional_mamba/layers.")}),
        connector_expand=scan_inner // width,
        connector_head_dim=scan_inner // ours,
        connector_state_size=(scan.shape[0] - scan_inner) // 2,
        connector_conv_kernel=scan.shape[2],
    )


def _tower_fields(towers: Sequence[Any]) -> dict[str, Any]:
    fixed = [tower.image_size for tower in towers if not tower.model_type.startswith("dinov2")]
    return {
        "vision_config": towers[0],
        "second_vision_config": towers[1] if len(towers) > 1 else None,
        "image_size": fixed[0] if fixed else towers[0].image_size,
    }


def _tower_weights(towers: Sequence[Any]) -> dict[str, Tensor]:
    return {f"{_TOWER}towers.{i}.{n}": v for i, tower in enumerate(towers) for n, v in tower.state_dict().items()}


def _read_parts(file: Path) -> dict[str, Tensor]:
    """Tensors of the four parts, "part/name"."""
    content = read_torch(file)
    parts = content.get("model") if isinstance(content, dict) else None
    if not isinstance(parts, dict) or set(parts) != set(PARTS) or not all(isinstance(p, dict) for p in parts.values()):
        found = listing(map(str, parts)) if isinstance(parts, dict) else type(parts).__name__
        raise CheckpointError(
            f"{file} must hold 'model' with the parts {', '.join(PARTS)}; got {found}. It is not ML-Mamba's file."
        )
    flat = {f"{part}/{name}": value for part, own in parts.items() for name, value in own.items()}
    other = [name for name, value in flat.items() if not isinstance(value, Tensor)]
    if other:
        raise CheckpointError(f"{file} must hold tensors only; got other things: {listing(other)}.")
    return flat


def _official_shapes(shapes: Mapping[str, tuple[int, ...]], config: MLMambaConfig) -> dict[str, tuple[int, ...]]:
    _require_official(config)
    expected = {}
    for name, shape in shapes.items():
        if name.startswith(_TOWER):
            continue
        theirs = official_names(name)
        own = shape if len(theirs) == 1 else shape[1:]
        if name.endswith("conv_weight"):
            own = (own[0], 1, own[1])
        expected.update(dict.fromkeys(theirs, own))
    return expected


def _require_official(config: MLMambaConfig) -> None:
    kind = (config.connector_variant, config.connector_scan)
    if kind != ("msc_advanced", "bidirectional"):
        raise ConfigError(
            f"the official layout must have an msc_advanced connector with bidirectional scans; got {kind}. "
            "No other was released."
        )


def _widened(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    wide = MLMambaForConditionalGeneration._keep_in_fp32_modules_strict or []
    kept = {n: v.float() if n.rsplit(".", 1)[-1] in wide else v for n, v in weights.items()}
    if weights.get(_HEAD) is weights.get(_EMBEDDING) and _HEAD in weights:
        kept[_HEAD] = kept[_EMBEDDING]
    return kept
