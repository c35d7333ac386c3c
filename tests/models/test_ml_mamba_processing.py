"""ML-Mamba's processor: template and label masks to the byte, transforms, batches, refusals."""

import numpy as np
import pytest
import torch
from ml_mamba_tiny import EOS, ID, SIZE, WORDS, tiny_model, tiny_processor
from PIL import Image

from mmkernels.errors import ConfigError, DataError
from mmkernels.models.common.word_tokenizer import build_word_tokenizer
from mmkernels.models.ml_mamba import MLMambaProcessor, image_to_tower

TALK = [
    {"role": "user", "content": "<image>\nwhat is here ?"},
    {"role": "assistant", "content": "a cat"},
    {"role": "user", "content": " why ? "},
    {"role": "assistant", "content": ""},
]


def picture(width=20, height=10, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def words(text):
    return [ID[word] for word in text.replace(EOS, f" {EOS} ").split()]


def test_the_template_to_the_byte():
    processor = tiny_processor()
    assert processor.render("what is here ?") == ["<|user|>\nwhat is here ?<|endoftext|>\n<|assistant|>\n"]
    assert "".join(processor.render(TALK)) == (
        "<|user|>\nwhat is here ?<|endoftext|>\n<|assistant|>\na cat<|endoftext|>"
        "\n<|user|>\nwhy ?<|endoftext|>\n<|assistant|>\n <|endoftext|>"
    )


def test_turns_are_tokenized_apart(monkeypatch):
    """Byte pairs must not join over the border of two turns."""
    processor, seen = tiny_processor(), []
    monkeypatch.setattr(processor, "_tokens", lambda text: seen.append(text) or [5])
    processor.for_sft([TALK])
    assert seen == processor.render(TALK)


def test_labels_are_on_answers_and_their_ends_only():
    batch = tiny_processor().for_sft([TALK, "why ?"], [None, "left"])
    turns = [words(turn) for turn in tiny_processor().render(TALK)]
    assert batch["input_ids"][0].tolist() == [token for turn in turns for token in turn]
    expected = [token if index % 2 else -100 for index, turn in enumerate(turns) for token in turn]
    assert batch["labels"][0].tolist() == expected
    assert [WORDS[i] for i in batch["labels"][0] if i >= 0] == ["a", "cat", EOS, EOS]
    short = words("<|user|> why ? <|endoftext|> <|assistant|> left <|endoftext|>")
    fill = batch["input_ids"].shape[1] - len(short)
    assert batch["input_ids"][1].tolist() == short + [ID[EOS]] * fill
    assert batch["labels"][1].tolist() == [-100] * (len(short) - 2) + [ID["left"], ID[EOS]] + [-100] * fill
    assert batch["attention_mask"][1].tolist() == [1] * len(short) + [0] * fill


def test_captions_are_learned_whole_and_without_a_prompt():
    batch = tiny_processor().for_align([" a red cat\n", "dog"], [picture(), picture()])
    assert batch["input_ids"].tolist() == [words(f"a red cat {EOS}"), [*words(f"dog {EOS}"), ID[EOS], ID[EOS]]]
    assert batch["labels"].tolist() == [words(f"a red cat {EOS}"), [*words(f"dog {EOS}"), -100, -100]]
    assert batch["attention_mask"].sum(1).tolist() == [4, 2]
    cut = tiny_processor().for_align("a red cat", max_text_tokens=2)
    assert cut["labels"].tolist() == [words("a red")]


def test_every_tower_has_its_own_normalisation():
    processor, image = tiny_processor(), picture()
    batch = processor("what ?", images=image)
    assert batch["pixel_values"].shape == (1, 2, 3, SIZE, SIZE)
    raw = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    means, stds = ([0.485, 0.456, 0.406], [0.5] * 3), ([0.229, 0.224, 0.225], [0.5] * 3)
    for tower in range(2):
        expected = torch.from_numpy((raw - np.float32(means[tower])) / np.float32(stds[tower])).permute(2, 0, 1)
        torch.testing.assert_close(batch["pixel_values"][0, tower], expected)


def test_the_other_transforms_keep_the_aspect():
    image = Image.new("RGB", (40, 20), (255, 0, 0))
    image.paste((0, 0, 255), (0, 0, 10, 20))  # a quarter on the left is blue
    box = image_to_tower(image, 8, (0.5, 0.25, 0.5), (1, 1, 1), "letterbox")
    # the mean colour of each channel, give or take the ringing of a bicubic edge
    assert torch.allclose(box[:, 0, 4], torch.tensor([127 / 255 - 0.5, 63 / 255 - 0.25, 127 / 255 - 0.5]), atol=0.02)
    assert box[:, 4, 6].tolist() == [0.5, -0.25, -0.5]
    crop = image_to_tower(image, 8, (0, 0, 0), (1, 1, 1), "resize-crop")
    assert crop.shape == (3, 8, 8)
    assert bool((crop[0, :, 1:] > 0.9).all())  # the blue quarter is cut off
    naive = image_to_tower(image, 8, (0, 0, 0), (1, 1, 1))
    assert min(naive[2, 4, 0], naive[0, 4, 4]) > 0.9


def test_batches_for_generate():
    processor, model = tiny_processor(), tiny_model(torch.float32)
    batch = processor(["what is here ?", "why ?", TALK[:3]], images=[picture(), None, picture(seed=1)])
    assert batch["has_image"].tolist() == [True, False, True]
    assert batch["attention_mask"].sum(1).tolist() == [len(words("".join(processor.render(t)))) for t in (
        "what is here ?", "why ?", TALK[:3])]  # fmt: skip
    assert batch["input_ids"][:, -1].tolist() == [ID["<|assistant|>"]] * 3
    out = model.generate(**batch, max_new_tokens=4, do_sample=False)
    one = processor("why ?")
    assert "pixel_values" not in one
    alone = model.generate(**one, max_new_tokens=4, do_sample=False)[0, one["input_ids"].shape[1] :]
    assert torch.equal(out[1, batch["input_ids"].shape[1] :][: len(alone)], alone)


def test_saved_and_loaded(tmp_path):
    processor = tiny_processor(strategy="letterbox")
    processor.save_pretrained(tmp_path)
    again = MLMambaProcessor.from_pretrained(tmp_path)
    assert (again.strategy, again.image_size) == ("letterbox", SIZE)
    assert (again.image_mean, again.image_std) == (processor.image_mean, processor.image_std)
    a, b = processor("why ?", images=picture()), again("why ?", images=picture())
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p(), "got none"),
        (lambda p: p([{"role": "system", "content": "a"}]), "no system turn"),
        (lambda p: p([TALK[0], TALK[2]]), "alternating"),
        (lambda p: p([TALK[:2]]), "end with the user"),
        (lambda p: p("what ?", images=[picture(), picture()]), "one per text"),
        (lambda p: p(["what ?"], images=[[picture(), picture()]]), "one image at most; got 2"),
        (lambda p: p("whta ?"), "Did you mean 'what'"),
        (lambda p: p("what ?", max_length=3), "max_length = 3"),
        (lambda p: p("what ?", images=b"no image"), "readable image"),
        (lambda p: p.for_sft("what is ?", "a", max_text_tokens=4), "within max_text_tokens"),
        (lambda p: p.for_sft([TALK[:1]]), "hold an answer"),
        (lambda p: p.for_sft(["what ?"], ["a", "b"]), "one per text"),
        (lambda p: p.for_align([TALK]), "captions must be texts"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(DataError, match=message):
        call(tiny_processor())


def test_bad_settings():
    with pytest.raises(ConfigError, match="Did you mean 'letterbox'"):
        tiny_processor(strategy="leterbox")
    with pytest.raises(ConfigError, match="end token"):
        MLMambaProcessor(build_word_tokenizer(["<pad>", "<unk>"], eos_token=None))
    with pytest.raises(ConfigError, match="one entry per tower"):
        tiny_processor(image_mean=[[0.5] * 3])
    with pytest.raises(ConfigError, match="return_tensors"):
        tiny_processor()("why ?", return_tensors="np")
