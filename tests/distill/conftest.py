import pytest
import torch

from mmkernels.data import CanvasTask


@pytest.fixture(scope="session", autouse=True)
def one_thread(deterministic_threads):
    """The models here are too small to share: two threads only wait for each other."""
    torch.set_num_threads(1)


def tiny_config(**overrides):
    from mmkernels.models.mmmamba import MMMambaConfig

    options = {
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_embedding_layers": 1,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "image_size": 48,
        "patch_size": 8,
        "downsample_ratio": 0.5,
        "image_token_id": 2,
        "initializer_range": 0.1,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    return MMMambaConfig(**{**options, **overrides})


def tiny_teacher(**overrides):
    """A random teacher with weights wide enough for attention to differ from averaging."""
    from mmkernels.models.mmmamba import MMMambaForConditionalGeneration

    with torch.random.fork_rng():
        torch.manual_seed(1)
        return MMMambaForConditionalGeneration(tiny_config(**overrides)).eval()


@pytest.fixture(scope="session")
def task() -> CanvasTask:
    return CanvasTask()


@pytest.fixture
def teacher():
    return tiny_teacher()


@pytest.fixture
def make_teacher():
    return tiny_teacher


@pytest.fixture
def batch(task):
    batch = task.source()(0, 6)
    assert (batch["attention_mask"] == 0).any()  # the tests must see padding
    return batch


def tiny_recipe(micro_batch=4, **overrides):
    """Three stages of 6, 6 and 6 steps; dropout off, everything logged."""
    from mmkernels.distill import DistillRecipe

    common = {"warmup_steps": 2, "stable_steps": 3, "decay_steps": 1, "global_batch": 4, "micro_batch": micro_batch}
    new = ["mixer_new", "mixer_decay"]
    stages = [
        {"name": "stage1", "loss": "layer_mse", "trainable": new, "lr": 3e-3, **common},
        {"name": "stage2", "loss": "layer_mse", "trainable": [*new, "qkv"], "lr": 2e-3, **common},
        {
            "name": "stage3",
            "loss": "logit_kl",
            "kl_reduction": "sequence_sum",
            "mask": "all",
            "trainable": [*new, "qkv"],
            "lr": 1e-3,
            "keep_attention": "head_stacked:1",
            **common,
        },
    ]
    return DistillRecipe.from_dict({"name": "test", "stages": stages, "log_every": 1, **overrides})


@pytest.fixture
def make_recipe():
    return tiny_recipe
