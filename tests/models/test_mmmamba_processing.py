"""Tiles against an exhaustive search, the prompt to the letter, batches against single calls, and every refusal."""

import io
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer

from mmkernels.errors import ConfigError, DataError
from mmkernels.models.common.word_tokenizer import build_word_tokenizer, check_words
from mmkernels.models.mmmamba import ImageTiler, MMMambaProcessor, load_image

WORDS = ["<pad>", "<unk>", "<eos>", "<img>", "</img>", "<IMG_CONTEXT>", "<|im_start|>", "<|im_end|>"]
WORDS += ["system", "user", "assistant", "be", "kind", "what", "is", "shown", "?", "a", "cat", "Image-1:", "Image-2:"]


@pytest.fixture
def tokenizer():
    return build_word_tokenizer(WORDS, special_tokens=WORDS[3:8])


@pytest.fixture
def processor(tokenizer):
    return MMMambaProcessor(tokenizer, tile_size=8, patch_size=2, max_tiles=4, system_message="be kind")


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# --- tiling


def exhaustive(width: int, height: int, least: int, most: int, tile: int) -> set[tuple[int, int]]:
    """All grids the rule allows: among the float64-nearest aspects, the largest with over half its pixels, else the
    smallest."""
    grids = [(i, j) for i in range(1, most + 1) for j in range(1, most + 1) if least <= i * j <= most]
    off = {grid: abs(width / height - grid[0] / grid[1]) for grid in grids}
    nearest = [grid for grid in grids if off[grid] == min(off.values())]
    fitting = [g for g in nearest if 2 * width * height > tile * tile * g[0] * g[1]]
    areas = [i * j for i, j in fitting]
    area = max(areas) if areas else min(i * j for i, j in nearest)
    return {(i, j) for i, j in nearest if i * j == area}


@pytest.mark.parametrize(("least", "most"), [(1, 12), (1, 6), (1, 1), (2, 7), (3, 24)])
def test_tiler_against_exhaustive_search(least, most):
    tiler = ImageTiler(min_tiles=least, max_tiles=most)
    generator = np.random.default_rng(0)
    random = [tuple(int(x) for x in generator.integers(1, 3000, 2)) for _ in range(1500)]
    # exact ties, at sizes on both sides of the pixel rule
    ties = [(i * s, j * s) for i in range(1, 13) for j in range(1, 13) for s in (7, 100, 224, 316, 317, 448, 634)]
    known = [(100, 120), (100, 240), (110, 600), (1, 1), (1, 5000), (5000, 1), (448, 448)]
    for width, height in random + ties + known:
        assert tiler.grid(width, height) in exhaustive(width, height, least, most, 448), (width, height)


def test_ties_that_rounding_splits():
    """5/6 lies midway between 2/3 and 1/1, but not in float64; the rule compares floats, as the original does."""
    assert Fraction(5, 6) - Fraction(2, 3) == 1 - Fraction(5, 6)
    assert abs(100 / 120 - 2 / 3) != abs(100 / 120 - 1 / 1)
    chosen = ImageTiler(max_tiles=6).grid(100, 120)
    assert chosen in exhaustive(100, 120, 1, 6, 448)
    assert chosen == min([(1, 1), (2, 3)], key=lambda g: abs(100 / 120 - g[0] / g[1]))


def test_numbers_of_candidates():
    assert len(ImageTiler(max_tiles=12).candidates()) == 35
    assert len(ImageTiler(max_tiles=6).candidates()) == 14


