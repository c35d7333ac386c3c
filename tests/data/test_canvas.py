import time

import numpy as np
import pytest
import torch

from mmkernels.data import CanvasTask, answer_accuracy, canvas_loss
from mmkernels.data.canvas import KINDS
from mmkernels.errors import ConfigError, DataError, ShapeError

NUMBERS = ["none", "one", "two", "three", "four", "five", "six"]
PLACES = ["topleft", "top", "topright", "midleft", "center", "midright", "bottomleft", "bottom", "bottomright"]
STEPS = {"left": (0, -1), "right": (0, 1), "above": (-1, 0), "below": (1, 0)}


@pytest.fixture(scope="module")
def task() -> CanvasTask:
    return CanvasTask(kinds=KINDS)


def oracle(question: str, cells: list[str]) -> str:
    """Answers a question by reading the grid of words, written apart from the sampler."""
    words = question.split()
    if words[0] == "how":
        return NUMBERS[cells.count(words[2])]
    if words[2] == "in":
        return cells[PLACES.index(words[4])]
    step, asked = STEPS[words[2]], words[-2]
    assert cells.count(asked) == 1
    row, column = divmod(cells.index(asked), 3)
    row, column = row + step[0], column + step[1]
    assert 0 <= row < 3
    assert 0 <= column < 3
    return cells[3 * row + column]


def test_answers_are_right(task):
    for split in ("train", "test"):
        batch = task.batch(7, 300, split=split)
        for i in range(300):
            question = task.decode(batch["question_ids"][i])
            cells = [task.vocab[j] for j in batch["cell_labels"][i]]
            assert oracle(question, cells) == task.vocab[batch["answer_ids"][i]], question


def test_every_kind_and_answer_occurs(task):
    batch = task.batch(0, 3000)
    assert batch["kind"].bincount(minlength=3).min() > 800
    answers = {task.vocab[i] for i in batch["answer_ids"].unique()}
    assert answers >= {"empty", "none", "zero", "nine", "two"}
    majority = batch["answer_ids"].bincount().max() / 3000
    assert majority < 0.25  # a guesser must stay far from a reader


def test_pixels_are_scans_of_the_labelled_class(task):
    # noise off: the pixels of every cell are, bit for bit, a scan of the bank of that split and class
    clean = CanvasTask(noise=0.0, channels=1)
    for split in ("train", "test"):
        bank = clean.banks[split]
        batch = clean.batch(3, 32, split=split)
        cells = batch["images"].view(32, 3, 16, 3, 16).permute(0, 1, 3, 2, 4).reshape(-1, 256).numpy()
        for pixels, label in zip(cells, batch["cell_labels"].flatten(), strict=True):
            word = clean.vocab[label]
            if word == "empty":
                assert not pixels.any()
                continue
            c = clean.names.index(word)
            own = bank.pixels[bank.first[c] : bank.first[c] + bank.count[c]]
            assert (own == pixels).all(1).any()


def test_splits_share_no_scan(task):
    train, test = (set(map(bytes, task.banks[s].pixels)) for s in ("train", "test"))
    assert not train & test
    assert len(task.banks["train"].pixels) + len(task.banks["test"].pixels) == 1797


def test_batch_is_a_function_of_its_number(task):
    again = CanvasTask(kinds=KINDS)
    for one, two in zip(task.batch(5, 16).values(), again.batch(5, 16).values(), strict=True):
        assert torch.equal(one, two)
    streamed = next(iter(task.batches(16, start=5)))
    assert torch.equal(streamed["images"], task.batch(5, 16)["images"])
    assert not torch.equal(task.batch(5, 16)["images"], task.batch(6, 16)["images"])
    assert not torch.equal(
        task.batch(5, 16)["cell_labels"], CanvasTask(kinds=KINDS, seed=1).batch(5, 16)["cell_labels"]
    )
    assert len(list(task.batches(2, start=1, stop=4))) == 3


@pytest.mark.parametrize("order", ["question_first", "image_first"])
@pytest.mark.parametrize("tokens_per_cell", [1, 2])
def test_sequence(order, tokens_per_cell):
    task = CanvasTask(kinds=KINDS, order=order, tokens_per_cell=tokens_per_cell)
    batch = task.batch(0, 64)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert ids.shape == mask.shape == (64, task.seqlen)
    assert ((ids == task.image_id).sum(1) == task.num_image_tokens).all()
    assert (ids[:, -1] == task.word_id["?"]).all()
    assert torch.equal(mask.sort(1).values, mask)  # all padding is on the left
    assert torch.equal(mask == 0, ids == task.pad_id)
    for row, question in zip(ids, batch["question_ids"], strict=True):
        assert task.decode(row[row != task.image_id]) == task.decode(question)


