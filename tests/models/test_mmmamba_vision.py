"""Pixels to tokens: patch order, position table, pixel shuffle, placeholders, tiles that stay together in beams."""

import math

import pytest
import torch

from mmkernels.errors import ConfigError, ShapeError
from mmkernels.models.mmmamba import MMMambaConfig
from mmkernels.models.mmmamba.vision_mmmamba import MMMambaProjector, MMMambaVisionEmbedding, pixel_shuffle

IMAGE = 49


@pytest.mark.parametrize(("factor", "height", "width"), [(1, 3, 2), (2, 4, 6), (3, 3, 9)])
def test_pixel_shuffle_follows_its_index_formula(factor, height, width):
    n, hidden = 2, 5
    patches = torch.arange(n * hidden * height * width).reshape(n, hidden, height, width).double()
    out = pixel_shuffle(patches, factor)
    assert out.shape == (n, height * width // factor**2, hidden * factor**2)
    for row in range(height // factor):
        for column in range(width // factor):
            token = out[:, row * (width // factor) + column]
            for a in range(factor):
                for b in range(factor):
                    block = token[:, (a * factor + b) * hidden :][:, :hidden]
                    assert torch.equal(block, patches[:, :, row * factor + a, column * factor + b])


def test_four_neighbours_in_reading_order():
    patches = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert pixel_shuffle(patches, 2)[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_a_patch_sees_its_pixels_and_its_position(tiny_config):
    embedding = MMMambaVisionEmbedding(tiny_config()).double()
    torch.nn.init.normal_(embedding.position_embedding)
    pixels = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    out = embedding(pixels)
    conv = embedding.patch_embedding
    for row in range(4):
        for column in range(4):
            patch = pixels[0, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            expected = (
                (conv.weight * patch).sum((1, 2, 3)) + conv.bias + embedding.position_embedding[0, 1 + 4 * row + column]
            )
            assert torch.allclose(out[0, :, row, column], expected, atol=1e-13)


def test_matching_grid_uses_the_table_bit_for_bit_and_never_slot_0(tiny_config):
    embedding = MMMambaVisionEmbedding(tiny_config()).to(torch.bfloat16)
    torch.nn.init.normal_(embedding.position_embedding)
    table = embedding.positions(4, 4)
    assert torch.equal(table[0].flatten(1).T, embedding.position_embedding[0, 1:])
    with torch.no_grad():
        embedding.position_embedding[:, 0] = math.nan
    assert torch.isfinite(embedding(torch.zeros(1, 3, 8, 8))).all()
    assert torch.isfinite(embedding(torch.zeros(1, 3, 12, 4))).all()


def cubic_weights(fraction: float) -> list[float]:
    """Keys' cubic kernel with a = -0.75 at the distances of the four nearest samples."""

    def kernel(x: float) -> float:
        x, a = abs(x), -0.75
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a

    return [kernel(fraction - offset) for offset in (-1, 0, 1, 2)]


def resample(row: list[float], size: int) -> list[float]:
    """Bicubic along one axis, half-pixel centres, borders repeated."""
    out = []
    for i in range(size):
        source = (i + 0.5) * len(row) / size - 0.5
        base = math.floor(source)
        taps = [row[min(max(base + k, 0), len(row) - 1)] for k in (-1, 0, 1, 2)]
        out.append(sum(w * t for w, t in zip(cubic_weights(source - base), taps, strict=True)))
    return out


def test_other_grids_resample_the_table(tiny_config):
    embedding = MMMambaVisionEmbedding(tiny_config())
    torch.nn.init.normal_(embedding.position_embedding)
    table = embedding.position_embedding[0, 1:, 0].reshape(4, 4).tolist()
    rows = [resample(row, 6) for row in table]
    expected = torch.tensor([resample(list(column), 2) for column in zip(*rows, strict=True)]).T
    got = embedding.positions(2, 6)[0, 0]
    assert torch.allclose(got, expected, atol=16 * torch.finfo(torch.float32).eps * 4)  # 16 taps of size up to 4


def test_projector_without_shuffle():
    config = MMMambaConfig(hidden_size=8, num_attention_heads=2, num_key_value_heads=2, downsample_ratio=1.0)
    projector = MMMambaProjector(config)
    assert projector.linear_1.in_features == 8
    assert projector(torch.randn(2, 8, 3, 3)).shape == (2, 9, 8)


def test_image_tokens_take_the_places_of_their_placeholders_in_order(tiny_model):
    model = tiny_model("hybrid")
    ids = torch.tensor(
        [[3, IMAGE, IMAGE, IMAGE, IMAGE, 4, 5, 6, 7, 8], [5, 5, IMAGE, IMAGE, IMAGE, IMAGE, *[IMAGE] * 4]]
    )
    tiles = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        model.model.embed_tokens.weight[IMAGE] = math.nan  # replaced, not blended: nothing spreads
        embeds = model.model.embed(ids, tiles)
        features = model.get_image_features(tiles)
        assert torch.equal(embeds[0, 1:5], features[0])
        assert torch.equal(embeds[1, 2:], features[1:].flatten(0, 1))
        assert torch.equal(embeds[0, 5:], model.get_input_embeddings()(ids[0, 5:]))
        logits = model(ids, tiles).logits
        assert torch.isfinite(logits).all()
        assert torch.equal(model(inputs_embeds=embeds).logits, logits)


def test_the_image_moves_the_logits_after_it_and_none_before(tiny_model, kind):
    model = tiny_model(kind)
    ids = torch.tensor([[3, 4, IMAGE, IMAGE, IMAGE, IMAGE, 5, 6]])
    one, two = torch.randn(2, 1, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        a, b = model(ids, one).logits, model(ids, two).logits
    assert torch.equal(a[:, :2], b[:, :2])
    assert (a[:, 2:] - b[:, 2:]).abs().amax(-1).min() > 1e-6


def test_mismatches_are_refused(tiny_model):
    model = tiny_model("hybrid")
    ids = torch.tensor([[3, IMAGE, IMAGE, IMAGE, 4]])
    tile = torch.zeros(1, 3, 8, 8)
    with pytest.raises(ShapeError, match=r"4 image placeholders .* got 3"):
        model(ids, tile)
    with pytest.raises(ShapeError, match="pixel_values must have shape"):
        model(ids, torch.zeros(1, 3, 8, 7))
    with pytest.raises(ShapeError, match="pixel_values must have shape"):
        model(ids, torch.zeros(3, 8, 8))
    with pytest.raises(ShapeError, match="patch grid"):
        model(ids, torch.zeros(1, 3, 8, 6))
    with pytest.raises(ConfigError, match=r"model\.embed"):
        model(inputs_embeds=torch.zeros(1, 2, 32), pixel_values=tile)


def test_tiles_of_one_sample_stay_together_in_beams(tiny_model, kind):
    """Rows with 2 and 1 tiles: repeating tile by tile would hand the second beam another picture."""
    model = tiny_model(kind)
    tiles = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    rows = torch.tensor([[3, *[IMAGE] * 8, 4], [0, 0, 0, 0, 3, *[IMAGE] * 4, 4]])
    run = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "suppress_tokens": [IMAGE]}
    both = model.generate(rows, pixel_values=tiles, attention_mask=(rows != 0).long(), **run)
    first = model.generate(rows[:1], pixel_values=tiles[:2], **run)
    second = model.generate(rows[1:, 4:], pixel_values=tiles[2:], **run)
    assert torch.equal(both[0], first[0])
    assert torch.equal(both[1, 4:], second[0])
    uncached = model.generate(rows[:1], pixel_values=tiles[:2], use_cache=False, **run)
    assert torch.equal(first, uncached)
