"""What every checkpoint converter does: refuse early, rename strictly, write a checkpoint whole or not at all."""

import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mmkernels.errors import CheckpointError, ConfigError, nearest
from mmkernels.models.common.checkpoint_files import check_weights

PathLike = str | Path
Shapes = dict[str, tuple[int, ...]]


def check_known(**options: tuple[str, Collection[str]]) -> None:
    """Refuse options of `convert_checkpoint` that are none of the known words: name=(value, known).

    Raises:
        ConfigError: naming the nearest word.
    """
    for name, (value, known) in options.items():
        if value not in known:
            raise ConfigError(f"convert_checkpoint: {name} must be known; got {value!r}. {nearest(value, known)}")


def free_destination(destination: PathLike, overwrite: bool) -> Path:
    """Where to write; asked before anything is read, which takes long.

    Raises:
        CheckpointError: something is there and must not be replaced.
    """
    target = Path(destination)
    if target.exists() and not overwrite and (target.is_file() or any(target.iterdir())):
        raise CheckpointError(
            f"convert_checkpoint: destination must not exist yet; got {target}. Choose another or pass overwrite=True."
        )
    return target


@contextmanager
def written_whole(target: Path, *, folder: bool = True) -> Iterator[Path]:
    """A place beside `target` to write to; it takes the target's name when all of it is written.

    Args:
        target: to replace.
        folder: make the place a folder; False: leave it to the writer, who may want a file.
    """
    partial = target.with_name(f"{target.name}.partial")
    _remove(partial)
    (partial if folder else partial.parent).mkdir(parents=True, exist_ok=True)
    yield partial
    _remove(target)
    partial.rename(target)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def model_shapes(kind: Callable[[Any], Any], config: Any) -> Shapes:
    """Name -> shape of every tensor of a model, which is never made for it."""
    with torch.device("meta"):
        model = kind(config)
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def save_model(kind: Callable[[Any], Any], config: Any, weights: Mapping[str, Tensor], folder: Path, head: str) -> None:
    """Write weights as transformers does, in the precision that the tensor `head` has."""
    with torch.device("meta"):
        model = kind(config)
    model.load_state_dict(weights, strict=True, assign=True)
    model.tie_weights()
    model.config.dtype = weights[head].dtype
    model.save_pretrained(folder)


def save_tensors(weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write `model.safetensors`."""
    whole = {name: value.contiguous() for name, value in weights.items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})


def other_beginning(name: str, prefixes: Sequence[tuple[str, str]]) -> str | None:
    """The name with the first beginning that fits put in the place of ours; None where none fits.

    >>> other_beginning("tower.layers.0", (("tower.", "model.vision."),))
    'model.vision.layers.0'
    """
    for mine, theirs in prefixes:
        if name.startswith(mine):
            return theirs + name.removeprefix(mine)
    return None


def under_our_names(
    source: object, weights: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], rename: Callable[[str], str]
) -> dict[str, Tensor]:
    """A checkpoint in another layout, checked, under our names.

    Args:
        source: named in the message.
        weights: under their names.
        shapes: of our tensors, by our names.
        rename: our name to theirs.

    Raises:
        CheckpointError: a missing, unexpected, misshapen or non-finite tensor.
    """
    names = {rename(name): name for name in shapes}
    check_weights(source, weights, {theirs: shapes[name] for theirs, name in names.items()})
    return {names[theirs]: value for theirs, value in weights.items()}
