"""Parameter counts of the released AKI-4B on the meta device, its published settings, and configurations refused."""

import math

import pytest
import torch
from transformers import AutoConfig

from mmkernels.errors import ConfigError
from mmkernels.models.aki import AkiConfig, AkiForConditionalGeneration


@pytest.fixture(scope="module")
def released():
    with torch.device("meta"):
        return AkiForConditionalGeneration(AkiConfig())


def count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def test_parameter_counts(released):
    head = released.lm_head.weight.numel()
    assert count(released.vision_tower) == 428_225_600
    assert count(released.resampler) == 81_608_448
    assert count(released.language_model) + head == 3_821_079_552  # Phi-3.5-mini with its head
    bias, extra = 32064, 2 * 3072 + (2 * 3072 + 2)  # AKI's own: a bias of the head, and two rows of both tables
    assert count(released.extra_embedding, released.extra_head) == extra
    assert count(released) == 428_225_600 + 81_608_448 + 3_821_079_552 + bias + extra


def test_published_settings(released):
    config = released.config
    text, vision = config.text_config, config.vision_config
    assert (config.vocab_size, config.image_token_id, config.prompt_end_token_id) == (32014, 32012, 32001)
    assert (text.pad_token_id, text.eos_token_id, text.bos_token_id) == (32011, 32000, 1)
    assert (text.hidden_size // text.num_attention_heads, text.num_key_value_heads, text.rms_norm_eps) == (96, 32, 1e-5)
    assert vision.layer_norm_eps == 1e-6
    assert vision.hidden_act == "gelu_pytorch_tanh"
    assert (vision.image_size // vision.patch_size) ** 2 == 729
    assert released.resampler.layers[0].attention.norm_media.eps == 1e-5
    assert text._attn_implementation == "mmkernels_mma"
    assert released.vision_tower.config._attn_implementation == "sdpa"


def test_rotary_scaling(released):
    rope = released.config.text_config.rope_parameters
    assert len(rope["short_factor"]) == len(rope["long_factor"]) == 48
    assert sorted(rope["long_factor"]) == rope["long_factor"]
    assert sorted(rope["short_factor"]) == rope["short_factor"]
    rotary = released.language_model.rotary_emb
    assert rotary.attention_scaling == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))
    assert rotary.attention_scaling == pytest.approx(1.19024, abs=1e-5)
    assert rope["original_max_position_embeddings"] == 4096


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"policy": "promt"}, "policy"),
        ({"num_vision_tokens": 0}, "num_vision_tokens"),
        ({"resampler_depth": -1}, "resampler_depth"),
        ({"num_base_tokens": 32065}, "num_base_tokens"),
        ({"num_extra_tokens": 0}, "num_extra_tokens"),
        ({"image_token_id": 32014}, "image_token_id"),
        ({"prompt_end_token_id": 32012}, "image_token_id"),
    ],
)
def test_contradictions_are_named(change, named):
    with pytest.raises(ConfigError, match=named):
        AkiConfig(**change)


def test_saving_a_configuration(tmp_path):
    config = AkiConfig(policy="own_segment", num_vision_tokens=64)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is AkiConfig
    assert loaded.to_diff_dict() == config.to_diff_dict()
    assert loaded.modality_mutual["policy"] == "own_segment"
