"""ML-Mamba: the image-first layout, text-only rows, padding, caches, losses, generate, saving, pruning."""

import itertools

import pytest
import torch
from ml_mamba_tiny import GRID, ID, TOKENS, WORDS, pixels, tiny_config, tiny_model, tokens
from transformers import AutoConfig, AutoModelForImageTextToText, DynamicCache

from mmkernels.errors import ConfigError, ShapeError
from mmkernels.models.ml_mamba import MLMambaForConditionalGeneration, image_first

# float64: paths differ in the order of sums, and the layers amplify (as in test_mamba2_lm.py)
TOLERANCE = 1e4 * torch.finfo(torch.float64).eps
ENDLESS = {"eos_token_id": None}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def close(a, b):
    return torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE)


def by_hand(model, ids, image):
    """Logits of one row through the language model alone: the image's embeddings, then the words'."""
    words = model.get_input_embeddings()(ids)
    row = words if image is None else torch.cat([model.get_image_features(image), words], 1)
    return model.language_model(inputs_embeds=row, use_cache=False).logits


def test_an_image_stands_in_front_of_the_text_and_has_no_logits():
    model, ids, image = tiny_model(), tokens(2, 5), pixels(2)
    out = model(ids, pixel_values=image)
    assert out.logits.shape == (2, 5, len(WORDS))  # words only: no image position, no padding row of the table
    assert model.get_output_embeddings().weight.shape[0] == 16
    assert close(out.logits, by_hand(model, ids, image)[:, TOKENS:])
    assert out.past_key_values.get_seq_length() == 5
    assert not close(out.logits, model(ids, pixel_values=image.flip(0)).logits)
    assert torch.equal(model(ids, pixel_values=image, logits_to_keep=2).logits, out.logits[:, -2:])


def test_rows_of_text_alone_do_not_feel_the_images_beside_them():
    model, ids, image = tiny_model(), tokens(3, 6), pixels(3)
    having = torch.tensor([True, False, True])
    out = model(ids, pixel_values=image, has_image=having)
    assert close(out.logits[1:2], model(ids[1:2]).logits)
    assert close(out.logits[[0, 2]], model(ids[[0, 2]], pixel_values=image[[0, 2]]).logits)
    hurt = image.clone()
    hurt[1] = float("nan")  # pixels of a row of text are not looked at
    assert torch.equal(model(ids, pixel_values=hurt, has_image=having).logits, out.logits)
    none = torch.zeros(3, dtype=torch.bool)
    assert torch.equal(model(ids, pixel_values=hurt, has_image=none).logits, model(ids).logits)


@pytest.mark.parametrize("pad", ["left", "right", "inside"])
@pytest.mark.parametrize("with_image", [True, False])
def test_padding_anywhere_changes_nothing(pad, with_image):
    model, ids = tiny_model(), tokens(1, 6)
    image = pixels() if with_image else None
    holes = {"left": [0, 1, 2], "right": [6, 7, 8], "inside": [1, 4, 5]}[pad]
    real = [i for i in range(9) if i not in holes]
    row, mask = torch.full((1, 9), 3), torch.zeros(1, 9, dtype=torch.long)
    row[0, real], mask[0, real] = ids[0], 1
    batch, masks = torch.cat([row, tokens(1, 9, seed=4)]), torch.cat([mask, torch.ones_like(mask)])
    images = None if image is None else torch.cat([image, pixels(seed=1)])
    cache = DynamicCache(config=model.config)
    out = model(batch, pixel_values=images, attention_mask=masks, past_key_values=cache)
    alone = DynamicCache(config=model.config)
    expected = model(ids, pixel_values=image, past_key_values=alone).logits
    assert close(out.logits[:1, real], expected)
    assert close(out.logits[0, -1], expected[0, -1])  # the last column: what the row's last real token says
    for layer in range(2):
        assert close(cache.get_recurrent_state(layer)[:1], alone.get_recurrent_state(layer))
        assert close(cache.get_conv_state(layer)[:1], alone.get_conv_state(layer))


@pytest.mark.parametrize("cuts", [(0, 7), (0, 1, 7), (0, 3, 4, 5, 6, 7)])
def test_any_split_of_the_text_gives_the_logits_of_the_whole(cuts):
    model, ids, image = tiny_model(), tokens(2, 7), pixels(2)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    whole = model(ids, pixel_values=image, attention_mask=mask, use_cache=False)
    cache = DynamicCache(config=model.config)
    parts = []
    for a, b in itertools.pairwise(cuts):
        first = {"pixel_values": image} if a == 0 else {}
        parts.append(model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache, **first).logits)
    real = mask.bool()
    assert close(torch.cat(parts, 1)[real], whole.logits[real])
    assert cache.get_seq_length() == 7


