"""Conversations about canvases in ML-Mamba's template: a question about each of some cells, each with its answer."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmkernels.data import CanvasTask
from mmkernels.models.common.word_tokenizer import build_word_tokenizer

EOS = "<|endoftext|>"
MARKS = (EOS, "<unk>", "<|user|>", "<|assistant|>")  # "<|endoftext|>" also pads, as in the released tokenizer
IGNORED = -100
_SPLITS = ("train", "test")


class CanvasTalk:
    """Batches of one task as [image | question, answer, question, answer, ...], a function of (seed, split, number).

    Args:
        task: where canvases and places come from.
        turns: cells asked about, all different.

    Example:
        >>> talk = CanvasTalk(CanvasTask(grid=2, kinds=("pos",), channels=1), turns=2)
        >>> batch = talk.batch(0, 3)
        >>> batch["input_ids"].shape, batch["patches"].shape
        (torch.Size([3, 22]), torch.Size([3, 4]))
    """

    def __init__(self, task: CanvasTask, turns: int):
        self.task, self.turns = task, turns
        self.words = [*MARKS, *(word for word in task.vocab if not word.startswith("<"))]
        self.word_id = {word: index for index, word in enumerate(self.words)}
        self._known = torch.tensor([self.word_id.get(word, 1) for word in task.vocab])
        places = task.places()
        asked = [f"<|user|> what is in {place} ? {EOS} <|assistant|>".split() for place in places]
        self._questions = torch.tensor([[self.word_id[word] for word in words] for words in asked])

    def tokenizer(self) -> Any:
        """A tokenizer with these words."""
        return build_word_tokenizer(self.words, pad_token=EOS, eos_token=EOS)

    def question(self, cell: int) -> str:
        """The question about a cell, as the processor takes it.

        >>> CanvasTalk(CanvasTask(kinds=("pos",)), turns=1).question(4)
        'what is in the center ?'
        """
        return f"what is in {self.task.places()[cell]} ?"

    def batch(self, index: int, size: int, *, split: str = "train", turns: int | None = None) -> dict[str, Tensor]:
        """Batch number `index` of a split.

        Returns:
            images (batch, 1, height, width) in [0, 1]; input_ids (batch, seqlen), the conversations, all of one length;
            labels: answers and their ends, else -100; patches (batch, image tokens): the word of each patch's cell;
            answers (batch, turns) and cells (batch, turns): what was asked.
        """
        canvas, turns = self.task.batch(index, size, split=split), turns or self.turns
        rng = np.random.default_rng([self.task.seed, 1 + _SPLITS.index(split), index])
        cells = torch.from_numpy(rng.random((size, self.task.grid**2)).argsort(1)[:, :turns].copy())
        named = self._known[canvas["cell_labels"]]
        answers = named.gather(1, cells)
        ends = torch.zeros_like(answers)  # EOS is word 0
        rows = torch.cat([self._questions[cells], answers[..., None], ends[..., None]], 2)
        labels = rows.clone()
        labels[..., :-2] = IGNORED
        return {
            "images": canvas["images"],
            "input_ids": rows.flatten(1),
            "labels": labels.flatten(1),
            "patches": self._known[canvas["image_labels"]],
            "answers": answers,
            "cells": cells,
        }
