import pytest
import torch
import yaml

from mmkernels.distill import DistillRecipe, load_recipe
from mmkernels.distill.optim import learning_rate, make_optimizer, wsd_factor
from mmkernels.errors import ConfigError

STAGE = {
    "name": "stage1",
    "loss": "layer_mse",
    "trainable": ["mixer_new"],
    "lr": 1e-3,
    "warmup_steps": 2,
    "stable_steps": 5,
    "decay_steps": 3,
    "global_batch": 8,
    "micro_batch": 4,
}


def recipe_with(**changes):
    stage = {**STAGE, **{key: value for key, value in changes.items() if not key.startswith("recipe_")}}
    top = {key.removeprefix("recipe_"): value for key, value in changes.items() if key.startswith("recipe_")}
    return {"name": "r", "stages": [stage], **top}


def table(recipe, *fields):
    return [tuple(getattr(stage, field) for field in fields) for stage in recipe.stages]


def test_paper_numbers():
    recipe = load_recipe("paper")
    assert table(recipe, "lr", "steps", "global_batch") == [(1e-3, 20000, 128), (5e-4, 20000, 128), (5e-5, 20000, 64)]
    assert table(recipe, "warmup_steps", "stable_steps", "decay_steps") == [(2000, 16000, 2000)] * 3
    assert table(recipe, "betas", "eps", "weight_decay", "max_grad_norm") == [((0.9, 0.999), 1e-8, 0.05, 5.0)] * 3
    assert table(recipe, "loss", "loss_scale", "temperature") == [
        ("layer_mse", 1000.0, 1.0),
        ("layer_mse", 1000.0, 1.0),
        ("logit_kl", 1000.0, 1.0),
    ]
    assert table(recipe, "trainable") == [
        (("mixer_new", "mixer_decay"),),
        (("mixer_new", "mixer_decay", "qkv"),),
        (("mixer_new", "mixer_decay", "qkv"),),
    ]
    assert (recipe.precision, recipe.max_length, recipe.seed, recipe.seeding) == ("bf16", 8192, 0, "inherit_mimic")
    assert [s.global_batch // (s.micro_batch * 8) for s in recipe.stages] == [8, 8, 8]  # accumulation on 8 GPUs


def test_official_numbers():
    recipe = load_recipe("official")
    assert table(recipe, "lr", "steps", "global_batch") == [(1e-3, 20000, 64), (5e-4, 20000, 64), (5e-5, 20000, 32)]
    schedules = [(2000, 16000, 2000), (5000, 40000, 5000), (2000, 16000, 2000)]
    assert table(recipe, "warmup_steps", "stable_steps", "decay_steps") == schedules
    assert learning_rate(recipe.stages[1], 19999) == 5e-4  # stage 2 never decays
    assert table(recipe, "betas", "eps", "weight_decay", "max_grad_norm") == [((0.9, 0.999), 1e-8, 0.05, 2.0)] * 3
    assert table(recipe, "target", "mask")[:2] == [("context", "all")] * 2
    assert table(recipe, "mask")[2:] == [("all",)]
    assert recipe.stages[2].trainable == ("mixer_new", "qkv")  # dt_bias and A_log_bias are left out
    assert recipe.stages[2].kl_reduction == "batchmean"
    assert [s.global_batch // (s.micro_batch * 4) for s in recipe.stages] == [8, 8, 8]  # accumulation on 4 processes


def test_demo_loads_and_only_and_scaled():
    recipe = load_recipe("demo")
    assert [stage.name for stage in recipe.only("stage3", "stage1").stages] == ["stage1", "stage3"]
    with pytest.raises(ConfigError, match="Did you mean 'stage"):
        recipe.only("stage4")
    tenth = recipe.scaled(0.1)
    for big, small in zip(recipe.stages, tenth.stages, strict=True):
        assert small.steps == pytest.approx(big.steps / 10, abs=2)
    assert all(stage.steps == 1 for stage in recipe.scaled(1e-9).stages)
    assert load_recipe("official").scaled(0.01).stages[1].steps == 200
    with pytest.raises(ConfigError, match="factor must be positive"):
        recipe.scaled(0)


@pytest.mark.parametrize("name", ["paper", "official", "demo"])
def test_round_trip(name, tmp_path):
    recipe = load_recipe(name)
    path = tmp_path / "copy.yaml"
    path.write_text(yaml.safe_dump(recipe.to_dict()))
    assert load_recipe(path) == recipe


def test_yaml_numbers_without_a_dot(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(recipe_with()).replace("lr: 0.001", "lr: 1e-3"))
    assert load_recipe(path).stages[0].lr == 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warmup_step": 3}, r"recipe.stages\[0\]: .*got 'warmup_step'. Did you mean 'warmup_steps'"),
        ({"recipe_sede": 3}, "Did you mean 'seed'"),
        ({"loss": "layer_mae"}, "Did you mean 'layer_mse'"),
        ({"target": "output"}, "target must be known"),
        ({"mask": "pad"}, "Did you mean 'non_pad'"),
        ({"kl_reduction": "mean"}, "kl_reduction must be known"),
        ({"mse_reduction": "mean"}, "mse_reduction must be known"),
        ({"trainable": []}, "trainable must name at least one"),
        ({"trainable": "mixer_new"}, "a list of entries; got 'mixer_new'"),
        ({"trainable": [3]}, r"trainable\[0\]: must be text; got 3"),
        ({"lr": 0}, "lr must be positive"),
        ({"lr": "fast"}, "lr: must be a number; got 'fast'"),
        ({"lr": True}, "lr: must be a number; got True"),
        ({"warmup_steps": 2.5}, "warmup_steps: must be a whole number; got 2.5"),
        ({"warmup_steps": True}, "warmup_steps: must be a whole number"),
        ({"warmup_steps": -1}, "warmup_steps must be 0 or more"),
        ({"max_steps": 11}, "max_steps must lie between 1 and the 10 steps"),
        ({"max_steps": 0}, "max_steps must lie between"),
        ({"global_batch": 6}, "global_batch must be a multiple of micro_batch 4"),
        ({"micro_batch": 0}, "micro_batch must be at least 1"),
        ({"betas": [0.9]}, "betas: must be a list of 2 entries"),
        ({"betas": [0.9, 1.0]}, "betas must lie in"),
        ({"temperature": -1.0}, "temperature must be positive"),
        ({"weight_decay": -0.1}, "weight_decay must be 0 or more"),
        ({"keep_attention": "head_interleave:4"}, "Did you mean 'head_interleaved'"),
        ({"keep_attention": 4}, "keep_attention: must be"),
        ({"recipe_seeding": "inherits"}, "Did you mean 'inherit'"),
        ({"recipe_precision": "fp16"}, "precision must be known"),
        ({"recipe_keep_checkpoints": 0}, "keep_checkpoints must be at least 1"),
        ({"recipe_stages": []}, "stages must be one or more"),
        ({"recipe_stages": [STAGE, STAGE]}, "named apart"),
        ({"recipe_stages": "stage1"}, "stages: must be a list"),
        ({"recipe_stages": ["stage1"]}, "must be a mapping"),
        ({"recipe_max_length": 0}, "max_length must be at least 1"),
    ],
)
def test_bad_values(changes, message):
    with pytest.raises(ConfigError, match=message):
        DistillRecipe.from_dict(recipe_with(**changes))


