"""What the trained model answers with fewer tokens, and where its [CLS] looks."""

import math
from collections.abc import Callable
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from mmkernels.demo.pruning.arms import ARMS, Arm
from mmkernels.demo.pruning.settings import PruningSettings
from mmkernels.demo.pruning.task import GRID, KINDS, PruningTask, Questions
from mmkernels.interop.prune import prune
from mmkernels.interop.prune_tower import vit
from mmkernels.pruning import DecoderPruner, DecoderStep, Tap, TokenPruner

PATCHES = GRID * GRID
_BATCH = 250


def unseen(task: PruningTask, kind: str, count: int) -> list[Questions]:
    """Unseen questions of a kind, always the same."""
    sizes = [min(_BATCH, count - start) for start in range(0, count, _BATCH)]
    return [task.batch(kind, index, size, split="test") for index, size in enumerate(sizes)]


@torch.no_grad()
def accuracy(model: Any, task: PruningTask, questions: list[Questions]) -> float:
    """Share of right answers; of a set, all its classes must be right."""
    right = asked = 0
    for batch in questions:
        said = model(input_ids=batch.input_ids, pixel_values=batch.images, logits_to_keep=1).logits[:, -1]
        if batch.answer_ids[0] < 0:
            good = ((said[:, task.name_ids] > 0) == batch.present).all(1)
        else:
            good = said.argmax(-1) == batch.answer_ids
        right, asked = right + int(good.sum()), asked + len(good)
    return right / asked


def measure(
    model: Any, task: PruningTask, settings: PruningSettings, on_point: Callable[[], None] | None = None
) -> dict[str, Any]:
    """Accuracy of every pruner at every number of tokens; nothing is trained.

    Returns:
        {"unpruned": {kind: accuracy}, "pruned": {arm key: {kind: {kept: accuracy or None}}}}; None where the pruner
        cannot go as low.
    """
    questions = {kind: unseen(task, kind, settings.questions) for kind in KINDS}
    pruned: dict[str, Any] = {}
    for arm in ARMS:
        pruned[arm.key] = {kind: {} for kind in KINDS}
        for kept in settings.kept:
            for kind in KINDS:
                pruned[arm.key][kind][kept] = _point(model, task, questions[kind], arm, kept, settings)
            if on_point is not None:
                on_point()
    return {
        "unpruned": {kind: accuracy(model, task, questions[kind]) for kind in KINDS},
        "pruned": pruned,
    }


def _point(
    model: Any, task: PruningTask, questions: list[Questions], arm: Arm, kept: int, settings: PruningSettings
) -> float | None:
    if kept < arm.least:
        return None
    scores = []
    for seed in range(settings.random_seeds if arm.seeded else 1):
        with prune(model, arm.pruner(kept, seed)):
            scores.append(accuracy(model, task, questions))
    return fmean(scores)


@torch.no_grad()
def cls_mass(model: Any, task: PruningTask, count: int) -> dict[str, Any]:
    """Share of [CLS]'s attention to patches that lands on ink, layer by layer, and the share of patches with ink."""
    tower = vit(model.model.vision_tower)
    layers = range(len(tower.layers))
    taps = tuple(Tap(layer, "cls_row") for layer in layers)
    mass: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    ink = []
    for batch in unseen(task, "present", count):
        seen = tower.run(batch.images, num_tokens=PATCHES, layers=(layers[-1],), taps=taps)
        inked = (batch.patch_classes < len(task.names)).float()
        ink.append(inked.mean(1))
        for tap, row in seen.taps.items():
            mass[tap.layer].append((row * inked).sum(1) / row.sum(1))
    return {
        "uniform": float(torch.cat(ink).mean()),
        "layers": [float(torch.cat(mass[layer]).mean()) for layer in layers],
    }


@torch.no_grad()
def kept_patches(model: Any, batch: Questions, pruner: TokenPruner) -> list[list[int]]:
    """The patches of each image that a pruner keeps, or stand for what it merges."""
    chosen: list[Tensor] = []
    if isinstance(pruner, DecoderPruner):
        pruner = _watched(pruner, chosen)
    with prune(model, pruner) as handle:
        model(input_ids=batch.input_ids, pixel_values=batch.images, logits_to_keep=1)
    if chosen:
        return [row.nonzero()[:, 0].tolist() for row in chosen[-1]]
    return [[i for i in kept.tolist() if i >= 0] for kept in handle.kept]


def _watched(pruner: DecoderPruner, chosen: list[Tensor]) -> DecoderPruner:
    """The same pruner; what it keeps of the visual tokens is written down as (batch, patches) bool."""

    class Watched(type(pruner)):  # type: ignore[misc]
        def keep(self, step: DecoderStep) -> Tensor:
            stays: Tensor = super().keep(step)
            chosen.append(stays[step.is_visual].view(len(stays), -1))
            return stays

    return Watched(**{name: getattr(pruner, name) for name in ("num_keep", "layer") if hasattr(pruner, name)})


def standard_error(share: float, count: int) -> float:
    """Of a share of so many questions."""
    return math.sqrt(share * (1 - share) / count)
