"""The prompt to the letter, pixels by the formula, labels by the rules, batches against single calls, refusals."""

import numpy as np
import pytest
import torch
from aki_tiny import (
    EOS,
    ID,
    IMAGE,
    LATENTS,
    PAD,
    SIZE,
    TAG,
    ids,
    tiny_config,
    tiny_model,
    tiny_processor,
    tiny_tokenizer,
)
from PIL import Image
from transformers import AutoProcessor

from mmkernels import build_mutual_spans, mma_mask
from mmkernels.errors import ConfigError, DataError
from mmkernels.models.aki import AkiProcessor, expand_placeholders, image_to_pixels
from mmkernels.models.aki.processing_aki import SYSTEM


def picture(width=12, height=10, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.fixture
def processor():
    return tiny_processor()


def test_pixels_by_the_formula():
    """Antialiased bicubic resize without keeping the aspect, then (x / 255 - 0.5) / 0.5."""
    image = picture(40, 21)
    found = image_to_pixels(image, 16)
    assert found.shape == (3, 16, 16)
    assert found.dtype == torch.float32
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].double()
    resized = torch.nn.functional.interpolate(values, (16, 16), mode="bicubic", antialias=True)[0].clamp(0, 255)
    # PIL rounds to whole numbers after each of its two passes: at most one level of 255, twice that after / 0.5
    assert (found - (resized / 255 - 0.5) / 0.5).abs().max() < 2 / 255 + 1e-6
    white = image_to_pixels(Image.new("RGB", (3, 3), "white"), 4)
    assert torch.equal(white, torch.ones(3, 4, 4))
    black = image_to_pixels(Image.new("L", (3, 3), 0), 4, mean=0.25, std=0.5)
    assert torch.equal(black, torch.full((3, 4, 4), -0.5))


def test_the_released_prompt(processor):
    """As described for the released checkpoint, with Phi-3's line breaks."""
    full = AkiProcessor(tiny_tokenizer())
    assert full.render("what ?", 1) == (
        f"<s> <|system|>\n{SYSTEM}<|end|>\n<|user|>\n<image>\nwhat ?<|end|>\n<|assistant|>\n"
    )
    assert processor.render("what ?", 2).count("<image>\n") == 2
    marked = processor.render([{"role": "user", "content": "a <image> ?"}], 1)
    assert marked == "<s> <|system|>\nbe kind<|end|>\n<|user|>\na <image> ?<|end|>\n<|assistant|>\n"
    turns = [
        {"role": "system", "content": "be"},
        {"role": "user", "content": "what ?"},
        {"role": "assistant", "content": "a cat"},
        {"role": "user", "content": "is ?"},
    ]
    assert processor.render(turns, 1) == (
        "<s> <|system|>\nbe<|end|>\n<|user|>\n<image>\nwhat ?<|end|>\n<|assistant|>\na cat<|end|>\n"
        "<|user|>\nis ?<|end|>\n<|assistant|>\n"
    )
    assert tiny_processor(system_message=None).render("is ?") == "<s> <|user|>\nis ?<|end|>\n<|assistant|>\n"
    assert tiny_processor(chat=False).render("is ?", 1) == "<image>\nis ? <|assistant|>"


def test_golden_expansion():
    """The 10 ids of the specification become 12 positions, whose mask keeps 87 pairs."""
    found = expand_placeholders([1, 90, 20, 91, 9, 21, 22, 3, 30, 2], 9, 3)
    assert found == [1, 90, 20, 91, 9, 9, 9, 21, 22, 3, 30, 2]
    spans = build_mutual_spans(torch.tensor([found]), image_token_id=9, prompt_end_token_id=3)
    assert spans.tolist() == [[0, 4, 7, 7, 10]]
    assert int(mma_mask(12, spans=spans).dense().sum()) == 87


def test_batches_are_single_calls_with_padding_on_the_left(processor):
    texts = ["what is here ?", "is ?", [{"role": "user", "content": "a <image> <image> ?"}]]
    images = [picture(), None, [picture(seed=1), picture(seed=2)]]
    batch = processor(texts, images)
    assert batch["pixel_values"].shape == (3, 3, SIZE, SIZE)
    at = 0
    for row, (text, image) in enumerate(zip(texts, images, strict=True)):
        alone = processor(text, image)
        length = alone["input_ids"].shape[1]
        assert torch.equal(batch["input_ids"][row, -length:], alone["input_ids"][0])
        assert (batch["input_ids"][row, :-length] == PAD).all()
        assert batch["attention_mask"][row].tolist() == [0] * (batch["input_ids"].shape[1] - length) + [1] * length
        own = alone.get("pixel_values", torch.empty(0, 3, SIZE, SIZE))
        assert torch.equal(batch["pixel_values"][at : at + len(own)], own)
        assert int((alone["input_ids"] == IMAGE).sum()) == LATENTS * len(own)
        at += len(own)
    assert "pixel_values" not in processor("is ?")
    expected = "<s> <|system|> be kind <|end|> <|user|> <image> is ? <|end|> <|assistant|>"
    assert processor("is ?", picture())["input_ids"][0].tolist() == ids(expected)


