"""What the trained model answers with fewer tokens, and where its [CLS] looks."""

import contextlib
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
def by_answer(model: Any, task: PruningTask, count: int, kept: int) -> dict[str, dict[str, float]]:
    """Presence, apart for classes that are there and that are not: {"all" | arm key: {"there", "not there", "seen"}}.

    "seen" is the share of questions about classes that are there of which a patch is among those kept.
    """
    found = {}
    questions = unseen(task, "present", count)
    for key in ("all", "vtc_cls", "random"):
        arm = next((arm for arm in ARMS if arm.key == key), None)
        tally = dict.fromkeys(("there", "not there", "seen"), 0)
        total = dict.fromkeys(("there", "not there"), 0)
        for batch in questions:
            with prune(model, arm.pruner(kept)) if arm else contextlib.nullcontext() as handle:
                said = model(input_ids=batch.input_ids, pixel_values=batch.images, logits_to_keep=1).logits[:, -1]
            right, there = said.argmax(-1) == batch.answer_ids, batch.answer_ids == task.word_id["yes"]
            stays = torch.ones_like(batch.patch_classes, dtype=torch.bool)
            if handle is not None:
                stays = torch.stack(
                    [row.new_zeros(PATCHES, dtype=torch.bool).index_fill(0, row, True) for row in handle.kept]
                )
            own = batch.patch_classes == (batch.input_ids[:, -1:] - task.name_ids[0])  # names are the last words
            tally["there"] += int((right & there).sum())
            tally["not there"] += int((right & ~there).sum())
            tally["seen"] += int(((own & stays).any(1) & there).sum())
            total["there"], total["not there"] = (
                total["there"] + int(there.sum()),
                total["not there"] + int((~there).sum()),
            )
        found[key] = {name: value / total["there" if name == "seen" else name] for name, value in tally.items()}
    return found


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
