"""Questions about presence and number: "is there a three", "which things are there", "how many of three".

The word that is asked for comes last, where the answer is read: finding it among the
patches is one step of attention.

Canvases of 42 x 42 pixels hold scans in 3 x 3 cells, one to eight in training and two to four when asked; an encoder
sees 6 x 6 patches of them.  A word stands before the image, as a system prompt does: a reader needs somewhere to look
when there is nothing to see.
"""

import dataclasses
import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmkernels.data import CanvasTask

KINDS = ("present", "which", "count")
CELL, PATCH, GRID = 14, 7, 6
FIRST = 1  # words before the image
# Scans on a canvas.  A reader that has only ever seen much background takes its share of the attention for the answer,
# and says yes to everything once the background is pruned: in training that share varies.
OCCUPIED = {"train": (1, 8), "test": (2, 4)}
_INK = 0.4  # brightness that scans have and noise (0.05) has not
_WORDS = (
    "<pad>",
    "<eos>",
    "<image>",
    "<start>",
    "is",
    "there",
    "a",
    "which",
    "things",
    "are",
    "how",
    "many",
    "of",
    "nothing",
)


@dataclasses.dataclass
class Questions:
    """A batch, all of one kind.

    Attributes:
        images: (batch, 3, 42, 42) float32 in [0, 1].
        input_ids: (batch, 1 + 36 + 4): a first word, an image token for each patch, the question.
        answer_ids: (batch,) the word that answers; -1 where the answer is a set ("which").
        present: (batch, classes) bool, which classes are on the canvas.
        patch_classes: (batch, 36) class of the scan whose ink is in a patch, the number of classes where none is.
    """

    images: Tensor
    input_ids: Tensor
    answer_ids: Tensor
    present: Tensor
    patch_classes: Tensor


class PruningTask:
    """Makes batches of questions; batch number i of a kind and split is always the same.

    Args:
        source, label_words, seed: as for `CanvasTask`.

    Attributes:
        names: words of the classes.
        vocab: every word; its index is the token id.
    """

    def __init__(self, source: Any = "digits", *, label_words: str = "digits", seed: int = 0):
        common: dict[str, Any] = {"cell": CELL, "tokens_per_cell": 2, "label_words": label_words, "seed": seed}
        # canvases for counting draw from three classes, so that counts above one are common
        made = {
            (split, kind): CanvasTask(source, kinds=(kind,), occupied=occupied, **common)
            for split, occupied in OCCUPIED.items()
            for kind in ("pos", "count")
        }
        self.canvases = {
            (split, kind): made[split, "count" if kind == "count" else "pos"]
            for split, kind in itertools.product(OCCUPIED, KINDS)
        }
        self.names = made["train", "pos"].names
        numbers = tuple(str(n) for n in range(OCCUPIED["train"][1] + 1))
        self.vocab = (*_WORDS, "yes", "no", *numbers, *self.names)
        self.word_id = {word: i for i, word in enumerate(self.vocab)}
        self.name_ids = torch.tensor([self.word_id[name] for name in self.names])
        # what a patch is called: its class, or nothing
        self.patch_ids = torch.cat([self.name_ids, torch.tensor([self.word_id["nothing"]])])
        self.number_ids = torch.tensor([self.word_id[number] for number in numbers])
        self.image_id, self.seed = self.word_id["<image>"], seed

    def encode(self, text: str) -> list[int]:
        """Ids of the words of a text."""
        return [self.word_id[word] for word in text.split()]

    def batch(self, kind: str, index: int, size: int, *, split: str = "train") -> Questions:
        """Batch `index` of `size` questions of a kind."""
        canvas = self.canvases[split, kind]
        drawn = canvas.batch(index, size, split=split)
        classes = torch.full((len(canvas.vocab),), -1)
        classes[torch.tensor([canvas.word_id[name] for name in self.names])] = torch.arange(len(self.names))
        cells = classes[drawn["cell_labels"]]
        counts = F.one_hot(cells.clamp(min=0), len(self.names)).masked_fill((cells < 0)[..., None], 0).sum(1)
        rng = np.random.default_rng([self.seed, KINDS.index(kind), split == "test", index])
        asked = self._asked(kind, counts, rng)
        texts = {
            "present": [self.encode(f"is there a {name}") for name in self.names],
            "which": [self.encode("which things are there")] * len(self.names),
            "count": [self.encode(f"how many of {name}") for name in self.names],
        }
        words = torch.tensor(texts[kind])[asked]
        number = counts.gather(1, asked[:, None])[:, 0]
        answers = {
            "present": torch.where(number > 0, self.word_id["yes"], self.word_id["no"]),
            "which": torch.full_like(number, -1),
            "count": self.number_ids[number],
        }[kind]
        image = torch.full((size, FIRST + GRID * GRID), self.image_id)
        image[:, :FIRST] = self.word_id["<start>"]
        patches = classes[drawn["image_labels"]]
        ink = F.max_pool2d(drawn["images"][:, :1], PATCH).flatten(1) > _INK
        return Questions(
            images=drawn["images"],
            input_ids=torch.cat([image, words], 1),
            answer_ids=answers,
            present=counts > 0,
            patch_classes=torch.where(ink & (patches >= 0), patches, len(self.names)),
        )

    def _asked(self, kind: str, counts: Tensor, rng: np.random.Generator) -> Tensor:
        """The class each question is about: half of them are there, three quarters where they are counted."""
        there = torch.from_numpy(rng.random(len(counts)) < (0.75 if kind == "count" else 0.5))
        wanted = (counts > 0) == there[:, None]
        return (wanted + torch.from_numpy(rng.random(counts.shape))).argmax(1)
