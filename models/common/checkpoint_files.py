"""Read and write weight files: safetensors or PyTorch's own, whole or in shards, with errors that name file and keys.

Nothing is executed while reading: PyTorch files go through weights_only=True.
"""

import json
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmkernels.errors import CheckpointError

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pt")
_SHOWN = 6


def listing(names: Iterable[str]) -> str:
    """A few names and how many more there are, for messages."""
    every = sorted(names)
    more = f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
    return ", ".join(every[:_SHOWN]) + more


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: the file is missing, damaged, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} must be a readable JSON file; got {error}. Download it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object; got {type(content).__name__}. Download it again.")
    return content


def weight_files(source: Path) -> list[Path]:
    """The files that hold the weights of a checkpoint: a file itself, or what a folder's index or usual names say.

    Raises:
        CheckpointError: there are none, or the index names a shard that is missing.
    """
    if source.is_file():
        return [source]
    for name in _INDEXES:
        if (source / name).is_file():
            shards = read_json(source / name).get("weight_map")
            if not isinstance(shards, dict) or not shards:
                raise CheckpointError(f"{source / name} must hold a weight_map; got none. Download it again.")
            files = [source / shard for shard in sorted(set(shards.values()))]
            lost = [file.name for file in files if not file.is_file()]
            if lost:
                raise CheckpointError(f"{source / name} names shards that are missing: {listing(lost)}. Download them.")
            return files
    for name in _SINGLE:
        if (source / name).is_file():
            return [source / name]
    raise CheckpointError(
        f"{source} must be a weight file or a folder with one of {', '.join((*_INDEXES, *_SINGLE))}; got neither. "
        "Check the path."
    )


def read_weights(source: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by name (for a PyTorch file with a "model_state_dict": that).

    Raises:
        CheckpointError: a file is missing, truncated, damaged or unsafe, a name comes twice, or shards and index
            disagree.
    """
    weights: dict[str, Tensor] = {}
    for file in weight_files(source):
        part = _read_safetensors(file) if file.suffix == ".safetensors" else _read_torch(file)
        twice = weights.keys() & part.keys()
        if twice:
            raise CheckpointError(f"{file} repeats tensors of another shard: {listing(twice)}. Download it again.")
        weights.update(part)
    for name in _INDEXES:
        if source.is_dir() and (source / name).is_file():
            differing = set(read_json(source / name)["weight_map"]) ^ set(weights)
            if differing:
                raise CheckpointError(
                    f"{source / name} and its shards must list the same tensors; got differences: "
                    f"{listing(differing)}. Download both again."
                )
            break
    return weights


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} must be a complete safetensors file; got {file.stat().st_size} bytes that are not one ({error}). "
            "It was probably cut off: download it again."
        ) from error


def read_torch(file: Path) -> Any:
    """What a PyTorch file holds; nothing in it is executed.

    Raises:
        CheckpointError: the file is missing, truncated, damaged or unsafe.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} must hold tensors and plain containers only; got other objects or no pickle at all. "
            f"Loading it would run code, or it is damaged ({str(error).splitlines()[0]})."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{file} must be a complete PyTorch file; got {type(error).__name__}: {str(error).splitlines()[0]}. "
            "It was probably cut off: download it again."
        ) from error


def _read_torch(file: Path) -> dict[str, Tensor]:
    content = read_torch(file)
    if isinstance(content, dict) and isinstance(content.get("model_state_dict"), dict):
        content = content["model_state_dict"]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(
            f"{file} must map names to tensors, or hold such a map as 'model_state_dict'; got "
            f"{type(content).__name__} with other things. Save a state dict."
        )
    return dict(content)


def check_weights(
    source: object, weights: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], optional: Iterable[str] = ()
) -> None:
    """Compare a checkpoint with what it should hold: names both ways, shapes, finite values.

    Args:
        source: named in the message.
        weights: what was read.
        shapes: name -> shape of everything that may be there.
        optional: names that need not be there.

    Raises:
        CheckpointError: naming the keys, all kinds of trouble at once.
    """
    trouble = []
    missing = shapes.keys() - weights.keys() - set(optional)
    unexpected = weights.keys() - shapes.keys()
    common = shapes.keys() & weights.keys()
    misshapen = [
        f"{k} {tuple(weights[k].shape)} instead of {shapes[k]}" for k in common if weights[k].shape != shapes[k]
    ]
    broken = [k for k in common if weights[k].is_floating_point() and not bool(torch.isfinite(weights[k]).all())]
    integers = [k for k in common if not weights[k].is_floating_point()]
    for kind, names in (
        ("missing", missing),
        ("unexpected", unexpected),
        ("of another shape", misshapen),
        ("not finite", broken),
        ("not floating point", integers),
    ):
        if names:
            trouble.append(f"{len(set(names))} {kind} ({listing(names)})")
    if trouble:
        raise CheckpointError(
            f"{source} must hold exactly the expected tensors; got {'; '.join(trouble)}. "
            "Check layout and configuration, or download the file again."
        )
