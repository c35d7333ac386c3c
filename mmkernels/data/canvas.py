"""Canvas-VQA: real scans on a grid and templated questions about them, made as fast as they are trained on.

A canvas has grid x grid cells, a third to two thirds of them hold a scan; the rest is noise.  Batch number i is a pure
function of (seed, split, i), so a run resumes at a batch number and ranks take turns without talking.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmkernels.data.sprites import load_bank, resolve_words
from mmkernels.errors import ConfigError, DataError, nearest

KINDS = ("pos", "count", "rel")
ORDERS = ("question_first", "image_first")
SPECIAL = ("<pad>", "<eos>", "<image>", "<unk>")
IGNORE = -100
_SPLITS = ("train", "test")
_GLUE = ("?", "what", "is", "in", "the", "of", "how", "many", "empty")
_DIRECTIONS = {"left": (0, -1), "right": (0, 1), "above": (-1, 0), "below": (1, 0)}
_WAYS = ("left of", "right of", "above", "below")  # in the order of _DIRECTIONS
_COUNTS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_PLACES_3X3 = ["topleft", "top", "topright", "midleft", "center", "midright", "bottomleft", "bottom", "bottomright"]
# share of `pos` questions about an empty cell: enough to learn the word, too few to win by guessing it
_EMPTY_SHARE = 0.2
_FEW = 3  # a `count` canvas draws from this many classes, so that counts above one are common


class CanvasTask:
    """Images of scans on a grid with questions and one-word answers: `pos`, `count` and `rel`.

    pos: "what is in the topleft ?" -> "three" | "empty";  count: "how many three ?" -> "none", "one", ..;
    rel: "what is left of the three ?" -> "seven" (the three is the only one, and its neighbour exists).

    Args:
        source: "digits" (scikit-learn's bundled scans) or a folder with MNIST-format idx files, raw or gzipped.
        grid: cells along a side.
        cell: pixels along a side of a cell; images are (grid*cell) x (grid*cell).
        kinds: question kinds, drawn with equal probability.
        order: "question_first": question, image, "?"; "image_first": image, question.  A causal model that sees the
            image before the question has to remember every cell, which takes many times longer to learn.
        tokens_per_cell: image tokens along a side of a cell; the sequence holds (grid*tokens_per_cell)^2 image tokens.
        channels: 1, or 3 with equal channels.
        noise: standard deviation of the Gaussian noise added to every pixel before clipping to [0, 1].
        occupied: smallest and largest number of scans on a canvas; None = a third to two thirds of the cells.
        label_words: "digits", "fashion" (eight separable classes), or one word per label, None leaves a label out.
        seed: seeds every batch.

    Attributes:
        vocab: every word; its index is the token id.  vocab[:4] = <pad>, <eos>, <image>, <unk>.
        image_size, seqlen, num_image_tokens, pad_id, eos_id, image_id: what a model configuration needs.

    Raises:
        ConfigError: an argument is out of range.
        DataError: the source is missing or damaged (see `mmkernels.data.idx`), or a class has no scans.

    Cost: about 1 ms for 64 canvases of 48 x 48 on one core.

    Example:
        >>> task = CanvasTask(kinds=("count",))
        >>> batch = task.batch(0, 4)
        >>> batch["images"].shape, batch["input_ids"].shape
        (torch.Size([4, 3, 48, 48]), torch.Size([4, 13]))
    """

    def __init__(
        self,
        source: str | Path = "digits",
        *,
        grid: int = 3,
        cell: int = 16,
        kinds: Sequence[str] = ("pos", "count"),
        order: str = "question_first",
        tokens_per_cell: int = 1,
        channels: int = 3,
        noise: float = 0.05,
        occupied: tuple[int, int] | None = None,
        label_words: str | Sequence[str | None] = "digits",
        seed: int = 0,
    ):
        cells = grid * grid
        self.occupied = occupied if occupied is not None else (max(1, cells // 3), max(1, cells * 2 // 3))
        self.grid, self.cell, self.kinds, self.order = grid, cell, tuple(kinds), order
        self.tokens_per_cell, self.channels, self.noise, self.seed = tokens_per_cell, channels, noise, seed
        self._check()
        words = resolve_words(label_words)
        self.names = tuple(word for word in words if word is not None)
        self.banks = {split: load_bank(source, split, cell, words) for split in _SPLITS}
        self.vocab = self._vocabulary()
        self.word_id = {word: i for i, word in enumerate(self.vocab)}
        self.pad_id, self.eos_id, self.image_id = (self.word_id[w] for w in ("<pad>", "<eos>", "<image>"))
        self.image_size = grid * cell
        self.num_image_tokens = (grid * tokens_per_cell) ** 2
        self._name_ids = np.array([self.word_id[n] for n in self.names])
        self._count_ids = np.array([self.word_id[w] for w in _COUNTS[: self.occupied[1] + 1]])
        self._questions = self._question_tables()
        self.question_len = next(iter(self._questions.values())).shape[1]
        self.seqlen = self.question_len + self.num_image_tokens

    def _check(self) -> None:
        cells = self.grid * self.grid
        low, high = self.occupied
        rules = [
            ("grid", self.grid, self.grid >= 1, "be at least 1"),
            ("grid", self.grid, "rel" not in self.kinds or self.grid >= 2, "be at least 2 for rel questions"),
            ("cell", self.cell, self.cell >= 4, "be at least 4 pixels"),
            ("tokens_per_cell", self.tokens_per_cell, self.tokens_per_cell >= 1, "be at least 1"),
            ("channels", self.channels, self.channels in (1, 3), "be 1 or 3"),
            ("noise", self.noise, 0 <= self.noise <= 1, "lie in [0, 1]"),
            ("occupied", self.occupied, 1 <= low <= high <= cells, f"be (low, high) with 1 <= low <= high <= {cells}"),
            ("occupied", self.occupied, "rel" not in self.kinds or high >= 2, "allow two scans for rel questions"),
            (
                "occupied",
                self.occupied,
                high < len(_COUNTS),
                f"stay at or below {len(_COUNTS) - 1}, the last count word",
            ),
            ("kinds", self.kinds, 0 < len(self.kinds) == len(set(self.kinds)), "name each kind once, and one at least"),
        ]
        for name, value, good, wanted in rules:
            if not good:
                raise ConfigError(f"CanvasTask: {name} must {wanted}; got {value}. Change {name}.")
        for kind in self.kinds:
            if kind not in KINDS:
                raise ConfigError(f"CanvasTask: kinds must be known; got {kind!r}. {nearest(kind, KINDS)}")
        if self.order not in ORDERS:
            raise ConfigError(f"CanvasTask: order must be known; got {self.order!r}. {nearest(self.order, ORDERS)}")

    def places(self) -> list[str]:
        """What the cells are called in questions, row by row."""
        if self.grid == 3:
            return [f"the {place}" for place in _PLACES_3X3]
        return [f"row{r + 1} column{c + 1}" for r in range(self.grid) for c in range(self.grid)]

    def _vocabulary(self) -> tuple[str, ...]:
        # independent of `kinds` and `order`, so that one checkpoint serves every mix of questions
        places = [word for place in self.places() for word in place.split()]
        taken = {*SPECIAL, *_GLUE, *_DIRECTIONS, *places, "none"}.intersection(self.names)
        if taken:
            raise DataError(
                f"CanvasTask: label_words must differ from the words of the questions; got {sorted(taken)}. "
                "Rename them."
            )
        words = (*SPECIAL, *_GLUE, *_DIRECTIONS, *places, *_COUNTS, *self.names)
        return tuple(dict.fromkeys(words))

    def _question_tables(self) -> dict[str, NDArray[np.int64]]:
        """Per kind, every question there is as one left-padded row of ids; a sample is a row number."""
        texts = {
            "pos": [f"what is in {place} ?" for place in self.places()],
            "count": [f"how many {name} ?" for name in self.names],
            "rel": [f"what is {way} the {name} ?" for way in _WAYS for name in self.names],
        }
        ids = {kind: [self.encode(text) for text in texts[kind]] for kind in self.kinds}
        width = max(len(row) for rows in ids.values() for row in rows)
        return {kind: np.array([[self.pad_id] * (width - len(r)) + r for r in rows]) for kind, rows in ids.items()}

    def encode(self, text: str) -> list[int]:
        """The ids of whitespace-separated words.

        Raises:
            DataError: a word is not in the vocabulary.
        """
        for word in text.split():
            if word not in self.word_id:
                raise DataError(
                    f"CanvasTask.encode: text must use known words; got {word!r}. {nearest(word, self.vocab)}"
                )
        return [self.word_id[word] for word in text.split()]

    def decode(self, ids: Any) -> str:
        """The words of a row of ids, padding left out."""
        return " ".join(self.vocab[int(i)] for i in ids if int(i) != self.pad_id)

    def _grids(self, count: int, few: bool, rng: np.random.Generator) -> NDArray[np.int64]:
        """(count, cells) class numbers, -1 = empty."""
        cells, classes = self.grid * self.grid, len(self.names)
        amount = rng.integers(self.occupied[0], self.occupied[1] + 1, size=(count, 1))
        filled = rng.random((count, cells)).argsort(1) < amount
        if few:
            palette = rng.random((count, classes)).argsort(1)[:, :_FEW]
            chosen = np.take_along_axis(palette, rng.integers(palette.shape[1], size=(count, cells)), 1)
        else:
            chosen = rng.integers(classes, size=(count, cells))
        return np.where(filled, chosen, -1)

    def _pos(self, count: int, rng: np.random.Generator) -> tuple[NDArray, NDArray, NDArray]:
        grids = self._grids(count, False, rng)
        wanted = (grids < 0) == (rng.random((count, 1)) < _EMPTY_SHARE)
        cell = (wanted + rng.random(grids.shape)).argmax(1)  # a wanted cell wherever there is one, else any
        found = grids[np.arange(count), cell]
        return grids, cell, np.where(found < 0, self.word_id["empty"], self._name_ids[found])

    def _count(self, count: int, rng: np.random.Generator) -> tuple[NDArray, NDArray, NDArray]:
        grids = self._grids(count, True, rng)
        # asks about a class on the canvas three times of four, about any class otherwise ("none" must be learned too)
        present = (grids >= 0) + rng.random(grids.shape)
        asked = grids[np.arange(count), present.argmax(1)]
        asked = np.where(rng.random(count) < 0.25, rng.integers(len(self.names), size=count), asked)
        return grids, asked, self._count_ids[(grids == asked[:, None]).sum(1)]

    def _rel(self, count: int, rng: np.random.Generator) -> tuple[NDArray, NDArray, NDArray]:
        grids, question, answer = self._grids(count, False, rng), np.zeros(count, np.int64), np.zeros(count, np.int64)
        open_rows = np.arange(count)
        while len(open_rows):  # a canvas without a single askable pair is drawn again
            g = grids[open_rows]
            side = g.reshape(-1, self.grid, self.grid)
            padded = np.pad(side, ((0, 0), (1, 1), (1, 1)), constant_values=-1)
            n = self.grid
            beside = [padded[:, 1 + r : 1 + r + n, 1 + c : 1 + c + n].reshape(g.shape) for r, c in _DIRECTIONS.values()]
            neighbour = np.stack(beside, 1)  # (rows, 4, cells)
            single = ((g[:, :, None] == g[:, None, :]).sum(2) == 1) & (g >= 0)
            usable = single[:, None] & (neighbour >= 0)
            pick = (usable + rng.random(usable.shape)).reshape(len(g), -1).argmax(1)
            good = usable.reshape(len(g), -1).any(1)
            way, cell = pick // g.shape[1], pick % g.shape[1]
            rows = np.arange(len(g))
            question[open_rows] = way * len(self.names) + g[rows, cell]
            answer[open_rows] = self._name_ids[neighbour[rows, way, cell]]
            open_rows = open_rows[~good]
            grids[open_rows] = self._grids(len(open_rows), False, rng)
        return grids, question, answer

    def _draw_images(self, grids: NDArray[np.int64], split: str, rng: np.random.Generator) -> Tensor:
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))  # twice as fast as numpy's normals
        shape = (*grids.shape, self.cell * self.cell)
        pixels = torch.randn(shape, generator=generator, dtype=torch.float32).numpy()
        pixels *= np.float32(self.noise)
        filled = grids >= 0
        pixels[filled] += self.banks[split].draw(grids[filled], rng)
        np.clip(pixels, 0, 1, out=pixels)
        n, c = self.grid, self.cell
        canvas = pixels.reshape(-1, n, n, c, c).transpose(0, 1, 3, 2, 4).reshape(-1, 1, n * c, n * c)
        return torch.from_numpy(canvas.repeat(self.channels, 1))

    def batch(self, index: int, batch_size: int, *, split: str = "train") -> dict[str, Tensor]:
        """Batch number `index` of a split: always the same canvases for the same (seed, split, index, batch_size).

        Args:
            index: batch number, 0 or more.
            batch_size: canvases in the batch.
            split: "train" or "test"; the two never show the same scan.

        Returns:
            images (batch, channels, H, W) float32 in [0, 1], not normalised: that belongs to the processor or model;
            input_ids (batch, seqlen) and attention_mask: padding left, image_id where an image token goes, "?" last;
            question_ids (batch, question_len); answer_ids (batch,): the word to predict at the last position;
            image_labels (batch, num_image_tokens): the word of the cell under each image token, row-major;
            cell_labels (batch, grid*grid); kind (batch,): index into `kinds`.

        Raises:
            ConfigError: an unknown split, a negative index or an empty batch.
        """
        if split not in _SPLITS or index < 0 or batch_size < 1:
            raise ConfigError(
                f"CanvasTask.batch: split must be one of {_SPLITS}, index >= 0 and batch_size >= 1; got {split!r}, "
                f"{index}, {batch_size}. Correct the call."
            )
        rng = np.random.default_rng([self.seed, _SPLITS.index(split), index])
        kind = np.sort(rng.integers(len(self.kinds), size=batch_size))
        sizes = np.bincount(kind, minlength=len(self.kinds))
        makers = {"pos": self._pos, "count": self._count, "rel": self._rel}
        parts = [(k, *makers[k](int(n), rng)) for k, n in zip(self.kinds, sizes, strict=True) if n]
        shuffle = rng.permutation(batch_size)
        grids = np.concatenate([grid for _, grid, _, _ in parts])[shuffle]
        questions = np.concatenate([self._questions[k][row] for k, _, row, _ in parts])[shuffle]
        answers = np.concatenate([answer for _, _, _, answer in parts])[shuffle]
        labels = np.where(grids < 0, self.word_id["empty"], self._name_ids[grids])
        s, n = self.tokens_per_cell, self.grid
        fine = labels.reshape(-1, n, n).repeat(s, 1).repeat(s, 2).reshape(batch_size, -1)
        ids = self._sequence(questions)
        return {
            "images": self._draw_images(grids, split, rng),
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy((ids != self.pad_id).astype(np.int64)),
            "question_ids": torch.from_numpy(questions),
            "answer_ids": torch.from_numpy(answers),
            "image_labels": torch.from_numpy(fine),
            "cell_labels": torch.from_numpy(labels),
            "kind": torch.from_numpy(kind[shuffle]),
        }

    def _sequence(self, questions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Weaves the image tokens into the questions; padding stays left, "?" stays last."""
        image = np.full((len(questions), self.num_image_tokens), self.image_id)
        if self.order == "question_first":
            return np.concatenate([questions[:, :-1], image, questions[:, -1:]], 1)
        # padding must not stand between image and question: roll each row so that it comes first
        pads = (questions == self.pad_id).sum(1, keepdims=True)
        columns = np.arange(self.seqlen)[None]
        after_image = columns - self.num_image_tokens
        word = np.take_along_axis(questions, np.clip(after_image, 0, None).repeat(len(questions), 0), 1)
        return np.where(columns < pads, self.pad_id, np.where(after_image < pads, self.image_id, word))

    def batches(
        self, batch_size: int, *, split: str = "train", start: int = 0, stop: int | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """Batches start, start+1, .. (without end when stop is None)."""
        index = start
        while stop is None or index < stop:
            yield self.batch(index, batch_size, split=split)
            index += 1

    def source(self, split: str = "train", *, start: int = 0) -> Callable[[int, int], dict[str, Tensor]]:
        """A function from (batch number, batch size) to a batch that models and `mmkernels.distill` take as it is.

        To `batch` it adds pixel_values (the images as they are, in [0, 1]) and answer_mask: True at the last position,
        where the answer is read.

        Args:
            split: "train" or "test".
            start: added to every batch number, for data that another run has not seen.
        """

        def fetch(index: int, size: int) -> dict[str, Tensor]:
            batch = self.batch(start + index, size, split=split)
            answer = torch.zeros(batch["input_ids"].shape, dtype=torch.bool)
            answer[:, -1] = True
            return {**batch, "pixel_values": batch["images"], "answer_mask": answer}

        return fetch

    def save_examples(self, path: str | Path, *, count: int = 8, split: str = "test", zoom: int = 3) -> Path:
        """Writes a PNG sheet of canvases with their questions and answers below, and returns its path."""
        from PIL import Image, ImageDraw

        batch = self.batch(0, count, split=split)
        columns = min(count, 4)
        width, height = max(self.image_size * zoom, 190), self.image_size * zoom + 30
        sheet = Image.new("RGB", (columns * (width + 8), -(-count // columns) * (height + 8)), "white")
        draw = ImageDraw.Draw(sheet)
        for i in range(count):
            left, top = (i % columns) * (width + 8) + 4, (i // columns) * (height + 8) + 4
            pixels = (batch["images"][i, 0].numpy() * 255).astype(np.uint8)
            picture = Image.fromarray(pixels).resize((self.image_size * zoom,) * 2, Image.Resampling.NEAREST)
            sheet.paste(picture, (left, top))
            question, answer = self.decode(batch["question_ids"][i]), self.vocab[int(batch["answer_ids"][i])]
            draw.text((left, top + self.image_size * zoom + 4), f"{question}\n-> {answer}", fill="black")
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path)
        return path