def test_the_loss_counts_the_first_word_behind_an_image():
    model, ids, image = tiny_model(), tokens(2, 5), pixels(2)
    labels = ids.clone()
    labels[1, :3] = -100
    every = torch.cat([by_hand(model, ids[i : i + 1], image[i : i + 1]) for i in range(2)])
    scores = every[:, TOKENS - 1 : -1].log_softmax(-1).gather(2, ids[..., None])[..., 0]
    out = model(ids, pixel_values=image, labels=labels)
    assert out.loss.item() == pytest.approx(-scores[labels != -100].mean().item(), rel=1e-6)
    assert close(out.logits, every[:, TOKENS:])
    assert model(ids, pixel_values=image, labels=labels, num_items_in_batch=torch.tensor(14)).loss.item() == (
        pytest.approx(-scores[labels != -100].sum().item() / 14, rel=1e-6)
    )
    # without an image nothing precedes the first word; padding on the left precedes nothing either
    alone = by_hand(model, ids[:1], None)[:, :-1].log_softmax(-1).gather(2, ids[:1, 1:, None])
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), ids[:1]], 1)
    mask, shown = (padded != 0).long(), padded.masked_fill(padded == 0, -100)
    for given in ({"input_ids": ids[:1], "labels": ids[:1]}, {"input_ids": padded, "labels": shown}):
        loss = model(**given, attention_mask=mask if given["input_ids"] is padded else None).loss
        assert loss.item() == pytest.approx(-alone.mean().item(), rel=1e-6)


def test_generate_equals_repeated_forward():
    model, ids, image = tiny_model(lm=ENDLESS), tokens(2, 4), pixels(2)
    rows = ids
    for _ in range(6):
        logits = model(rows, pixel_values=image, use_cache=False).logits
        rows = torch.cat([rows, logits[:, -1:].argmax(-1)], 1)
    for use_cache in (True, False):
        out = model.generate(ids, pixel_values=image, max_new_tokens=6, do_sample=False, use_cache=use_cache)
        assert torch.equal(out, rows)


@pytest.mark.parametrize("side", ["left", "right"])
def test_generate_of_a_mixed_batch_equals_row_by_row(side):
    model, image = tiny_model(lm=ENDLESS), pixels(3)
    texts, having = [tokens(1, n, seed=n) for n in (3, 6, 5)], torch.tensor([True, True, False])
    width = 6
    rows, masks = [], []
    for ids in texts:
        fill = torch.zeros(1, width - ids.shape[1], dtype=torch.long)
        ones = torch.ones_like(ids)
        rows.append(torch.cat([fill, ids] if side == "left" else [ids, fill], 1))
        masks.append(torch.cat([fill, ones] if side == "left" else [ones, fill], 1))
    options = {"max_new_tokens": 5, "do_sample": False}
    batch = {"attention_mask": torch.cat(masks), "pixel_values": image, "has_image": having}
    out = model.generate(torch.cat(rows), **batch, **options)
    for i, ids in enumerate(texts):
        one = {"pixel_values": image[i : i + 1]} if having[i] else {}
        assert torch.equal(out[i, width:], model.generate(ids, **one, **options)[0, ids.shape[1] :])
    beams = model.generate(torch.cat(rows), **batch, max_new_tokens=4, num_beams=3, do_sample=False)
    alone = model.generate(texts[0], pixel_values=image[:1], max_new_tokens=4, num_beams=3, do_sample=False)
    assert torch.equal(beams[0, width:], alone[0, texts[0].shape[1] :])


def test_sampling_follows_the_distribution():
    """The released code's default, top_k 1, makes sampling greedy; here draws have the model's frequencies."""
    model, ids, image = tiny_model(lm=ENDLESS), tokens(1, 4), pixels()
    torch.manual_seed(0)
    count = 2000
    out = model.generate(
        ids, pixel_values=image, max_new_tokens=1, do_sample=True, top_k=0, num_return_sequences=count
    )[:, -1]
    p = model(ids, pixel_values=image).logits[0, -1].softmax(-1)
    found = out.bincount(minlength=len(WORDS)) / count
    assert int(out.max()) < len(WORDS)  # rows that pad the table cannot be drawn
    # five standard deviations of a frequency
    assert bool(((found - p).abs() <= 5 * (p * (1 - p) / count).sqrt() + 1e-9).all())
    assert int((found > 0).sum()) > 1


def test_a_conversation_goes_on_from_its_cache():
    model, ids, image = tiny_model(lm=ENDLESS), tokens(1, 4), pixels()
    cache = DynamicCache(config=model.config)
    first = model.generate(ids, pixel_values=image, past_key_values=cache, max_new_tokens=3, do_sample=False)
    longer = torch.cat([first, tokens(1, 3, seed=9)], 1)
    more = model.generate(longer, past_key_values=cache, max_new_tokens=3, do_sample=False)
    fresh = model.generate(longer, pixel_values=image, max_new_tokens=3, do_sample=False)
    assert torch.equal(more, fresh)
    with pytest.raises(ConfigError, match="must come in the first call"):
        model(ids, pixel_values=image, past_key_values=cache)


