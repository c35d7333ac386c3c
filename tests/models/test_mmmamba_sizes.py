"""Configuration, and the published parameter counts at full size (on the meta device: nothing is allocated)."""

import pytest
import torch
from transformers import AutoConfig, DynamicCache

from mmkernels.errors import ConfigError
from mmkernels.models.mmmamba import (
    MMMambaConfig,
    MMMambaForConditionalGeneration,
    head_interleaved,
    layer_types_keeping,
)

# What the official files hold and no computation reads: the language model's own token table (it is always fed
# embeddings) and the class token.  The published counts include both; this model has neither.
DEAD = 92553 * 2048 + 2048
NEW = ("in_proj", "g_proj", "conv1d", "g_norm")
DECAY = ("dt_bias", "A_log_bias")
QKV = ("q_proj", "k_proj", "v_proj")


@pytest.fixture(scope="module")
def full_size():
    configs = {
        "teacher": MMMambaConfig.hovle_2b(),
        "linear": MMMambaConfig.mmmamba_2b("linear"),
        "hybrid": MMMambaConfig.mmmamba_2b("hybrid"),
    }
    with torch.device("meta"):
        return {name: MMMambaForConditionalGeneration(config) for name, config in configs.items()}


def count(model, names=()):
    """Parameters in linear mixers whose path has one of the names; all parameters without names."""
    if not names:
        return sum(p.numel() for p in model.parameters())
    mixers = [layer.mixer for layer in model.decoder_layers() if layer.kind == "linear_attention"]
    return sum(p.numel() for m in mixers for n, p in m.named_parameters() if set(n.split(".")) & set(names))


@pytest.mark.parametrize(
    ("name", "published"), [("teacher", 2_606_327_808), ("linear", 2_741_992_448), ("hybrid", 2_708_076_288)]
)
def test_total_counts(full_size, name, published):
    assert count(full_size[name]) + DEAD == published


def test_parts_of_the_count(full_size):
    teacher, linear = full_size["teacher"], full_size["linear"]
    layer = sum(p.numel() for p in teacher.decoder_layers()[0].parameters())
    assert layer == 62_918_656
    vision = sum(p.numel() for m in (teacher.model.vision_embedding, teacher.model.projector) for p in m.parameters())
    embedding = 8 * layer + vision + 2048 + 92553 * 2048  # with the class token and the text table
    assert embedding == 717_180_928
    assert 24 * layer + 2 * 92553 * 2048 + 2048 == 1_889_146_880  # with the dead table and the final norm
    assert count(linear, NEW + DECAY) == 32 * 4_239_520
    assert count(linear) - count(teacher) == 32 * 4_239_520


@pytest.mark.parametrize(
    ("name", "names", "trainable", "share"),
    [
        ("linear", NEW + DECAY, 135_664_640, 4.95),  # stage 1
        ("linear", NEW + DECAY + QKV, 404_100_096, 14.74),  # stage 2
        ("linear", NEW + QKV, 404_099_072, 14.74),  # stage 3 as in the official list: steps and decays stay
        ("hybrid", NEW + QKV, 303_074_304, 11.19),
    ],
)
def test_trainable_sets(full_size, name, names, trainable, share):
    model = full_size[name]
    assert count(model, names) == trainable
    assert round(100 * trainable / (count(model) + DEAD), 2) == share


def test_state_sizes_at_full_size():
    """4096 conv channels and 16 heads of 128 x 128, as in the released model's caches."""
    with torch.device("meta"):
        config = MMMambaConfig.mmmamba_2b("linear", num_embedding_layers=1, num_hidden_layers=0, layer_types=None)
        config.layer_types = ["linear_attention"]
        layer = MMMambaForConditionalGeneration(config).decoder_layers()[0]
    conv_state, ssm_state = layer.mixer.init_states(1, device="meta")
    assert conv_state.shape == (1, 4096, 1)
    assert ssm_state.shape == (1, 16, 128, 128)
    assert ssm_state.dtype == torch.float32


def test_layer_patterns():
    assert head_interleaved(32) == (0, 4, 8, 12, 16, 20, 24, 28)
    assert [len(head_interleaved(32, n)) for n in (32, 16, 8, 4, 1)] == [1, 2, 4, 8, 32]
    hybrid = MMMambaConfig.mmmamba_2b("hybrid").layer_types
    assert [i for i, kind in enumerate(hybrid) if kind == "full_attention"] == [0, 4, 8, 12, 16, 20, 24, 28]
    with pytest.raises(ConfigError, match=r"\[4\]"):
        layer_types_keeping(4, [0, 4])
    with pytest.raises(ConfigError, match="interval"):
        head_interleaved(4, 0)
    with pytest.raises(ConfigError, match="kind"):
        MMMambaConfig.mmmamba_2b("linaer")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_attention_heads": 0, "head_dim": 8}, "num_attention_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"downsample_ratio": 0.3}, "downsample_ratio"),
        ({"image_size": 100}, "image_size"),
        ({"mixer_conv_kernel": 0}, "mixer_conv_kernel"),
        ({"layer_types": ["full_attention"]}, "32 entries"),
        ({"layer_types": ["sliding_attention"] * 32}, "sliding_attention"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "yarn"),
    ],
)
def test_contradictions_are_named(change, named):
    with pytest.raises(ConfigError, match=named):
        MMMambaConfig(**change)


def test_saving_a_configuration(tmp_path):
    config = MMMambaConfig.mmmamba_2b("hybrid")
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is MMMambaConfig
    assert loaded.to_diff_dict() == config.to_diff_dict()
    assert loaded.layer_types == config.layer_types


def test_the_stock_cache_has_a_layer_for_every_layer():
    config = MMMambaConfig.mmmamba_2b("linear")
    cache = DynamicCache(config=config)
    assert len(cache.layers) == 32
    assert cache.get_seq_length() == 0
    assert config.layer_types == ["linear_attention"] * 32  # the cache's view does not leak into the configuration
