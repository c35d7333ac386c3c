"""The tiny ML-Mamba: conversations, stages, what is frozen, the picture, the comparison, the command line."""

import dataclasses
import json

import pytest
import torch

from mmkernels.cli import main
from mmkernels.data import CanvasTask
from mmkernels.demo.ml_mamba import ARMS, MLMambaSettings, compare_connectors, run_ml_mamba_demo
from mmkernels.demo.ml_mamba.model import pixel_values, processor_of, tiny_ml_mamba
from mmkernels.demo.ml_mamba.report import comparison_report, connector_table, findings
from mmkernels.demo.ml_mamba.talk import CanvasTalk
from mmkernels.demo.ml_mamba.train import learn_words, majority, train_arm
from mmkernels.errors import ConfigError

TINY = MLMambaSettings(words_steps=2, steps=3, points=2, questions=40, batch_size=4, turns=2, workers=1)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def talk(**changes):
    settings = dataclasses.replace(TINY, **changes)
    return CanvasTalk(settings.task(0), settings.turns)


def test_conversations_are_what_the_processor_makes():
    talk_ = talk()
    batch, model = talk_.batch(3, 4), tiny_ml_mamba(talk_, ARMS[0], 0)
    processor = processor_of(talk_, model)
    for row in range(4):
        turns = []
        for cell, answer in zip(batch["cells"][row].tolist(), batch["answers"][row].tolist(), strict=True):
            turns += [{"role": "user", "content": talk_.question(cell)}]
            turns += [{"role": "assistant", "content": talk_.words[answer]}]
        made = processor.for_sft([turns])
        assert made["input_ids"][0].tolist() == batch["input_ids"][row].tolist()
        assert made["labels"][0].tolist() == batch["labels"][row].tolist()


def test_answers_are_true_and_patches_carry_their_cells_word():
    talk_ = talk()
    batch, canvas = talk_.batch(5, 8, split="test"), talk_.task.batch(5, 8, split="test")
    named = [[talk_.task.vocab[word] for word in row] for row in canvas["cell_labels"].tolist()]
    for row, (cells, answers) in enumerate(zip(batch["cells"].tolist(), batch["answers"].tolist(), strict=True)):
        assert len(set(cells)) == 2
        assert [talk_.words[a] for a in answers] == [named[row][c] for c in cells]
    patches = [[talk_.words[w] for w in row] for row in batch["patches"].tolist()]
    # 2 x 2 cells of 2 x 2 patches, row by row
    expected = [[r[0], r[0], r[1], r[1]] * 2 + [r[2], r[2], r[3], r[3]] * 2 for r in named]
    assert patches == expected
    again = CanvasTalk(CanvasTask(grid=2, kinds=("pos",), channels=1, tokens_per_cell=2), 2).batch(5, 8, split="test")
    assert all(torch.equal(batch[key], again[key]) for key in ("input_ids", "images"))
    assert not torch.equal(batch["images"], talk_.batch(5, 8)["images"])


def test_pixels_are_what_the_processor_makes():
    talk_ = talk()
    processor = processor_of(talk_, tiny_ml_mamba(talk_, ARMS[0], 0))
    image = (talk_.batch(0, 1)["images"] * 255).round() / 255
    made = processor("what is in row1 column1 ?", images=image[0, 0].numpy())["pixel_values"]
    torch.testing.assert_close(pixel_values(image, processor), made)


def test_the_language_model_is_frozen_until_it_is_finetuned():
    words = learn_words(talk(), TINY, 0)
    fresh = tiny_ml_mamba(talk(), ARMS[0], 0).language_model.state_dict()
    assert not torch.equal(words["backbone.embedding.weight"], fresh["backbone.embedding.weight"])
    for finetune, moved in ((0, False), (2, True)):
        settings = dataclasses.replace(TINY, finetune_steps=finetune)
        model, run = train_arm(ARMS[1], settings, 0, words)
        state = model.language_model.state_dict()
        assert any(not torch.equal(state[name], value) for name, value in words.items()) == moved
        assert len(run["loss"]) == 3 + finetune
        assert run["points"][-1]["step"] == 3 + finetune
        assert run["points"][-1]["questions"] == 40
        start = tiny_ml_mamba(talk(), ARMS[1], 0)
        assert not torch.equal(model.connector.entry.weight, start.connector.entry.weight)
        in_words = sum(p.numel() for p in start.language_model.parameters())
        assert run["trained"] == sum(p.numel() for p in start.parameters()) - in_words


