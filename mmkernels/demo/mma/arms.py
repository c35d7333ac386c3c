"""The arms of the comparison: the order of the sequence and the keys that a mask opens; nothing else differs.

Modality-mutual attention and dual-order training: AKI, arXiv 2503.02597, sections 3 and 4.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mmkernels.data import CanvasTask
from mmkernels.ops.mma_attention.mask import MMAMask, mma_mask
from mmkernels.ops.mma_attention.spans import IGNORED, build_mutual_spans


@dataclass(frozen=True)
class Arm:
    """One way of attending.

    Args:
        key: name in results.json and on the command line.
        label: name in tables and pictures.
        opens: what image rows may read beyond causal attention: "nothing", "question", "image", or "answer" (all that
            follows, the answer included: a planted fault).
        orders: of the sequence, one for each equal part of the training; questions are asked in the last one.
        colour: in the pictures.
    """

    key: str
    label: str
    opens: str
    orders: tuple[str, ...]
    colour: str

    def order_at(self, step: int, steps: int) -> str:
        """The order of training step `step` (from 1) of `steps`."""
        return self.orders[(step - 1) * len(self.orders) // steps]


ARMS = (
    Arm("causal", "causal", "nothing", ("image_first",), "#d08770"),
    Arm("mma", "modality-mutual (MMA)", "question", ("image_first",), "#1b9e77"),
    Arm("bidirectional", "bidirectional image", "image", ("image_first",), "#8f6fb0"),
    Arm("question_first", "question before image", "nothing", ("question_first",), "#2b6cb0"),
    Arm("dual_order", "dual order (DOT)", "nothing", ("question_first", "image_first"), "#b8860b"),
    Arm("leak", "MMA with a planted label leak", "answer", ("image_first",), "#c0392b"),
)


def prompt_ids(task: CanvasTask, batch: dict[str, Tensor], order: str) -> Tensor:
    """(batch, seqlen) prompts in an order, from a batch of a task of either: the "?" that asks stays last."""
    words = batch["question_ids"]
    image = words.new_full((len(words), task.num_image_tokens), task.image_id)
    parts = [image, words] if order == "image_first" else [words[:, :-1], image, words[:, -1:]]
    return torch.cat(parts, 1)


def answered_ids(prompts: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    """Training sequences (prompt, answer) and their labels: -100 everywhere but at the answer."""
    ids = torch.cat([prompts, answers[:, None]], 1)
    labels = torch.full_like(ids, IGNORED)
    labels[:, -1] = answers
    return ids, labels


def arm_mask(arm: Arm, task: CanvasTask, ids: Tensor) -> MMAMask:
    """Who attends whom in a batch whose rows are laid out alike, as questions of one kind are.

    The planted leak is a mistake that is easy to make: spans built without saying where the prompt ends, so that in
    training the answer counts as part of the question.
    """
    row, image = ids[:1], task.image_id
    if arm.opens == "question":
        spans = build_mutual_spans(row, image_token_id=image, prompt_end_token_id=task.word_id["?"])
    elif arm.opens == "answer":
        spans = build_mutual_spans(row, image_token_id=image)
    elif arm.opens == "image":
        places = (row[0] == image).nonzero()[:, 0]
        first, end = int(places[0]), int(places[-1]) + 1
        spans = torch.tensor([[0, first, end, first, end]], dtype=torch.int32)
    else:
        spans = None
    return mma_mask(ids.shape[1], spans=spans).expand(len(ids))
