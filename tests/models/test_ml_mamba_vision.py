"""ML-Mamba's towers: layer, order, grid, class and register tokens, resampled positions; against transformers."""

import pytest
import torch
from ml_mamba_tiny import SIZE, TOKENS, clip, dinov2, pixels, siglip, tiny_config, vit
from torch import nn

from mmkernels.errors import ConfigError
from mmkernels.models.ml_mamba import FusedVisionTower, MLMambaConfig, PatchVisionConfig, encoder_configs
from mmkernels.models.ml_mamba.vision_ml_mamba import NORMALISATION, build_tower


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def through_all_but_one_block(tower, image):
    """A tower's parts one after the other, without its last block and final norm."""
    hidden = tower.embeddings(image)
    if hasattr(tower, "pre_layrnorm"):
        hidden = tower.pre_layrnorm(hidden)
    parts = getattr(tower, "encoder", tower)
    blocks = parts.layer if hasattr(parts, "layer") else parts.layers
    assert len(blocks) == 3
    for block in blocks[:2]:
        hidden = block(hidden, None)
    return hidden


def test_features_are_the_second_to_last_blocks_patches_dinov2_first():
    torch.manual_seed(0)
    fused, image = FusedVisionTower(tiny_config()).eval(), pixels(2, dtype=torch.float32)
    features, scores = fused(image)
    assert features.shape == (2, TOKENS, 40)
    first = through_all_but_one_block(fused.towers[0], image[:, 0])
    second = through_all_but_one_block(fused.towers[1], image[:, 1])
    assert first.shape[1] == 1 + 2 + TOKENS  # class, registers, patches
    torch.testing.assert_close(features, torch.cat([first[:, 3:], second], -1))
    cosine = nn.functional.cosine_similarity
    expected = (cosine(first[:, 3:], first[:, :1], -1) + cosine(second, second.mean(1, keepdim=True), -1)) / 2
    torch.testing.assert_close(scores, expected)


def test_positions_are_resampled_from_the_released_table():
    """5 x 5 positions to 3 x 3: bicubic with antialiasing; the class token keeps its own."""
    torch.manual_seed(0)
    tower = FusedVisionTower(tiny_config()).towers[0].eval()
    image = torch.zeros(1, 3, SIZE, SIZE)
    nn.init.normal_(tower.embeddings.position_embeddings)
    table = tower.embeddings.position_embeddings
    grid = table[:, 1:].reshape(1, 5, 5, 16).permute(0, 3, 1, 2)
    small = nn.functional.interpolate(grid, size=(3, 3), mode="bicubic", antialias=True, align_corners=False)
    patch = tower.embeddings.patch_embeddings.projection.bias
    hidden = tower.embeddings(image)
    torch.testing.assert_close(hidden[0, 3:], patch + small.permute(0, 2, 3, 1).reshape(9, 16))
    torch.testing.assert_close(hidden[0, 0], tower.embeddings.cls_token[0, 0] + table[0, 0])


@pytest.mark.parametrize("tower", [clip, dinov2, siglip, vit])
def test_single_towers(tower):
    torch.manual_seed(0)
    config = tiny_config(vision_config=tower(), second_vision_config=None)
    fused, image = FusedVisionTower(config).eval(), pixels(1, dtype=torch.float32, towers=1)
    features, scores = fused(image)
    prefix = {clip: 1, dinov2: 3, siglip: 0, vit: 1}[tower]
    torch.testing.assert_close(features, through_all_but_one_block(fused.towers[0], image[:, 0])[:, prefix:])
    assert (features.shape, scores.shape) == ((1, TOKENS, config.vision_width), (1, TOKENS))
    assert features.std() > 0.01


def test_patches_alone_are_one_linear_map_each():
    patch = PatchVisionConfig(hidden_size=5, image_size=9, patch_size=4, num_channels=3)  # one row of pixels is left
    config = tiny_config(vision_config=patch, second_vision_config=None, image_size=9)
    tower = FusedVisionTower(config)
    image = torch.randn(1, 1, 3, 9, 9)
    weight = tower.towers[0].patch_embedding.weight.reshape(5, 3, 4, 4)
    expected = nn.functional.conv2d(image[:, 0], weight, tower.towers[0].patch_embedding.bias, stride=4)
    torch.testing.assert_close(tower(image)[0], expected.flatten(2).transpose(1, 2))


@pytest.mark.parametrize(
    ("encoder", "towers", "grid", "width"),
    [
        ("dinosiglip-vit-so-384px", ["dinov2_with_registers", "siglip_vision_model"], 27, 2176),
        ("dinoclip-vit-l-336px", ["dinov2_with_registers", "clip_vision_model"], 24, 2048),
        ("siglip-vit-so400m-384px", ["siglip_vision_model"], 27, 1152),
        ("siglip-vit-b16-256px", ["siglip_vision_model"], 16, 768),
        ("siglip-vit-so400m", ["siglip_vision_model"], 16, 1152),
        ("clip-vit-b", ["clip_vision_model"], 14, 768),
        ("clip-vit-l", ["clip_vision_model"], 16, 1024),
        ("clip-vit-l-336px", ["clip_vision_model"], 24, 1024),
        ("dinov2-vit-l", ["dinov2_with_registers"], 16, 1024),
        ("dinov2-vit-l-224px", ["dinov2_with_registers"], 16, 1024),
        ("in1k-vit-l", ["vit"], 14, 1024),
    ],
)
def test_the_papers_encoders(encoder, towers, grid, width):
    config = MLMambaConfig.official("130m", encoder=encoder)
    assert [tower.model_type for tower in config.towers] == towers
    assert (config.grid, config.vision_width, config.num_image_tokens) == ((grid, grid), width, grid * grid)


@pytest.mark.parametrize(
    ("encoder", "count", "activation", "deviation"),
    [
        ("in1k-vit-l", 303_301_632, "gelu", 0.5),  # of ViT-L/16, without its classifier and pooler
        ("clip-vit-b", 85_799_424, "quick_gelu", 0.26862954),  # of CLIP's image part, without its projection
        ("siglip-vit-so400m", 412_442_352, "gelu_pytorch_tanh", 0.5),  # without the head that pools
    ],
)
def test_encoders_at_224_pixels_are_the_released_ones(encoder, count, activation, deviation):
    (config,), pixels = encoder_configs(encoder)
    with torch.device("meta"):
        tower = build_tower(config)
    assert (pixels, config.image_size, config.hidden_act) == (224, 224, activation)
    assert sum(p.numel() for p in tower.parameters()) == count
    assert NORMALISATION[config.model_type][1][0] == deviation


def test_refusals():
    with pytest.raises(ConfigError, match="Did you mean 'dinosiglip-vit-so-384px'"):
        encoder_configs("dinosiglip-vit-so-38px")
    with pytest.raises(ConfigError, match="one grid of patches"):
        tiny_config(vision_config=dinov2(patch_size=7))
    with pytest.raises(ConfigError, match="be the 16 pixels of siglip_vision_model"):
        tiny_config(second_vision_config=siglip(image_size=16), image_size=12)
    with pytest.raises(ConfigError, match="model_type"):
        tiny_config(vision_config={"hidden_size": 3})
    with pytest.raises(ConfigError, match="patch_size must lie in"):
        PatchVisionConfig(patch_size=50)
