"""Train encoder and reader together, on all tokens: pruning comes afterwards and nothing is tuned for it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmkernels.demo.pruning.model import TrainingHeads, encode_and_read, fresh_model
from mmkernels.demo.pruning.settings import PruningSettings
from mmkernels.demo.pruning.task import FIRST, KINDS, PruningTask, Questions
from mmkernels.demo.teacher import cosine_rate

# of the sum over classes, so that it weighs like one cross-entropy
_CANVAS_WEIGHT = 0.5


def train(
    task: PruningTask, settings: PruningSettings, on_step: Callable[[], None] | None = None
) -> tuple[Any, list[float]]:
    """Train one model.

    Args:
        task: the questions; the three kinds take equal parts of every batch.
        settings: the amount.
        on_step: called after every step.

    Returns:
        (model in eval mode, the answer's loss of every step).
    """
    model = fresh_model(task, settings.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed + 1)
        heads = TrainingHeads(model.config.vision_config.hidden_size, len(task.names))
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    losses = []
    model.train()
    for step in range(1, settings.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = cosine_rate(step, settings.steps, settings.learning_rate)
        share = max(1, settings.batch_size // len(KINDS))
        batches = {kind: task.batch(kind, step - 1, share) for kind in KINDS}
        answer, dense = loss_of(model, heads, task, batches)
        optimizer.zero_grad(set_to_none=True)
        (answer + dense).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(round(float(answer.detach()), 5))
        if on_step is not None:
            on_step()
    return model.eval(), losses


def loss_of(
    model: Any, heads: TrainingHeads, task: PruningTask, batches: dict[str, Questions]
) -> tuple[Tensor, Tensor]:
    """(loss of the answers, loss of what [CLS] and the patches name) of one step.

    Patches name themselves twice: in the encoder, and in the decoder by its words.  Without the first, tokens of so
    small an encoder become registers of the whole canvas, and it makes no difference which of them are kept.
    """
    images, ids, present, patches = (
        torch.cat([getattr(batch, name) for batch in batches.values()])
        for name in ("images", "input_ids", "present", "patch_classes")
    )
    hidden, logits = encode_and_read(model, images, ids)
    canvas, patch = heads(hidden)
    sizes = [len(batch.images) for batch in batches.values()]
    answer = logits.new_zeros(())
    for batch, said in zip(batches.values(), logits[:, -1].split(sizes), strict=True):
        answer = answer + (
            set_loss(said[:, task.name_ids], batch.present)
            if batch.answer_ids[0] < 0
            else F.cross_entropy(said, batch.answer_ids)
        )
    dense = set_loss(canvas, present) + F.cross_entropy(patch.flatten(0, 1), patches.flatten())
    named = logits[:, FIRST : FIRST + patches.shape[1]].flatten(0, 1)
    dense = dense + F.cross_entropy(named, task.patch_ids[patches.flatten()])
    return answer / len(sizes), dense


def set_loss(logits: Tensor, present: Tensor) -> Tensor:
    """Cross-entropy of a yes or no for each class, summed over classes."""
    each = F.binary_cross_entropy_with_logits(logits, present.to(logits.dtype), reduction="none")
    return _CANVAS_WEIGHT * each.sum(1).mean()