def test_pruning_keeps_the_patches_most_like_their_image():
    model, image = tiny_model(), pixels(2)
    whole = model.get_image_features(image)
    model.config.num_keep = 4
    kept = model.get_image_features(image)
    scores = model.vision_tower(image)[1]
    best = scores.topk(4, dim=1).indices.sort(1).values
    assert close(kept, whole.gather(1, best[..., None].expand(-1, -1, 32)))
    ids = tokens(2, 5)
    assert close(model(ids, pixel_values=image).logits[:, -1], by_hand(model, ids, image)[:, -1])
    model.config.num_keep = None
    with pytest.raises(ConfigError, match=r"num_keep must be None or lie in 1\.\.9"):
        tiny_config(num_keep=10)


@pytest.mark.parametrize(
    ("variant", "scan"), [("mlp", "bidirectional"), ("msc_basic", "raster"), ("msc_advanced", "cross")]
)
def test_saved_and_loaded_to_the_bit(variant, scan, tmp_path):
    model = tiny_model(torch.float32, connector_variant=variant, connector_scan=scan)
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).connector_scan == scan
    again = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype="auto")
    assert isinstance(again, MLMambaForConditionalGeneration)
    assert again.language_model.lm_head.weight is again.get_input_embeddings().weight
    assert [tower.hidden_size for tower in again.config.towers] == [16, 24]
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    half = MLMambaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    wide = {name.rsplit(".", 1)[1] for name, p in half.named_parameters() if p.dtype == torch.float32}
    assert wide == {"A_log", "dt_bias", "D"}
    out = half.eval()(tokens(1, 4), pixel_values=pixels(dtype=torch.bfloat16)).logits
    exact = model(tokens(1, 4), pixel_values=pixels(dtype=torch.float32)).logits
    # half precision through ten layers of matrices with gains above 1: no single logit is exact, all together are
    assert (out.float() - exact).abs().mean() < 0.1 * exact.std()


@torch.enable_grad()
def test_frozen_towers_have_no_gradient_and_no_dropout():
    model = tiny_model(torch.float32).train()
    assert not model.vision_tower.towers[0].training
    assert model.connector.training
    ids = tokens(1, 4)
    model(ids, pixel_values=pixels(dtype=torch.float32), labels=ids).loss.backward()
    with_gradient = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {"connector", "language_model"}
    asked = tiny_model(torch.float32, freeze_vision=False).train()
    assert asked.vision_tower.towers[0].training
    asked(ids, pixel_values=pixels(dtype=torch.float32), labels=ids).loss.backward()
    used = asked.vision_tower.towers[0].encoder.layer
    assert used[0].norm1.weight.grad is not None
    assert used[2].norm1.weight.grad is None  # the last block comes after the features


def test_layout_of_rows():
    words = torch.arange(1, 5.0).reshape(1, 4, 1).expand(2, 4, 1)
    image = torch.tensor([[[10.0], [11.0]]])
    rows = image_first(words, torch.tensor([[1, 0, 1, 1], [1, 1, 0, 0]]), image, torch.tensor([False, True]))
    assert rows.embeds[0, :3, 0].tolist() == [1, 3, 4]
    assert rows.embeds[1, :4, 0].tolist() == [10, 11, 1, 2]
    assert rows.mask.int().tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]]
    assert rows.places.tolist() == [[-1, 0, 0, 1, 2], [1, 2, 3, 3, 3]]


def test_refusals():
    model, ids = tiny_model(), tokens(2, 4)
    with pytest.raises(ShapeError, match="one entry for each of 2 rows; got 1 images"):
        model(ids, pixel_values=pixels(1))
    with pytest.raises(ShapeError, match=r"has_image \(3,\)"):
        model(ids, pixel_values=pixels(2), has_image=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ShapeError, match=r"\(images, 2, 3, 14, 14\)"):
        model(ids, pixel_values=pixels(2)[:, 0])
    with pytest.raises(ShapeError, match="images not"):
        model(ids, pixel_values=pixels(2), attention_mask=torch.ones(2, 4 + TOKENS))
    with pytest.raises(ShapeError, match="text only"):
        model(ids, pixel_values=pixels(2), labels=torch.ones(2, 4 + TOKENS, dtype=torch.long))
    with pytest.raises(ConfigError, match="one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ConfigError, match="connector_scan must be known"):
        tiny_config(connector_scan="crooss")
    assert (GRID * GRID, ID["<unk>"]) == (TOKENS, 1)