def test_the_model_answers_what_the_processor_makes(processor):
    model = tiny_model()
    inputs = processor(["what is shown ?", "is ?"], [picture(), None])
    answer = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert answer.shape[0] == 2
    assert torch.equal(answer[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])


def test_labels_of_sft_follow_the_tag(processor):
    batch = processor.for_sft(["what ?", "is ?"], ["a red cat", "dog"], [picture(), None])
    prompt = ids("<s> <|system|> be kind <|end|> <|user|> <image> what ? <|end|> <|assistant|>")
    answer = [*ids("a red cat"), EOS]
    assert batch["input_ids"][0].tolist() == prompt + answer
    assert batch["labels"][0].tolist() == [-100] * len(prompt) + answer
    assert batch["labels"][1].tolist().count(-100) == batch["labels"].shape[1] - 2  # "dog" and the end
    real = batch["attention_mask"][1].sum()
    assert batch["attention_mask"][1, :real].all()  # padded on the right
    assert (batch["labels"][1, real:] == -100).all()
    assert prompt[-1] == TAG  # the first target is the token after the tag
    model = tiny_model().train()
    assert torch.isfinite(model(**batch).loss)
    turns = [
        {"role": "user", "content": "what ?"},
        {"role": "assistant", "content": "a cat"},
        {"role": "user", "content": "is ?"},
    ]
    later = processor.for_sft([turns], ["a dog"], [picture()])
    assert later["labels"][0][later["labels"][0] != -100].tolist() == [*ids("a dog"), EOS]


def test_labels_of_pretraining_are_all_text(processor):
    batch = processor.for_pretraining(["a red cat", "dog"], [picture(), picture(seed=1)])
    row = [ID["<s>"], *ids("<image> a red cat <|endofchunk|>"), EOS]
    assert batch["input_ids"][0].tolist() == row
    assert batch["labels"][0].tolist() == [-100 if token == IMAGE else token for token in row]
    real = int(batch["attention_mask"][1].sum())
    assert (batch["labels"][1, real:] == -100).all()
    model = tiny_model().train()
    expected = tiny_model(policy="none").train()(**batch).loss
    assert torch.equal(model(**batch).loss, expected)  # causal by construction


def test_long_answers_lose_their_end_and_long_prompts_are_refused(processor):
    prompt = processor("what ?", picture())["input_ids"].shape[1] - LATENTS + 1  # an image counts as one token
    batch = processor.for_sft("what ?", "a red cat", picture(), max_text_tokens=prompt + 2)
    assert batch["labels"][0][batch["labels"][0] != -100].tolist() == ids("a red")
    for most in (prompt, prompt - 3, 5):
        with pytest.raises(DataError, match="room for an answer"):
            processor.for_sft("what ?", "a red cat", picture(), max_text_tokens=most)
    cut = processor.for_pretraining("a red cat", picture(), max_text_tokens=4)
    assert cut["input_ids"][0].tolist() == [ID["<s>"], *ids("<image> a red")]
    with pytest.raises(DataError, match="room for a caption"):
        processor.for_pretraining("a red cat", picture(), max_text_tokens=1)
    with pytest.raises(DataError, match="max_length"):
        processor("what ?", picture(), max_length=5)


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda p: p("what <image> ?"), DataError, "1 '<image>' and 0 images"),
        (lambda p: p("what <image> ?", [picture(), picture()]), DataError, "1 '<image>' and 2 images"),
        (lambda p: p("what <|assistant|> ?"), DataError, "ends what images read"),
        (lambda p: p("what", b"no image"), DataError, "readable image"),
        (lambda p: p(["what", "is"], [picture()]), DataError, "one entry per text"),
        (lambda p: p([]), DataError, "text must be"),
        (lambda p: p([{"role": "human", "content": "what"}]), DataError, "role"),
        (lambda p: p("whot ?"), DataError, "what"),
        (lambda p: p("what", return_tensors="np"), ConfigError, "return_tensors"),
        (lambda p: p.for_sft(["what"], ["a", "dog"]), DataError, "one per text"),
        (lambda p: p.for_sft("what", "a <image>"), DataError, "must not hold"),
        (lambda p: p.for_pretraining("a <|endofchunk|>"), DataError, "must not hold"),
    ],
)
def test_bad_input_is_named(processor, call, error, named):
    with pytest.raises(error, match=named):
        call(processor)


def test_tokenizers_without_the_special_words():
    tokenizer = tiny_tokenizer()
    with pytest.raises(ConfigError, match="image_token"):
        AkiProcessor(tokenizer, image_token="<img>")
    tokenizer.pad_token = None
    with pytest.raises(ConfigError, match="padding"):
        AkiProcessor(tokenizer)


def test_from_config_and_from_a_folder(tmp_path):
    processor = AkiProcessor.from_config(tiny_tokenizer(), tiny_config(), system_message="be kind")
    assert (processor.image_size, processor.num_vision_tokens, processor.image_token) == (SIZE, LATENTS, "<image>")
    processor.save_pretrained(tmp_path)
    tiny_config().save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    one, two = (p("what ?", picture()) for p in (processor, loaded))
    assert torch.equal(one["input_ids"], two["input_ids"])
    assert torch.equal(one["pixel_values"], two["pixel_values"])
    assert loaded.system_message == "be kind"