def test_image_labels_follow_the_cells():
    task = CanvasTask(tokens_per_cell=2)
    batch = task.batch(0, 8)
    fine = batch["image_labels"].view(8, 6, 6)
    for r in range(6):
        for c in range(6):
            assert torch.equal(fine[:, r, c], batch["cell_labels"][:, 3 * (r // 2) + c // 2])


def test_images(task):
    images = task.batch(0, 16)["images"]
    assert images.shape == (16, 3, 48, 48)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1
    assert torch.equal(images[:, 0], images[:, 2])


def test_fast_enough(task):
    # 1.3 ms measured on one quiet core; the bound only has to catch a return to Python loops (about 30 ms)
    times = []
    for i in range(20):
        start = time.perf_counter()
        task.batch(i, 64)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.01


def test_other_grids_name_rows_and_columns():
    task = CanvasTask(grid=2, kinds=("pos",), cell=8)
    assert task.image_size == 16
    assert "what is in row" in task.decode(task.batch(0, 1)["question_ids"][0])


def test_fashion_folder(tmp_path, write_idx_folder):
    rng = np.random.default_rng(0)
    write_idx_folder(tmp_path, rng.integers(0, 256, (60, 28, 28)), np.arange(60) % 10, packed=True)
    task = CanvasTask(tmp_path, label_words="fashion", kinds=("count",))
    assert task.names == ("tshirt", "trouser", "pullover", "dress", "sandal", "sneaker", "bag", "boot")
    assert len(task.banks["train"].pixels) == 48  # the coats and shirts are left out
    assert task.batch(0, 4)["images"].shape == (4, 3, 48, 48)


def test_class_without_scans(tmp_path, write_idx_folder):
    write_idx_folder(tmp_path, np.zeros((9, 28, 28)), np.arange(9))
    with pytest.raises(DataError, match=r"none of 'nine' \(label 9\)"):
        CanvasTask(tmp_path)
    assert len(CanvasTask(tmp_path, label_words=[*"abcdefghi", None]).names) == 9


def test_labels_without_words(tmp_path, write_idx_folder):
    write_idx_folder(tmp_path, np.zeros((10, 28, 28)), np.arange(10))
    with pytest.raises(DataError, match="got label 9 and 3 words"):
        CanvasTask(tmp_path, label_words=["a", "b", "c"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"grid": 0}, ConfigError, "grid must"),
        ({"grid": 1, "kinds": ("rel",)}, ConfigError, "grid must be at least 2"),
        ({"kinds": ("counts",)}, ConfigError, "Did you mean 'count'"),
        ({"kinds": ()}, ConfigError, "kinds must"),
        ({"kinds": ("pos", "pos")}, ConfigError, "kinds must"),
        ({"order": "question-first"}, ConfigError, "Did you mean 'question_first'"),
        ({"occupied": (0, 3)}, ConfigError, "occupied must"),
        ({"occupied": (3, 10)}, ConfigError, "occupied must"),
        ({"occupied": (1, 1), "kinds": ("rel",)}, ConfigError, "two scans"),
        ({"grid": 5}, ConfigError, "last count word"),
        ({"channels": 2}, ConfigError, "channels must be 1 or 3"),
        ({"noise": -0.1}, ConfigError, "noise must"),
        ({"label_words": "fasion"}, DataError, "Did you mean 'fashion'"),
        ({"label_words": ["a", "a"]}, DataError, "two or more different"),
        ({"label_words": ["t shirt", "a"]}, DataError, "without spaces"),
        ({"label_words": [*"abcdefghi", "empty"]}, DataError, "differ from the words of the questions"),
        ({"source": "digit"}, DataError, "must be a directory"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        CanvasTask(**options)


def test_bad_calls(task):
    with pytest.raises(ConfigError, match="got 'valid'"):
        task.batch(0, 4, split="valid")
    with pytest.raises(ConfigError, match="index >= 0"):
        task.batch(-1, 4)
    with pytest.raises(DataError, match="Did you mean 'three'"):
        task.encode("how many threee ?")


def test_save_examples(task, tmp_path):
    from PIL import Image

    path = task.save_examples(tmp_path / "sheets" / "examples.png", count=6)
    with Image.open(path) as sheet:
        assert sheet.size[0] > 4 * 48 * 3


def test_loss_and_accuracy(task):
    batch = task.batch(0, 50)
    ids = batch["input_ids"]
    right = torch.zeros(*ids.shape, len(task.vocab))
    right[ids == task.image_id] = (
        30 * torch.nn.functional.one_hot(batch["image_labels"].flatten(), len(task.vocab)).float()
    )
    right[:, -1] = 30 * torch.nn.functional.one_hot(batch["answer_ids"], len(task.vocab)).float()
    assert canvas_loss(right, batch, image_id=task.image_id) < 1e-6
    uniform = torch.zeros_like(right)
    chance = float(np.log(len(task.vocab)))
    assert canvas_loss(uniform, batch, image_id=task.image_id, dense=0.5).item() == pytest.approx(
        1.5 * chance, rel=1e-5
    )
    scores = answer_accuracy(right, batch, task.kinds)
    assert scores["all"] == (50, 50)
    assert sum(asked for name, (_, asked) in scores.items() if name != "all") == 50
    right[0, -1] *= -1
    assert answer_accuracy(right, batch, task.kinds)["all"] == (49, 50)
    with pytest.raises(ShapeError, match="logits_to_keep=0"):
        canvas_loss(right[:, -1:], batch, image_id=task.image_id)
