"""AKI's training program: losses by the formula, what is trained, resumed runs, the command line, bad data."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from aki_tiny import tiny_model, tiny_processor
from PIL import Image

from mmkernels.distill import checkpoint as ckpt
from mmkernels.distill.supervised import Samples
from mmkernels.errors import CheckpointError, ConfigError, DataError
from mmkernels.models.aki import AkiForConditionalGeneration, AkiProcessor
from mmkernels.models.aki.recipe_aki import AkiRecipe, load_recipe, make_optimizer
from mmkernels.models.aki.train import FIELDS, Trainer, main, make_batch

QUESTIONS = [
    ("what is here ?", "a red cat"),
    ("is ?", "dog"),
    ("what ?", "left"),
    ("what is shown ?", "a dog"),
    ("?", "red"),
]


@pytest.fixture
def data(tmp_path):
    """Files of questions and captions with pictures; one question has no image, one has two."""
    rng = np.random.default_rng(0)
    for n in range(3):
        Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)).save(tmp_path / f"{n}.png")
    images = ["0.png", None, ["1.png", "2.png"], "2.png", "1.png"]
    asked = [
        {"question": q, "answer": a} | ({"image": i} if i else {}) for (q, a), i in zip(QUESTIONS, images, strict=True)
    ]
    told = [{"image": f"{n}.png", "caption": c} for n, c in enumerate(["a red cat", "a dog", "left"])]
    for name, lines in (("sft", asked), ("pretrain", told)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {name: tmp_path / f"{name}.jsonl" for name in ("sft", "pretrain")}


def recipe(stage="sft", **changes):
    values = {"lr": 1e-2, "min_lr": 1e-3, "warmup_steps": 1, "steps": 4, "global_batch": 4, "micro_batch": 2}
    values |= {"policy": "none" if stage == "pretrain" else "prompt", "log_every": 1, "checkpoint_every": 2, "seed": 0}
    return AkiRecipe(**{"name": stage, "stage": stage, **values, **changes})


def read(files, settings):
    return Samples(files, settings, FIELDS[settings.stage])


def train(settings, data, out, model=None):
    model = model or tiny_model()
    history = Trainer(settings, model, tiny_processor(), [data[settings.stage]], out, progress=False).run()
    return model, history


@pytest.mark.parametrize("stage", ["sft", "pretrain"])
def test_the_first_loss_is_one_mean_over_the_global_batch(stage, data, tmp_path):
    """Not a mean of micro-batch means: the samples have answers of different lengths."""
    settings, plain = recipe(stage), tiny_model()
    samples = read([data[stage]], settings)
    batches = [dict(make_batch(tiny_processor(), settings, samples.rows(n))) for n in (0, 1)]
    plain.config.policy = settings.policy
    total, count, means = 0.0, 0, []
    with torch.no_grad():
        for batch in batches:
            labels = batch.pop("labels")[:, 1:]
            logp = plain(**batch).logits[:, :-1].log_softmax(-1)
            own = -logp.gather(2, labels.clamp(min=0)[..., None])[..., 0][labels != -100]
            total, count, means = total + float(own.sum()), count + len(own), [*means, float(own.mean())]
    _, history = train(settings, data, tmp_path / "out")
    assert history[0]["loss"] == pytest.approx(total / count, rel=1e-5)
    assert abs(total / count - sum(means) / 2) > 1e-4
    assert [record["lr"] for record in history] == [settings.learning_rate(step) for step in range(4)]
    assert history[0]["lr"] == 1e-3  # the warm-up starts at the smallest rate
    assert history[-1]["loss"] < history[0]["loss"]


def test_the_policy_matters_to_sft_only(data, tmp_path):
    losses = {}
    for stage in ("sft", "pretrain"):
        for policy in ("prompt", "none"):
            settings = recipe(stage, policy=policy, steps=1)
            losses[stage, policy] = train(settings, data, tmp_path / stage / policy)[1][0]["loss"]
    assert losses["pretrain", "prompt"] == losses["pretrain", "none"]
    assert losses["sft", "prompt"] != losses["sft", "none"]


def test_what_is_trained_and_what_is_saved(data, tmp_path):
    before = tiny_model().state_dict()
    model, _ = train(recipe("pretrain"), data, tmp_path / "out")
    for name, value in model.state_dict().items():
        frozen = name.startswith("vision_tower.")
        assert torch.equal(value, before[name]) == frozen, name
    saved = AkiForConditionalGeneration.from_pretrained(tmp_path / "out/model")
    assert saved.config.policy == "prompt"  # the model's own, not the stage's
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in model.state_dict().items())
    processor = AkiProcessor.from_pretrained(tmp_path / "out/model")
    assert processor.system_message == "be kind"
    decayed, spared = make_optimizer(tiny_model(), recipe(weight_decay=0.5)).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.5, 0.0)
    assert [tuple(p.shape) for p in spared["params"]] == [tuple(before[n].shape) for n in (
        "language_model.embed_tokens.weight", "extra_embedding.weight")]  # fmt: skip


def test_a_killed_run_goes_on_to_the_same_numbers(data, tmp_path, monkeypatch):
    whole, history = train(recipe(), data, tmp_path / "whole")
    step = Trainer._step

    def stop(self, *args):
        if self.at.step == 3:
            raise KeyboardInterrupt
        step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", stop)
        with pytest.raises(KeyboardInterrupt):
            train(recipe(), data, tmp_path / "cut")
    assert [p.name for p in ckpt.finished(tmp_path / "cut/checkpoints")] == ["step-00000002"]
    resumed, rest = train(recipe(), data, tmp_path / "cut")
    assert rest == history
    lines = (tmp_path / "cut/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == history
    assert all(torch.equal(v, whole.state_dict()[n]) for n, v in resumed.state_dict().items())
    with pytest.raises(CheckpointError, match="lr was"):
        train(recipe(lr=2e-2), data, tmp_path / "cut")
    other = tiny_model()
    other.lm_head.bias.data += 1
    with pytest.raises(CheckpointError, match="started with"):
        train(recipe(), data, tmp_path / "cut", model=other)


def test_bf16_autocast_keeps_float32_weights(data, tmp_path):
    model, history = train(recipe(precision="bf16", steps=2), data, tmp_path / "out")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    exact = train(recipe(steps=2), data, tmp_path / "exact")[1]
    assert history[0]["loss"] != exact[0]["loss"]
    assert history[0]["loss"] == pytest.approx(exact[0]["loss"], rel=0.05)


def test_order_and_weights_of_samples(data):
    samples = read([data["sft"]], recipe())
    first = [samples[n]["question"] for n in range(10)]
    assert sorted(first[:5]) == sorted(first[5:]) == sorted(q for q, _ in QUESTIONS)  # each once an epoch
    assert first[:5] != first[5:]
    assert first == [read([data["sft"]], recipe())[n]["question"] for n in range(10)]
    assert samples[0]["image"] == [] or samples[0]["image"][0].is_file()
    drawn = read([data["sft"], data["sft"]], recipe(weights=(0.0, 2.0)))
    drawn.parts[0] = []  # never drawn from
    assert len({drawn[n]["question"] for n in range(40)}) == 5
    with pytest.raises(ConfigError, match="one per data file"):
        read([data["sft"]], recipe(weights=(1.0, 1.0)))


def test_the_command_line(data, tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "model")
    settings = dataclasses.replace(recipe(), steps=1, max_text_tokens=40)
    (tmp_path / "mine.yaml").write_text(json.dumps(settings.to_dict()))
    given = [str(tmp_path / "mine.yaml"), "--model", str(tmp_path / "model"), "--data", str(data["sft"])]
    assert main([*given, "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/model/model.safetensors").is_file()
    assert main(["sfd", *given[1:], "--out", str(tmp_path / "x")]) == 2
    assert "sft" in capsys.readouterr().err
    assert main([given[0], "--model", str(tmp_path / "no"), *given[3:], "--out", str(tmp_path / "x")]) == 2
    assert "save_pretrained" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(data, tmp_path):
    """Gradients are averaged over processes and the loss is a mean over their tokens: neither may be scaled twice."""
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "model")
    (tmp_path / "mine.yaml").write_text(json.dumps(recipe(global_batch=4, micro_batch=1, steps=3).to_dict()))
    logs = []
    for processes in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command += ["-m", "mmkernels.models.aki.train", "mine.yaml", "--model", "model", "--data", "sft.jsonl"]
        paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.pathsep.join(paths)}
        out = tmp_path / f"by{processes}"
        done = subprocess.run(
            [*command, "--out", out.name],
            cwd=tmp_path,
            env={**os.environ, **environment},
            capture_output=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stderr.decode()[-3000:]
        logs.append([json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()])
    assert len(logs[0]) == 3
    for one, two in zip(*logs, strict=True):
        assert two == pytest.approx(one, rel=1e-4)  # float32 sums in another order, over three steps


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "at least one line"),
        ("{", "line 1"),
        ('{"question": "is ?", "answer": "dog"}\n{"question": "is ?"}', "line 2 of .* lacks it"),
        ("[1]", "lacks"),
    ],
)
def test_bad_data_is_named(text, named, tmp_path):
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(DataError, match=named):
        read([tmp_path / "x.jsonl"], recipe())
    with pytest.raises(DataError, match="readable file"):
        read([tmp_path / "none.jsonl"], recipe())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"stage": "stf"}, "sft"),
        ({"policy": "promt"}, "prompt"),
        ({"min_lr": 1.0}, "lr"),
        ({"steps": 0}, "steps"),
        ({"warmup_steps": 9}, "warmup_steps"),
        ({"global_batch": 3}, "multiple"),
        ({"weights": (0.0,)}, "weights"),
        ({"max_text_tokens": 1}, "max_text_tokens"),
    ],
)
def test_recipes_refuse_nonsense(change, named):
    with pytest.raises(ConfigError, match=named):
        recipe(**change)


def test_the_recipes_of_the_package():
    pretrain, sft = load_recipe("pretrain"), load_recipe("sft")
    assert (pretrain.stage, pretrain.policy, pretrain.max_text_tokens) == ("pretrain", "none", 128)
    assert (sft.stage, sft.policy, sft.max_text_tokens) == ("sft", "prompt", 512)
    assert [r.learning_rate(0) for r in (pretrain, sft)] == [1e-5, 1e-6]
    assert pretrain.learning_rate(2000) == 1e-4
    assert sft.learning_rate(150) == 2e-5
    assert sft.learning_rate(50_000) == pytest.approx(1e-6)
    assert AkiRecipe.from_dict(sft.to_dict()) == sft
    with pytest.raises(ConfigError, match="warmup_steps"):
        AkiRecipe.from_dict({**sft.to_dict(), "warmup": 3})
