"""Train one arm: the same weights at the start, batches, steps and schedule whatever the arm."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmkernels.data import CanvasTask, answer_accuracy, canvas_loss
from mmkernels.demo.mma.arms import Arm, answered_ids, arm_mask, prompt_ids
from mmkernels.demo.mma.model import CanvasDecoder
from mmkernels.demo.mma.settings import MMASettings
from mmkernels.demo.teacher import cosine_rate
from mmkernels.ops.mma_attention.mask import MMAMask
from mmkernels.ops.mma_attention.spans import check_no_label_leak

_EVALUATION_BATCH = 250


def fresh_model(task: CanvasTask, seed: int) -> CanvasDecoder:
    """The model every arm of a seed starts from, bit for bit."""
    torch.manual_seed(seed)
    return CanvasDecoder(task)


def training_batch(task: CanvasTask, arm: Arm, order: str, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, MMAMask]:
    """(input_ids, labels, mask) of a batch: prompt and answer, the answer alone supervised."""
    ids, labels = answered_ids(prompt_ids(task, batch, order), batch["answer_ids"])
    return ids, labels, arm_mask(arm, task, ids)


def check_arm(task: CanvasTask, arm: Arm, batch_size: int = 2) -> None:
    """Refuse an arm whose mask shows the answer to a row in front of it.

    Raises:
        DataError: from `check_no_label_leak`.
    """
    batch = task.batch(0, batch_size)
    for order in arm.orders:
        _, labels, mask = training_batch(task, arm, order, batch)
        check_no_label_leak(labels, mask)


def train_one(settings: MMASettings, arm: Arm, seed: int, on_step: Callable[[], None]) -> dict[str, Any]:
    """`train_arm` as a job: the planted leak is let pass."""
    return train_arm(arm, settings, seed, allow_label_leak=arm.opens == "answer", on_step=on_step)


def train_arm(
    arm: Arm,
    settings: MMASettings,
    seed: int,
    *,
    allow_label_leak: bool = False,
    on_step: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Train one arm on one seed and ask it unseen questions along the way.

    Args:
        arm: the mask and the order.
        settings: the amount of everything.
        seed: of weights and data.
        allow_label_leak: train even though the mask shows the answer; for the negative control only.
        on_step: called after every step.

    Returns:
        {"answer_loss": one number a step, "points": [{"step", "accuracy", "questions"}], "accuracy": at the end,
        "cells_read": share of the occupied cells whose own patch token names them right, at the end}.

    Raises:
        DataError: the mask leaks the label and allow_label_leak is off; or the data cannot be read.
    """
    task = settings.task(seed)
    if not allow_label_leak:
        check_arm(task, arm)
    model = fresh_model(task, seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    steps, losses, points = settings.steps, [], []
    measured = {max(1, round(steps * n / settings.points)) for n in range(1, settings.points + 1)}
    masks: dict[str, MMAMask] = {}
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = cosine_rate(step, steps, settings.learning_rate)
        batch, order = task.batch(step - 1, settings.batch_size), arm.order_at(step, steps)
        ids, _ = answered_ids(prompt_ids(task, batch, order), batch["answer_ids"])
        if order not in masks:
            masks[order] = arm_mask(arm, task, ids)
        # the answer's own row predicts what nobody asks for
        logits, seen = model(ids, batch["images"], masks[order])[:, :-1], {**batch, "input_ids": ids[:, :-1]}
        loss = canvas_loss(logits, seen, image_id=task.image_id)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            losses.append(canvas_loss(logits, seen, image_id=task.image_id, dense=0.0).item())
        if step in measured:
            asked = settings.questions if step == steps else max(1, settings.questions // 4)
            points.append({"step": step, "questions": asked, **evaluate(model, arm, task, asked)})
        if on_step is not None:
            on_step()
    return {
        "answer_loss": [round(value, 5) for value in losses],
        "points": points,
        "accuracy": points[-1]["accuracy"],
        "cells_read": points[-1]["cells_read"],
    }


@torch.no_grad()
def evaluate(model: CanvasDecoder, arm: Arm, task: CanvasTask, questions: int) -> dict[str, float]:
    """Share of right answers on unseen canvases, from the prompt alone: the answer is not in the sequence."""
    right = asked = read = occupied = 0
    for index in range(math.ceil(questions / _EVALUATION_BATCH)):
        batch = task.batch(index, min(_EVALUATION_BATCH, questions - index * _EVALUATION_BATCH), split="test")
        ids = prompt_ids(task, batch, arm.orders[-1])
        logits = model(ids, batch["images"], arm_mask(arm, task, ids))
        good, total = answer_accuracy(logits, batch, task.kinds)["all"]
        named = logits[ids == task.image_id].argmax(-1) == batch["image_labels"].flatten()
        filled = batch["image_labels"].flatten() != task.word_id["empty"]
        right, asked = right + good, asked + total
        read, occupied = read + int(named[filled].sum()), occupied + int(filled.sum())
    return {"accuracy": right / asked, "cells_read": read / max(1, occupied)}


def majority(task: CanvasTask, questions: int) -> float:
    """Accuracy of always giving the most common answer to those questions."""
    sizes = [min(_EVALUATION_BATCH, questions - start) for start in range(0, questions, _EVALUATION_BATCH)]
    answers = torch.cat([task.batch(i, size, split="test")["answer_ids"] for i, size in enumerate(sizes)])
    return int(answers.bincount().max()) / len(answers)