def test_tiles_are_row_major_with_the_thumbnail_last():
    tiler = ImageTiler(tile_size=8, max_tiles=6, image_mean=(0, 0, 0), image_std=(1, 1, 1))
    image = picture(24, 16)
    tiles = tiler(image)
    assert tiles.shape == (7, 3, 8, 8)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    for row in range(2):
        for column in range(3):
            part = pixels[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            assert torch.allclose(tiles[3 * row + column], part, atol=1e-6)
    small = np.asarray(image.resize((8, 8), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    assert torch.allclose(tiles[6], torch.from_numpy(small).permute(2, 0, 1), atol=1e-6)
    assert len(ImageTiler(tile_size=8, max_tiles=6, use_thumbnail=False)(image)) == 6
    assert len(tiler(picture(8, 8))) == 1  # one tile needs no thumbnail


def test_normalisation():
    white = ImageTiler(tile_size=4)(Image.new("RGB", (4, 4), "white"))[0, :, 0, 0]
    expected = [(1 - m) / s for m, s in zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)]
    assert torch.allclose(white, torch.tensor(expected), atol=1e-6)


def test_several_images_share_the_budget():
    assert [ImageTiler(max_tiles=12).budget(n) for n in (1, 2, 5, 13)] == [12, 6, 2, 1]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"min_tiles": 3, "max_tiles": 2}, "min_tiles"),
        ({"tile_size": 0}, "tile_size"),
        ({"image_std": (1, 0, 1)}, "std"),
    ],
)
def test_impossible_tilers(settings, named):
    with pytest.raises(ConfigError, match=named):
        ImageTiler(**settings)


# --- images


def test_every_source_gives_the_same_image(tmp_path):
    image = picture(6, 5)
    image.save(tmp_path / "x.png")
    pixels = np.asarray(image)
    sources = [
        image,
        tmp_path / "x.png",
        str(tmp_path / "x.png"),
        (tmp_path / "x.png").read_bytes(),
        pixels,
        pixels.astype(np.int64),
        pixels / 255,
        torch.from_numpy(pixels.copy()).permute(2, 0, 1),
        torch.from_numpy(pixels / 255),
    ]
    for source in sources:
        assert np.array_equal(np.asarray(load_image(source)), pixels)
    grey = pixels[..., 0]
    for source in (grey, grey[..., None], Image.fromarray(grey), torch.from_numpy(grey.copy())[None]):
        assert np.array_equal(np.asarray(load_image(source)), np.stack([grey] * 3, -1))


def cut_png() -> bytes:
    buffer = io.BytesIO()
    picture(40, 40).save(buffer, "png")
    return buffer.getvalue()[:500]


@pytest.mark.parametrize(
    ("source", "named"),
    [
        (b"not an image", "readable image"),
        (cut_png(), "readable image"),
        ("/nowhere/x.png", "FileNotFoundError"),
        (Path("/"), "readable image"),
        (3, "int"),
        (np.zeros((2, 2, 7)), "shape"),
        (np.zeros((0, 4, 3)), "shape"),
        (np.full((2, 2), 300), "300"),
        (np.full((2, 2), 1.5), r"\[0, 1\]"),
        (np.full((2, 2), np.nan), r"\[0, 1\]"),
        (torch.zeros(2, 3, 4, 4), "one image at a time"),
        (np.zeros((2, 2), dtype=complex), "complex"),
    ],
)
def test_what_is_no_image_is_refused(source, named):
    with pytest.raises(DataError, match=named):
        load_image(source)


# --- prompts


def test_the_prompt_to_the_letter(processor):
    system = "<|im_start|>system\nbe kind<|im_end|>"
    assert processor.render("what is shown ?", 1) == (
        f"{system}<|im_start|>user\n<image>\nwhat is shown ?<|im_end|><|im_start|>assistant\n"
    )
    assert processor.render("what is shown ?") == (
        f"{system}<|im_start|>user\nwhat is shown ?<|im_end|><|im_start|>assistant\n"
    )
    two = "Image-1: <image>\nImage-2: <image>\nwhat ?"
    assert processor.render("what ?", 2) == f"{system}<|im_start|>user\n{two}<|im_end|><|im_start|>assistant\n"
    assert processor.expand("a <image> b", [1]) == "a <img>" + "<IMG_CONTEXT>" * 4 + "</img> b"
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what ?"}]},
        {"role": "assistant", "content": "a cat"},
    ]
    told = f"{system}<|im_start|>user\n<image>\nwhat ?<|im_end|><|im_start|>assistant\na cat<|im_end|>"
    assert processor.render(turns, 1) == told  # nothing is asked for after an answer
    more = [*turns, {"role": "user", "content": "is a ?"}]
    assert processor.render(more, 1) == f"{told}<|im_start|>user\nis a ?<|im_end|><|im_start|>assistant\n"
    own = [{"role": "system", "content": "a cat"}, {"role": "user", "content": "what ?"}]
    assert processor.render(own).startswith("<|im_start|>system\na cat<|im_end|><|im_start|>user")


