"""The demo's teacher: a small vision-language model with attention in every layer, trained on canvases."""

import math
from collections.abc import Callable
from typing import Any

import torch

from mmkernels.data import CanvasTask, answer_accuracy, canvas_loss

# Wide initial weights (a common 0.02 is made for models ten times as wide): 0.96 against 0.67 after 1000 steps.
_INITIALIZER_RANGE = 0.08
_LEARNING_RATE = 1.2e-3
_WARMUP = 100


def teacher_config(task: CanvasTask) -> Any:
    """A HoVLE of toy size: one embedding layer, three decoder layers, width 128, 4 heads over 2 key/value heads."""
    from mmkernels.models.mmmamba import MMMambaConfig

    return MMMambaConfig(  # type: ignore[call-arg]  # transformers' dataclass transform hides our defaults
        vocab_size=len(task.vocab),
        hidden_size=128,
        intermediate_size=256,
        num_embedding_layers=1,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        image_size=task.image_size,
        patch_size=task.cell // 2,  # 2 x 2 patches a cell, joined by the pixel shuffle into one image token
        downsample_ratio=0.5,
        num_channels=task.channels,
        image_token_id=task.image_id,
        initializer_range=_INITIALIZER_RANGE,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        max_position_embeddings=131072,
        bos_token_id=None,
        eos_token_id=task.eos_id,
        pad_token_id=task.pad_id,
    )


def cosine_rate(step: int, steps: int, peak: float, warmup: int = _WARMUP) -> float:
    """Linear warm-up, then a cosine that ends at a twentieth of the peak; `step` counts from 1."""
    rising = min(1.0, step / max(1, min(warmup, steps // 5)))
    return peak * rising * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def train_on_answers(
    model: Any,
    task: CanvasTask,
    *,
    steps: int,
    batch_size: int,
    on_step: Callable[[int, float], None] | None = None,
    learning_rate: float = _LEARNING_RATE,
) -> list[float]:
    """Train a model on questions, answers and cell labels; returns the loss of every step.

    Args:
        model: causal model over the task's vocabulary; trained in place.
        task: where batches come from; batch number i is step i.
        steps, batch_size: how much.
        on_step: called with (step, loss) after every step, e.g. to move a progress bar.
        learning_rate: peak of the cosine schedule.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    from mmkernels.distill import model_inputs

    losses, source = [], task.source()
    model.train()
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = cosine_rate(step, steps, learning_rate)
        batch = source(step - 1, batch_size)
        loss = canvas_loss(model(**model_inputs(batch), use_cache=False).logits, batch, image_id=task.image_id)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if on_step is not None:
            on_step(step, losses[-1])
    model.eval()
    return losses


@torch.no_grad()
def accuracy(model: Any, task: CanvasTask, questions: int, *, batch_size: int = 250) -> dict[str, float]:
    """Share of right answers on unseen canvases: {"all": ..., kind: ...}."""
    from mmkernels.distill import model_inputs

    was_training, source = model.training, task.source("test")
    model.eval()
    right: dict[str, int] = {}
    asked: dict[str, int] = {}
    for index in range(math.ceil(questions / batch_size)):
        batch = source(index, min(batch_size, questions - index * batch_size))
        logits = model(**model_inputs(batch), use_cache=False, logits_to_keep=1).logits
        for kind, (good, total) in answer_accuracy(logits, batch, task.kinds).items():
            right[kind] = right.get(kind, 0) + good
            asked[kind] = asked.get(kind, 0) + total
    model.train(was_training)
    return {kind: right[kind] / max(1, asked[kind]) for kind in right}
