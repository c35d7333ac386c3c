"""The demo of pruning: questions are answered by the canvas, every pruner runs, findings can fail."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from mmkernels import ConfigError
from mmkernels.cli import main
from mmkernels.demo.pruning import ARMS, PruningSettings
from mmkernels.demo.pruning.measure import PATCHES, accuracy, kept_patches, unseen
from mmkernels.demo.pruning.model import encode_and_read, fresh_model
from mmkernels.demo.pruning.report import findings, table
from mmkernels.demo.pruning.task import FIRST, KINDS, PruningTask
from mmkernels.demo.pruning.train import train


@pytest.fixture(scope="module")
def task():
    return PruningTask()


@pytest.fixture(scope="module")
def model(task):
    return fresh_model(task, 0).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_what_the_patches_show(task, kind):
    batch = task.batch(kind, 3, 60, split="test")
    again = task.batch(kind, 3, 60, split="test")
    assert all(torch.equal(value, vars(again)[name]) for name, value in vars(batch).items())
    shown = torch.stack([(batch.patch_classes == c).any(1) for c in range(len(task.names))], 1)
    assert (shown == batch.present).float().mean() > 0.99  # a thin stroke may miss the ink threshold
    scans = batch.present.sum(1)
    assert scans.min() >= 1
    assert scans.max() <= 4
    answers = [task.vocab[int(i)] if i >= 0 else "a set" for i in batch.answer_ids]
    asked = [task.vocab[int(i)] for i in batch.input_ids[:, -1]]
    for row, (word, answer) in enumerate(zip(asked, answers, strict=True)):
        if kind == "present":
            assert answer == ("yes" if batch.present[row, task.names.index(word)] else "no")
        elif kind == "count":
            assert (int(answer) > 0) == bool(batch.present[row, task.names.index(word)])
    if kind == "present":
        assert 0.3 < answers.count("yes") / len(answers) < 0.7


def test_training_reads_what_the_model_reads(task, model):
    """The pass that training looks into is the model's own."""
    batch = task.batch("present", 0, 4)
    with torch.no_grad():
        _, logits = encode_and_read(model, batch.images, batch.input_ids)
        own = model(input_ids=batch.input_ids, pixel_values=batch.images).logits
    torch.testing.assert_close(logits, own, rtol=1e-5, atol=1e-5)


def test_every_pruner_keeps_its_number(task, model):
    batch = task.batch("present", 0, 3, split="test")
    for arm in ARMS:
        kept = kept_patches(model, batch, arm.pruner(9))
        assert [len(row) for row in kept] == [9, 9, 9], arm.key
        assert all(row == sorted(set(row)) and row[0] >= 0 and row[-1] < PATCHES for row in kept), arm.key
    best, worst = (kept_patches(model, batch, arm.pruner(18)) for arm in (ARMS[0], ARMS[-1]))
    assert all(set(a) | set(b) == set(range(PATCHES)) for a, b in zip(best, worst, strict=True))


def test_a_model_that_knows_scores_one(task):
    class Oracle:
        def __init__(self, batches):
            self.batches = iter(batches)

        def __call__(self, **_):
            batch = next(self.batches)
            logits = torch.zeros(len(batch.images), 1, len(task.vocab))
            if batch.answer_ids[0] < 0:
                logits[:, 0, task.name_ids] = batch.present.float() - 0.5
            else:
                logits[torch.arange(len(batch.images)), 0, batch.answer_ids] = 1
            return type("Output", (), {"logits": logits})

    for kind in KINDS:
        questions = unseen(task, kind, 500)
        assert accuracy(Oracle(questions), task, questions) == 1.0
        assert accuracy(Oracle(reversed(questions)), task, questions) < 0.9


def test_the_loss_falls(task):
    settings = PruningSettings(steps=12, batch_size=12)
    ended = []
    _, losses = train(task, settings, lambda: ended.append(1))
    assert len(losses) == len(ended) == 12
    assert losses == train(task, replace(settings), None)[1]
    assert sum(losses[-3:]) < sum(losses[:3])


def test_the_commands_write_tables_and_pictures(tmp_path, capsys):
    out = tmp_path / "pruning"
    assert main(["demo", "--task", "pruning", "--quick", "--steps", "60", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert list(results["pruned"]) == [arm.key for arm in ARMS]
    for picture in ("curves.png", "lit.png"):
        with Image.open(out / picture) as image:
            assert image.width > 600
    for kind in KINDS:
        assert table(results, kind) in (out / "table.md").read_text()
        assert table(results, kind) in said
    lit = tmp_path / "one.png"
    command = ["prune", "--model", str(out / "model"), "--image", str(out / "canvas_0.png"), "--show", str(lit)]
    assert main([*command, "--num-keep", "9", "--option", "num_layers=1"]) == 0
    assert "keeps 9 of 36" in capsys.readouterr().out
    with Image.open(lit) as image:
        assert image.size == (336, 336)
    for wrong, word in (
        (["--method", "fastv", "--num-keep", "9"], "vision side"),
        (["--num-keep", "37"], "num_keep"),
        (["--option", "num_layers=4"], "num_layers"),
        (["--option", "num_layer=1"], "num_layers"),
        (["--option", "1"], "NAME=VALUE"),
        (["--method", "vtc_csl"], "vtc_cls"),
        (["--image", str(out / "table.md")], "image file"),
    ):
        assert main([*command, *wrong]) == 2, wrong
        assert word in capsys.readouterr().err


def test_findings_can_fail():
    def results(ours, drawn, least, count):
        scores = {"vtc_cls": ours, "random": drawn, "least_cls": least}
        pruned = {key: {"present": {9: value}, "count": {9: count}} for key, value in scores.items()}
        mass = {"uniform": 0.3, "layers": [0.3, ours]}
        return {"pruned": pruned, "unpruned": {"present": 0.95, "count": 0.9}, "cls_mass": mass}

    assert all(met for _, met in findings(results(0.94, 0.8, 0.5, 0.4)))
    assert not any(met for _, met in findings(results(0.4, 0.8, 0.85, 0.89)))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["demo", "--task", "pruning", "--steps", "0"], "steps"),
        (["demo", "--task", "pruning", "--arms", "vtc_cls"], "--arms"),
        (["demo", "--task", "pruning", "--data", "no/such/folder"], "no/such/folder"),
        (["prune", "--image", "x.png", "--show", "y.png"], "demo --task pruning"),
        (["prune", "--image", "x.png", "--show", "y.png", "--method", "randm"], "random"),
    ],
)
def test_a_mistake_is_told_before_anything_is_trained(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.json"))


def test_settings_are_checked():
    for field in ({"steps": 0}, {"learning_rate": 0.0}, {"kept": (36,)}, {"kept": ()}, {"kept": (9, 9)}):
        with pytest.raises(ConfigError, match=next(iter(field))):
            PruningSettings(**field)
    assert FIRST + PATCHES == 37