def test_the_demo_answers_about_the_picture_it_writes(tmp_path, capsys):
    results = run_ml_mamba_demo(dataclasses.replace(TINY, out=tmp_path, arms=("advanced",), finetune_steps=1))
    assert len(results["asked"]) == 4
    assert {word for line in results["asked"] for word in line["answer"].split()} <= set(talk().words)
    from PIL import Image

    assert Image.open(tmp_path / "canvas.png").size == (192, 192)
    assert json.loads((tmp_path / "results.json").read_text())["accuracy"] == results["accuracy"]
    report = (tmp_path / "report.md").read_text()
    assert all(line["question"] in report for line in results["asked"])
    assert "what is in row2 column2 ?" in capsys.readouterr().out
    asked = ["--image", str(tmp_path / "canvas.png"), "--question", "What is in row2 column1 ?"]
    assert main(["generate", "--model", str(tmp_path / "model"), *asked, "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.strip() == results["asked"][2]["answer"]


def test_the_comparison_writes_as_it_goes(tmp_path):
    seen = []
    settings = dataclasses.replace(TINY, out=tmp_path, arms=("mlp", "cross"), seeds=2)
    results = compare_connectors(settings, lambda found: seen.append(sum(map(len, found["runs"].values()))))
    assert seen == [1, 2, 3, 4]
    assert set(results["runs"]) == {"mlp", "cross"}
    assert (tmp_path / "curves.png").stat().st_size > 1000
    text = comparison_report(results, "x.png")
    assert "Advanced, cross scan (CSM) | 2 |" in connector_table(results)
    assert connector_table(results) in text


def test_findings_can_fail():
    def runs(**scores):
        return {key: {0: {"accuracy": value}, 1: {"accuracy": value}} for key, value in scores.items()}

    good = findings({"runs": runs(mlp=0.7, basic=0.8, advanced=0.9, cross=0.91, raster=0.6)})
    assert [met for _, met in good] == [True] * 4
    bad = findings({"runs": runs(mlp=0.9, basic=0.8, advanced=0.8, cross=0.9, raster=0.8)})
    assert [met for _, met in bad] == [False] * 4
    assert len(findings({"runs": runs(mlp=0.9, cross=0.9)})) == 0


def test_settings_and_the_command_line(tmp_path, capsys):
    for change, named in (
        ({"turns": 5}, "at most the 4 cells"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"align_rate": 0.0}, "align_rate"),
        ({"arms": ("msc",)}, "arms must be known"),
        ({"arms": ()}, "one arm at least"),
        ({"workers": 0}, "workers"),
        ({"finetune_steps": -1}, "0 or more"),
    ):
        with pytest.raises(ConfigError, match=named):
            dataclasses.replace(TINY, **change)
    given = ["demo", "--task", "ml-mamba", "--out", str(tmp_path)]
    assert main([*given, "--seeds", "2"]) == 2
    assert "--seeds must come with the task" in capsys.readouterr().err
    assert main([*given, "--steps", "10", "--arms", "mlp", "--quick"]) == 0
    settings = json.loads((tmp_path / "results.json").read_text())["settings"]
    assert (settings["words_steps"], settings["steps"], settings["finetune_steps"]) == (1, 1, 1)


@pytest.mark.slow
def test_it_learns_to_see():
    """Whole scans in one patch, a connector without scans: the shortest way from pixels to answers."""
    settings = dataclasses.replace(
        TINY, patches=1, words_steps=800, steps=150, batch_size=48, turns=4, questions=500, align_rate=3e-3
    )
    words = learn_words(CanvasTalk(settings.task(0), 4), settings, 0)
    _, run = train_arm(ARMS[0], settings, 0, words)
    assert run["accuracy"] > majority(talk(patches=1), 500) + 0.15