def test_orders_and_plain_prompts(tokenizer):
    chat = MMMambaProcessor(tokenizer, prompt_order="question_first")
    assert chat.render("what ?", 1) == "<|im_start|>user\nwhat ?\n<image><|im_end|><|im_start|>assistant\n"
    plain = MMMambaProcessor(tokenizer, chat=False)
    assert plain.render("what is shown ?", 1) == "<image> what is shown ?"
    late = MMMambaProcessor(tokenizer, chat=False, prompt_order="question_first")
    assert late.render("what is shown ?", 1) == "what is shown <image> ?"
    assert late.render("what is shown", 2) == "what is shown <image> <image>"
    assert late.render("is <image> a cat ?", 1) == "is <image> a cat ?"


def test_a_call_builds_what_the_model_reads(processor, tokenizer):
    out = processor("what is shown ?", picture(16, 8), return_image_counts=True)
    image = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    assert out["pixel_values"].shape == (3, 3, 8, 8)  # two tiles and the thumbnail
    assert out["image_counts"].tolist() == [3]
    assert (out["input_ids"] == image).sum() == 3 * 4
    assert torch.equal(out["mm_token_type_ids"], (out["input_ids"] == image).long())
    words = ["<|im_start|>", "system", "be", "kind", "<|im_end|>", "<|im_start|>", "user", "<img>"]
    words += ["<IMG_CONTEXT>"] * 12 + ["</img>", "what", "is", "shown", "?", "<|im_end|>", "<|im_start|>", "assistant"]
    assert tokenizer.convert_ids_to_tokens(out["input_ids"][0]) == words


def test_a_batch_is_its_single_calls_left_padded(processor):
    first, second = picture(16, 8), [picture(8, 8, 1), picture(8, 16, 2)]
    batch = processor(["what ?", "what is shown ?", "is a cat ?"], images=[first, second, None])
    singles = [processor("what ?", first), processor("what is shown ?", second), processor("is a cat ?")]
    assert torch.equal(batch["pixel_values"], torch.cat([s["pixel_values"] for s in singles[:2]]))
    assert "pixel_values" not in singles[2]
    for row, single in enumerate(singles):
        length = single["input_ids"].shape[1]
        assert torch.equal(batch["input_ids"][row, -length:], single["input_ids"][0])
        assert batch["attention_mask"][row].tolist() == [0] * (batch["input_ids"].shape[1] - length) + [1] * length


def test_conversations_in_a_batch(processor):
    turns = [{"role": "user", "content": "what ?"}]
    one, two = processor(turns), processor([turns, turns])
    assert torch.equal(two["input_ids"], one["input_ids"].repeat(2, 1))


def test_max_tiles_per_call(processor):
    assert len(processor("what ?", picture(32, 8), max_tiles=1)["pixel_values"]) == 1
    assert len(processor("what ?", picture(32, 8))["pixel_values"]) == 5
    assert len(processor("what ?", [picture(32, 8), picture(32, 8)], max_tiles=2)["pixel_values"]) == 2


def test_processor_and_model_together(processor, tokenizer, tiny_model, kind):
    model = tiny_model(kind, vocab_size=len(tokenizer), image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"))
    texts, images = ["what is shown ?", "what ?"], [picture(16, 8), picture(8, 8, 1)]
    run = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [model.config.image_token_id]}
    batch = processor(texts, images=images)
    assert processor.tokens_per_tile == model.config.tokens_per_tile
    together = model.generate(**batch, **run)[:, batch["input_ids"].shape[1] :]
    for row in range(2):
        inputs = processor(texts[row], images=images[row])
        alone = model.generate(**inputs, **run)[:, inputs["input_ids"].shape[1] :]
        assert torch.equal(together[row], alone[0])


def test_from_config_takes_the_models_sizes(tokenizer, tiny_config):
    config = tiny_config(image_token_id=5, downsample_ratio=1.0)
    processor = MMMambaProcessor.from_config(tokenizer, config, max_tiles=2)
    assert processor.image_token == "<IMG_CONTEXT>"
    assert processor.tokens_per_tile == config.tokens_per_tile == 16
    assert processor.max_tiles == 2


