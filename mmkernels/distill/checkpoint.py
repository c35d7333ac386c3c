"""Checkpoints that survive kill -9 and a full disk: written beside, synced, then renamed into place."""

import hashlib
import json
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from mmkernels.errors import CheckpointError

FORMAT = 1
_TEMPORARY = ".unfinished-"
_WEIGHTS, _STATE, _MANIFEST = "student.safetensors", "state.pt", "manifest.json"
# fields that change what is written or printed, but not one number of the training
_FREE_FIELDS = ("name", "about", "log_every", "checkpoint_every", "eval_every", "keep_checkpoints")


class Recipe(Protocol):
    """What a checkpoint remembers of a recipe: its plain values."""

    def to_dict(self) -> dict[str, Any]:
        """Nested dicts, lists, numbers and texts."""
        ...


@dataclass
class Progress:
    """Where a run stands.  position counts the micro-batches that all processes have consumed together."""

    stage: int = 0
    step: int = 0
    global_step: int = 0
    position: int = 0


def random_state() -> dict[str, Any]:
    """The states of Python's, numpy's and torch's generators of this process, as tensors and plain values."""
    name, keys, *rest = np.random.get_state()
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Puts back what `random_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def save_checkpoint(
    folder: Path,
    *,
    student: nn.Module,
    optimizer_state: dict[str, Any],
    progress: Progress,
    random_states: list[dict[str, Any]],
    recipe: Recipe,
    teacher: str,
    keep: int,
) -> Path:
    """Writes one checkpoint atomically and removes all but the latest `keep`.

    Args:
        folder: holds the checkpoints, one directory `step-<global step>` each.
        student: all of its weights are written, frozen ones too, so that a checkpoint stands alone.
        optimizer_state, progress, random_states (one per process), recipe: the rest of the run.
        teacher: its `fingerprint` (where there is no teacher: that of the model the run starts from).
        keep: how many finished checkpoints stay.

    Returns:
        The checkpoint's directory.

    Raises:
        CheckpointError: it cannot be written; earlier checkpoints are untouched.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_model

    final = folder / f"step-{progress.global_step:08d}"
    temporary = folder / f"{_TEMPORARY}{final.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        clear_unfinished(folder)
        temporary.mkdir()
        save_model(student, str(temporary / _WEIGHTS))
        state = {"optimizer": optimizer_state, "progress": vars(progress), "random": random_states}
        torch.save(state, temporary / _STATE)
        sizes = {name: (temporary / name).stat().st_size for name in (_WEIGHTS, _STATE)}
        manifest = {"format": FORMAT, "recipe": recipe.to_dict(), "teacher": teacher, "files": sizes}
        (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        for path in [*temporary.iterdir(), temporary]:
            _sync(path)
        temporary.rename(final)
        _sync(folder)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save reports a full disk as RuntimeError
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"save_checkpoint: folder must be writable and have room; got {type(error).__name__}: {error} in {folder}. "
            "Earlier checkpoints are intact: free some space and start the same command again."
        ) from error
    for old in finished(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def finished(folder: Path) -> list[Path]:
    """The finished checkpoints, oldest first."""
    return sorted(folder.glob("step-*")) if folder.is_dir() else []


def clear_unfinished(folder: Path) -> None:
    """Removes what a killed run left half-written."""
    for path in folder.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path)


def fingerprint(model: nn.Module) -> str:
    """A short digest of a model: names and shapes of its parameters and the first numbers of each."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        head = parameter.detach().flatten()[:64].to("cpu", torch.float64)
        digest.update(f"{name} {tuple(parameter.shape)}".encode() + head.numpy().tobytes())
    return digest.hexdigest()[:16]


def read_manifest(checkpoint: Path, recipe: Recipe, teacher: str) -> None:
    """Checks that a checkpoint is whole and belongs to this recipe and teacher.

    Raises:
        CheckpointError: a file is missing or of another size, the format is unknown, or recipe or teacher differ.
    """
    try:
        manifest = json.loads((checkpoint / _MANIFEST).read_text(encoding="utf-8"))
        sizes = {name: (checkpoint / name).stat().st_size for name in manifest["files"]}
        known, files, written = manifest["format"], manifest["files"], manifest["recipe"]
        taught_by = manifest["teacher"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"load_checkpoint: checkpoint must be complete; got {type(error).__name__}: {error} in {checkpoint}. "
            "Delete that folder to go on from the one before it."
        ) from error
    if known != FORMAT:
        raise CheckpointError(
            f"load_checkpoint: checkpoint must have format {FORMAT}; got {known} in {checkpoint}. "
            "Resume it with the version of mmkernels that wrote it."
        )
    if sizes != files:
        raise CheckpointError(
            f"load_checkpoint: checkpoint must have files of {files} bytes; got {sizes} in {checkpoint}. "
            "Delete that folder to go on from the one before it."
        )
    if taught_by != teacher:
        raise CheckpointError(
            f"load_checkpoint: teacher must be the one the run was started with ({taught_by}); got {teacher} "
            f"({checkpoint}). Give the same teacher, or choose another output folder."
        )
    changes = differences(written, recipe.to_dict())
    if changes:
        raise CheckpointError(
            f"load_checkpoint: recipe must be the one the run was started with; got {'; '.join(changes[:3])} "
            f"({checkpoint}). Restore the recipe, or choose another output folder."
        )


def load_checkpoint(checkpoint: Path, student: nn.Module) -> tuple[dict[str, Any], Progress, list[dict[str, Any]]]:
    """Loads the weights into `student`, strictly, and returns optimizer state, progress and random states.

    Raises:
        CheckpointError: the files are damaged, or the weights are those of another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    state = read_state(checkpoint)
    try:
        load_model(student, str(checkpoint / _WEIGHTS), strict=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"load_checkpoint: checkpoint must hold this student's weights; got {error} in {checkpoint}. "
            "Give the same teacher and student as at the start."
        ) from error
    return state["optimizer"], Progress(**state["progress"]), state["random"]


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Everything but the weights.

    Raises:
        CheckpointError: the file is damaged.
    """
    import pickle

    try:
        return torch.load(checkpoint / _STATE, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"load_checkpoint: checkpoint must be readable; got {error} in {checkpoint}. "
            "Delete that folder to go on from the one before it."
        ) from error


def differences(then: Any, now: Any, where: str = "") -> list[str]:
    """Readable differences of two plain recipes, fields that do not change the training left out."""
    if isinstance(then, dict) and isinstance(now, dict):
        keys = [k for k in {**then, **now} if where or k not in _FREE_FIELDS]
        return [d for k in keys for d in differences(then.get(k), now.get(k), f"{where}.{k}" if where else k)]
    if isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        return [d for i, pair in enumerate(zip(then, now, strict=True)) for d in differences(*pair, f"{where}[{i}]")]
    return [] if then == now else [f"{where} was {then!r} and is {now!r}"]


def to_cpu(value: Any) -> Any:
    """A nested optimizer state with its tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: to_cpu(item) for key, item in value.items()}
    return [to_cpu(item) for item in value] if isinstance(value, list) else value
