"""Training loss and accuracy of a model on canvas batches, from its logits alone."""

import torch
from torch import Tensor

from mmkernels.errors import ShapeError


def _check(function: str, logits: Tensor, input_ids: Tensor) -> None:
    if logits.ndim != 3 or logits.shape[:2] != input_ids.shape:
        raise ShapeError(
            f"{function}: logits must have shape (batch, seqlen, vocab) for input_ids {tuple(input_ids.shape)}; got "
            f"{tuple(logits.shape)}. Call the model with logits_to_keep=0."
        )


def canvas_loss(logits: Tensor, batch: dict[str, Tensor], *, image_id: int, dense: float = 1.0) -> Tensor:
    """Cross-entropy of the answer plus `dense` times that of every image token naming its own cell.

    loss = CE(logits at the last position, answer) + dense * mean over image tokens of CE(logits there, cell's word).
    The dense term gives every patch something to learn from in every batch; the answer alone asks about one cell.

    Args:
        logits: (batch, seqlen, vocab), unshifted: position t holds what the model says after token t.
        batch: from `CanvasTask.batch`; uses input_ids, answer_ids, image_labels.
        image_id: id of the image token (`CanvasTask.image_id`).
        dense: weight of the second term; 0 leaves it out.

    Returns:
        A scalar in float32 (float64 for float64 logits).

    Raises:
        ShapeError: the logits do not cover the whole sequence.
    """
    _check("canvas_loss", logits, batch["input_ids"])
    wide = logits if logits.dtype == torch.float64 else logits.float()
    loss = torch.nn.functional.cross_entropy(wide[:, -1], batch["answer_ids"])
    if dense:
        at_image = wide[batch["input_ids"] == image_id]
        loss = loss + dense * torch.nn.functional.cross_entropy(at_image, batch["image_labels"].flatten())
    return loss


def answer_accuracy(logits: Tensor, batch: dict[str, Tensor], kinds: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """Right answers and questions, overall ("all") and per kind, so that batches can be added up.

    Args:
        logits: (batch, vocab) or (batch, seqlen, vocab); the last position answers.
        batch: from `CanvasTask.batch`.
        kinds: `CanvasTask.kinds`.

    Returns:
        {"all": (right, asked), kind: (right, asked), ..}.
    """
    last = logits if logits.ndim == 2 else logits[:, -1]
    right = last.argmax(-1) == batch["answer_ids"]
    counts = {"all": (int(right.sum()), len(right))}
    for number, kind in enumerate(kinds):
        of_kind = batch["kind"] == number
        counts[kind] = (int(right[of_kind].sum()), int(of_kind.sum()))
    return counts