def test_save_and_load(processor, tiny_config, tmp_path):
    processor.save_pretrained(tmp_path)
    tiny_config().save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is MMMambaProcessor
    assert loaded.to_dict() == processor.to_dict()
    a, b = (p("what is shown ?", picture(16, 8)) for p in (processor, loaded))
    assert all(torch.equal(a[key], b[key]) for key in ("input_ids", "pixel_values", "mm_token_type_ids"))


@pytest.mark.parametrize(
    ("text", "images", "named"),
    [
        ("what <image> ?", None, "got 1 '<image>' and 0"),
        ("<image> what <image> ?", ["x"], "got 2 '<image>' and 1"),
        ("what <IMG_CONTEXT> ?", None, "image tokens; got 1"),
        (["what ?"], [None, None], "one entry per text"),
        (["what ?", "is ?"], "x", "one entry per text"),
        ("what is shwon ?", None, "'shwon'. Did you mean 'shown'"),
        (None, None, "got none"),
        ([{"role": "wizard", "content": "what ?"}], None, "wizard"),
        ([{"role": "user", "content": [{"type": "video"}]}], None, "video"),
        ([{"role": "assistant", "content": "a cat"}], ["x"], "got 0 '<image>' and 1"),
    ],
)
def test_refusals(processor, text, images, named):
    if isinstance(images, list) and "x" in images:
        images = [picture(8, 8) for _ in images]
    elif images == "x":
        images = picture(8, 8)
    with pytest.raises(DataError, match=named):
        processor(text, images=images)


def test_other_refusals(tokenizer, processor):
    with pytest.raises(ConfigError, match="Did you mean 'image_first'"):
        MMMambaProcessor(tokenizer, prompt_order="image_frist")
    with pytest.raises(ConfigError, match="<none>"):
        MMMambaProcessor(tokenizer, image_token="<none>")
    with pytest.raises(ConfigError, match="min_tiles"):
        MMMambaProcessor(tokenizer, min_tiles=5, max_tiles=2)
    with pytest.raises(DataError, match="max_length = 9"):
        processor("what is shown ?", picture(8, 8), max_length=9)
    with pytest.raises(ConfigError, match="return_tensors"):
        processor("what ?", return_tensors="np")
    tokenizer.pad_token = None
    with pytest.raises(DataError, match="padding token"):
        processor(["what ?", "is ?"])


# --- the word tokenizer


def test_word_tokenizer_round_trip(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "what is<IMG_CONTEXT>shown ?"
    ids = [13, 14, 5, 15, 16]
    assert tokenizer(text)["input_ids"] == loaded(text)["input_ids"] == ids
    assert loaded.padding_side == "left"
    assert tokenizer.decode([13, 14, 15]) == "what is shown"
    check_words(loaded, text)
    with pytest.raises(DataError, match="'dog'"):
        check_words(loaded, "a dog")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["<pad>", "<unk>", "<eos>", "a", "a"], r"\['a'\]"),
        (["<pad>", "<unk>", "<eos>", "a b"], "whitespace"),
        (["<pad>", "<unk>", "<eso>"], "Did you mean '<eso>'"),
    ],
)
def test_word_lists_that_cannot_be(words, named):
    with pytest.raises(DataError, match=named):
        build_word_tokenizer(words)


def test_the_canvas_task_writes_the_same_sequence():
    """The demo's data and this processor must agree on where the image goes."""
    from mmkernels.data import CanvasTask

    for order in ("question_first", "image_first"):
        task = CanvasTask(order=order)
        words = build_word_tokenizer(task.vocab, special_tokens=["<image>"])
        processor = MMMambaProcessor(
            words,
            tile_size=task.image_size,
            patch_size=8,
            max_tiles=1,
            chat=False,
            prompt_order=order,
            image_token="<image>",
            image_start_token=None,
            image_end_token=None,
        )
        assert processor.tokens_per_tile == task.num_image_tokens
        batch = task.batch(0, 4)
        texts = [task.decode(row) for row in batch["question_ids"]]
        out = processor(texts, images=list(batch["images"].permute(0, 2, 3, 1)))
        length = out["input_ids"].shape[1]
        assert torch.equal(out["input_ids"], batch["input_ids"][:, -length:])
        assert torch.equal(out["attention_mask"], batch["attention_mask"][:, -length:])
