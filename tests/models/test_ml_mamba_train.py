"""ML-Mamba's training: losses by the formula, what each stage trains and decays, both stages end to end, bad data."""

import json

import numpy as np
import pytest
import torch
from ml_mamba_tiny import dinov2, siglip, text, tiny_model, tiny_processor
from PIL import Image
from transformers import Dinov2WithRegistersModel, SiglipVisionModel

from mmkernels.distill.supervised import Samples
from mmkernels.errors import ConfigError, DataError
from mmkernels.models.mamba2 import Mamba2LMForCausalLM
from mmkernels.models.ml_mamba import MLMambaForConditionalGeneration, MLMambaProcessor
from mmkernels.models.ml_mamba.recipe_ml_mamba import MLMambaRecipe, load_recipe, make_optimizer
from mmkernels.models.ml_mamba.train import FIELDS, Trainer, main, make_batch, turns

TALK = [
    {"from": "human", "value": "<image>\nwhat is here ?"},
    {"from": "gpt", "value": "a red cat"},
    {"from": "human", "value": "why ?"},
    {"from": "gpt", "value": "dog"},
]


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    for n in range(3):
        Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)).save(tmp_path / f"{n}.png")
    told = [{"image": f"{n}.png", "caption": c} for n, c in enumerate(["a red cat", "a dog"])]
    told.append({"image": "2.png", "conversations": TALK[:2]})
    asked = [{"image": "0.png", "conversations": TALK}, {"conversations": TALK[2:]}]
    asked += [
        {"image": "1.png", "question": "what is here ?", "answer": "a dog"},
        {"question": "is ?", "answer": "red"},
    ]
    for name, lines in (("align", told), ("finetune", asked)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {name: tmp_path / f"{name}.jsonl" for name in ("align", "finetune")}


def recipe(stage="finetune", **changes):
    values = {"lr": 1e-2, "min_lr": 0.0, "warmup_steps": 1, "steps": 3, "global_batch": 4, "micro_batch": 2, "seed": 0}
    return MLMambaRecipe(**{"name": stage, "stage": stage, **values, "log_every": 1, "checkpoint_every": 0, **changes})


def train(settings, data, out):
    model = tiny_model(torch.float32)
    return model, Trainer(settings, model, tiny_processor(), [data[settings.stage]], out, progress=False).run()


@pytest.mark.parametrize("stage", ["align", "finetune"])
def test_the_first_loss_is_one_mean_over_all_labels(stage, data, tmp_path):
    """The first word of a caption is among them: the image predicts it."""
    settings, plain = recipe(stage), tiny_model(torch.float32)
    samples = Samples([data[stage]], settings, FIELDS[stage])
    total = count = 0
    with torch.no_grad():
        for n in (0, 1):
            batch = make_batch(tiny_processor(), settings, samples.rows(n))
            for i in range(2):
                row = {k: v[i : i + 1] for k, v in batch.items()}
                labels, having = row["labels"][0], bool(row.get("has_image", torch.tensor([False]))[0])
                words = plain.get_input_embeddings()(row["input_ids"])
                front = plain.get_image_features(row["pixel_values"]) if having else words[:, :0]
                ahead = front.shape[1]
                logp = plain.language_model(inputs_embeds=torch.cat([front, words], 1)).logits[0].log_softmax(-1)
                for t, label in enumerate(labels.tolist()):
                    if label >= 0 and ahead + t:
                        total, count = total - float(logp[ahead + t - 1, label]), count + 1
    if stage == "finetune":  # answers and their ends, nothing else
        assert count == 4 + 2 + 2 + 3 + 2
    _, history = train(settings, data, tmp_path)
    assert history[0]["loss"] == pytest.approx(total / count, rel=1e-4)
    assert history[0]["lr"] == 0.0


@pytest.mark.parametrize(
    ("stage", "changed"), [("align", {"connector"}), ("finetune", {"connector", "language_model"})]
)
def test_what_is_trained_and_what_is_saved(stage, changed, data, tmp_path):
    before = tiny_model(torch.float32).state_dict()
    model, history = train(recipe(stage), data, tmp_path)
    moved = {name.split(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == changed
    assert history[-1]["loss"] < history[0]["loss"]
    saved = MLMambaForConditionalGeneration.from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    assert MLMambaProcessor.from_pretrained(tmp_path / "model").image_size == 14


def test_matrices_decay_and_what_rules_the_recurrence_does_not():
    model = tiny_model(torch.float32)
    decayed, spared = make_optimizer(model, recipe(weight_decay=0.1)).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    names = {id(p): n for n, p in model.named_parameters()}
    of_spared = {names[id(p)].rsplit(".", 1)[1] for p in spared["params"]}
    assert {"A_log", "dt_bias", "D", "conv_bias", "bias"} <= of_spared
    assert not {names[id(p)].rsplit(".", 1)[1] for p in decayed["params"]} & {"A_log", "dt_bias", "D", "conv_bias"}
    assert not any(names[id(p)].startswith("vision_tower") for p in decayed["params"] + spared["params"])
    full = make_optimizer(model, recipe("full-finetune")).param_groups
    assert any(names[id(p)].startswith("vision_tower") for p in full[0]["params"])
    assert not model.vision_tower.frozen


def test_both_stages_from_pretrained_parts(data, tmp_path, capsys):
    """The command line, with the language model's own weights, which the official script never loads."""
    torch.manual_seed(0)
    Dinov2WithRegistersModel(dinov2()).save_pretrained(tmp_path / "dino")
    SiglipVisionModel(siglip()).save_pretrained(tmp_path / "siglip")
    lm = Mamba2LMForCausalLM(text())
    lm.save_pretrained(tmp_path / "lm")
    tiny_processor().tokenizer.save_pretrained(tmp_path / "words")
    for stage in ("align", "finetune"):
        settings = recipe(stage, steps=2, warmup_steps=0).to_dict()
        (tmp_path / f"{stage}.yaml").write_text(json.dumps(settings))
    parts = ["--lm", "lm", "--vision", "dino", "--vision", "siglip", "--tokenizer", "words"]
    parts = [value if value.startswith("--") else str(tmp_path / value) for value in parts]
    first = [str(tmp_path / "align.yaml"), *parts, "--data", str(data["align"]), "--out", str(tmp_path / "one")]
    assert main([*first, "--connector", "msc_basic"]) == 0, capsys.readouterr().err
    aligned = MLMambaForConditionalGeneration.from_pretrained(tmp_path / "one/model")
    assert aligned.config.connector_variant == "msc_basic"
    assert all(torch.equal(v, lm.state_dict()[n]) for n, v in aligned.language_model.state_dict().items())
    second = [str(tmp_path / "finetune.yaml"), "--model", str(tmp_path / "one/model"), "--data", str(data["finetune"])]
    assert main([*second, "--out", str(tmp_path / "two")]) == 0, capsys.readouterr().err
    model = MLMambaForConditionalGeneration.from_pretrained(tmp_path / "two/model").eval()
    processor = MLMambaProcessor.from_pretrained(tmp_path / "two/model")
    inputs = processor("what is here ?", images=tmp_path / "0.png")
    out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert out.shape[1] > inputs["input_ids"].shape[1]
    assert main([*second, *parts[:2], "--out", str(tmp_path / "x")]) == 2
    assert "must come alone" in capsys.readouterr().err
    assert main([*first[:3], *first[9:]]) == 2
    assert "no --vision, --tokenizer" in capsys.readouterr().err


def test_the_packages_recipes():
    align, finetune = load_recipe("align"), load_recipe("finetune")
    assert (align.stage, align.lr, align.global_batch, align.weight_decay) == ("align", 1e-3, 256, 0.0)
    assert (finetune.stage, finetune.lr, finetune.global_batch, finetune.weight_decay) == ("finetune", 2e-5, 128, 0.1)
    for stage, samples in ((align, 558_128), (finetune, 2 * 664_940)):
        assert stage.steps * stage.global_batch == pytest.approx(samples, rel=1e-3)
        assert stage.warmup_steps == pytest.approx(0.03 * stage.steps, rel=0.02)
        assert stage.learning_rate(stage.steps) == 0.0
    with pytest.raises(ConfigError, match="Did you mean 'finetune'"):
        load_recipe("finetun")
    with pytest.raises(ConfigError, match="Did you mean 'align'"):
        recipe("alingn")


def test_bad_lines(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"caption": "a cat"}) + "\n")
    with pytest.raises(DataError, match=r"must have image and caption or image and conversations; line 1 .* lacks it"):
        Samples([path], recipe("align"), FIELDS["align"])
    with pytest.raises(DataError, match="'from': 'human' or 'gpt'"):
        turns({"conversations": [{"from": "system", "value": "x"}]})
