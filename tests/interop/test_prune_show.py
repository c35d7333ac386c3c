"""The picture of kept patches: towers of several kinds, the patch that is lit is the patch that was kept."""

import pytest
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from mmkernels import get_pruner
from mmkernels.errors import CheckpointError, ConfigError, ShapeError
from mmkernels.interop.prune_show import light, show

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 48,
    "patch_size": 12,
}


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    CLIPVisionModel(CLIPVisionConfig(**SMALL)).save_pretrained(tmp_path / "clip")
    SiglipVisionModel(SiglipVisionConfig(**SMALL)).save_pretrained(tmp_path / "siglip")
    for name in ("clip", "siglip"):
        size = {"height": 48, "width": 48}
        CLIPImageProcessor(size=size, do_center_crop=False).save_pretrained(tmp_path / name)
    picture = torch.randint(100, 255, (48, 48, 3), dtype=torch.uint8).numpy()
    Image.fromarray(picture).save(tmp_path / "x.png")
    return tmp_path


def bright(path, grid=(4, 4)):
    with Image.open(path) as opened:
        pixels = torch.tensor(list(opened.convert("L").get_flattened_data()), dtype=torch.float32)
    side = int(pixels.numel() ** 0.5)
    tile = side // grid[0]
    inner = pixels.view(grid[0], tile, grid[1], tile).permute(0, 2, 1, 3)[
        ..., tile // 4 : -tile // 4, tile // 4 : -tile // 4
    ]
    return (inner.mean((2, 3)).flatten() > 90).nonzero()[:, 0].tolist()


@pytest.mark.parametrize(
    ("tower", "pruner"),
    [
        ("clip", get_pruner("uniform", num_keep=4)),
        ("clip", get_pruner("vtc_cls", num_keep=5, num_layers=2)),
        ("clip", get_pruner("divprune", num_keep=3)),
        ("clip", get_pruner("tome", num_keep=10)),
        ("siglip", get_pruner("vtc_cls", num_keep=4, score_source="column", num_layers=1)),
    ],
    ids=["uniform", "vtc_cls", "divprune", "tome", "siglip"],
)
def test_as_many_patches_are_lit_as_stay(folder, tower, pruner):
    out = folder / "sub" / "lit.png"
    assert show(folder / tower, folder / "x.png", out, pruner) == (pruner.num_keep, 16)
    assert len(bright(out)) == pruner.num_keep
    if pruner.name == "uniform":
        assert bright(out) == [5, 7, 13, 15]


def test_the_lit_patch_is_the_kept_one():
    picture = light(torch.ones(3, 8, 12), [0, 7], (2, 4))
    assert picture.shape == (3, 336, 504)
    tiles = picture.mean(0).view(2, 168, 4, 126)[:, 40:120, :, 40:90].mean((1, 3))
    assert (tiles.flatten() > 0.9).nonzero()[:, 0].tolist() == [0, 7]
    with pytest.raises(ShapeError, match="whole patches"):
        light(torch.ones(3, 9, 12), [0], (2, 4))


def test_what_cannot_be_shown_is_said(folder):
    image, out = folder / "x.png", folder / "lit.png"
    with pytest.raises(ConfigError, match="score_source"):
        show(folder / "siglip", image, out, get_pruner("vtc_cls", num_keep=4))
    with pytest.raises(ConfigError, match="feature-layer"):
        show(folder / "clip", image, out, get_pruner("vtc_cls", num_keep=4), feature_layer=-5)
    with pytest.raises(ConfigError, match="vision side"):
        show(folder / "clip", image, out, get_pruner("fastv", num_keep=4))
    (folder / "clip" / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match="preprocessor_config"):
        show(folder / "clip", image, out, get_pruner("vtc_cls", num_keep=4))
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        show(folder, image, out, get_pruner("vtc_cls", num_keep=4))
    assert not out.exists()