def test_missing_fields():
    stage = {key: value for key, value in STAGE.items() if key not in ("lr", "loss")}
    with pytest.raises(ConfigError, match=r"stages\[0\]: .*got none for loss, lr"):
        DistillRecipe.from_dict({"name": "r", "stages": [stage]})


def test_bad_files(tmp_path):
    with pytest.raises(ConfigError, match="Did you mean 'paper'"):
        load_recipe("papers")
    for text, message in (("a: [", "valid YAML"), ("- 1", "got list"), ("", "got NoneType")):
        path = tmp_path / "bad.yaml"
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_recipe(path)


@pytest.mark.parametrize(("warmup", "stable", "decay"), [(3, 4, 5), (0, 2, 2), (2, 0, 0), (1, 5, 0)])
def test_schedule_is_transformers_wsd(warmup, stable, decay):
    from transformers import get_wsd_schedule

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_wsd_schedule(optimizer, warmup, decay, num_stable_steps=stable)
    for step in range(warmup + stable + decay + 3):
        ours = wsd_factor(step, warmup=warmup, stable=stable, decay=decay)
        assert ours == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_no_weight_decay_on_biases(teacher):
    from mmkernels.distill import linearize, set_trainable

    student = linearize(teacher)
    names = set_trainable(student, ["mixer_new", "mixer_decay", "qkv"])
    stage = DistillRecipe.from_dict(recipe_with(weight_decay=0.05)).stages[0]
    optimizer = make_optimizer(student, stage)
    by_id = {id(p): name for name, p in student.named_parameters()}
    decayed, spared = ([by_id[id(p)] for p in group["params"]] for group in optimizer.param_groups)
    assert sorted(decayed + spared) == sorted(names)
    assert optimizer.param_groups[0]["weight_decay"] == 0.05
    assert optimizer.param_groups[1]["weight_decay"] == 0.0
    assert {name.split("mixer.")[1] for name in spared} == {"conv1d.bias", "dt_bias", "A_log_bias"}
