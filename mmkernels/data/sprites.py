"""Banks of small real images, one class per word, for the canvases.

Source: scikit-learn's bundled handwritten digits (UCI optdigits), or any MNIST-format folder such as Fashion-MNIST.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mmkernels.data.idx import read_idx_folder
from mmkernels.errors import DataError, nearest

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# None leaves a class out: at 16 pixels a coat or shirt is not told apart from a pullover or T-shirt, by people either
FASHION_WORDS = ("tshirt", "trouser", "pullover", "dress", None, "sandal", None, "sneaker", "bag", "boot")
LABEL_WORDS: dict[str, tuple[str | None, ...]] = {"digits": DIGIT_WORDS, "fashion": FASHION_WORDS}
_TEST_EVERY = 5


@dataclass(frozen=True)
class SpriteBank:
    """Scans of one split, sorted by class.

    pixels (count, cell*cell) float32 in [0, 1]; class c owns rows first[c] .. first[c] + count[c] - 1.
    """

    pixels: NDArray[np.float32]
    first: NDArray[np.int64]
    count: NDArray[np.int64]

    def draw(self, classes: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.float32]:
        """One scan per entry of `classes`, uniformly among the scans of that class: (len(classes), cell*cell)."""
        rows = self.first[classes] + (rng.random(len(classes)) * self.count[classes]).astype(np.int64)
        return self.pixels[rows]


def _digits(split: str) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """scikit-learn's 1,797 scans; every fifth one is a test scan, so the two splits never share one."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            'CanvasTask: source="digits" must find scikit-learn; got no such module. '
            "Install it with `pip install scikit-learn`, or give a folder of MNIST-format files."
        ) from error
    data = load_digits()
    test = np.arange(len(data.target)) % _TEST_EVERY == 0
    keep = test if split == "test" else ~test
    return (data.images[keep] / 16).astype(np.float32), data.target[keep].astype(np.int64)


def resolve_words(label_words: str | Sequence[str | None]) -> tuple[str | None, ...]:
    """The word of every label, None for a label that is left out.

    Raises:
        DataError: an unknown set of words, a repeated word, a word with a space, or fewer than two words.
    """
    if isinstance(label_words, str):
        if label_words not in LABEL_WORDS:
            raise DataError(
                f"CanvasTask: label_words must be a known set or a list of words; got {label_words!r}. "
                f"{nearest(label_words, LABEL_WORDS)}"
            )
        return LABEL_WORDS[label_words]
    words = tuple(label_words)
    named = [word for word in words if word is not None]
    if len(named) < 2 or len(set(named)) != len(named) or any(not w or len(w.split()) != 1 for w in named):
        raise DataError(
            f"CanvasTask: label_words must be two or more different words without spaces; got {words}. "
            "Join the parts of a name, e.g. 'tshirt'."
        )
    return words


def load_bank(source: str | Path, split: str, cell: int, words: tuple[str | None, ...]) -> SpriteBank:
    """The scans of one split, resized to cell x cell (antialiased bilinear) and sorted by class.

    Raises:
        DataError: the source is not readable, a label has no word, or a word has no scan.
    """
    images, labels = _digits(split) if source == "digits" else read_idx_folder(Path(source), split)
    if len(labels) and int(labels.max()) >= len(words):
        raise DataError(
            f"CanvasTask: label_words must name every label of {source}; got label {int(labels.max())} and "
            f"{len(words)} words. Give one word per label, None to leave a label out."
        )
    kept = [label for label, word in enumerate(words) if word is not None]
    rows = [np.flatnonzero(labels == label) for label in kept]
    for label, found in zip(kept, rows, strict=True):
        if len(found) == 0:
            raise DataError(
                f"CanvasTask: source must hold scans of every word; got none of {words[label]!r} (label {label}) "
                f"in the {split} split of {source}. Leave the word out of label_words with None."
            )
    pixels = torch.from_numpy(images[np.concatenate(rows)])[:, None]
    pixels = torch.nn.functional.interpolate(pixels, size=(cell, cell), mode="bilinear", antialias=True)
    count = np.array([len(found) for found in rows], dtype=np.int64)
    return SpriteBank(pixels.flatten(1).clamp(0, 1).numpy(), np.cumsum(count) - count, count)
