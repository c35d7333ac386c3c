"""LLaVA-1.5 with VTC-CLS: the golden cases, full-size parameter counts, both official layouts, evaluation."""

import copy
import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

import mmkernels
from mmkernels.errors import CheckpointError, ConfigError, DataError, ShapeError
from mmkernels.models.common.word_tokenizer import build_word_tokenizer
from mmkernels.models.vtc_cls import (
    VTCCLSConfig,
    VTCCLSForConditionalGeneration,
    convert_checkpoint,
    load_checkpoint,
)
from mmkernels.models.vtc_cls.convert_vtc_cls import our_shapes, their_name
from mmkernels.models.vtc_cls.evaluate import is_right, load_recipe, main, read_questions

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
WORDS = ["<unk>", "<s>", "</s>", "USER:", "ASSISTANT:", "is", "there", "a", "cat", "dog", "?", "yes", "no", "what"]
IMAGE, PAD, EOS = len(WORDS), len(WORDS) + 1, 2


def tiny(**overrides):
    vision = CLIPVisionConfig(**SIZES, num_hidden_layers=4, image_size=32, patch_size=8)
    text = LlamaConfig(**SIZES, num_hidden_layers=2, vocab_size=64, pad_token_id=PAD)
    settings = {"image_token_index": IMAGE, "image_seq_length": 16, "num_keep": 5, "num_layers": 2}
    return VTCCLSConfig(vision_config=vision, text_config=text, **{**settings, **overrides})


def stirred(config, kind=VTCCLSForConditionalGeneration):
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.fixture(scope="module")
def model():
    return stirred(tiny())


def inputs(images=2):
    ids = [[1, 3, *[IMAGE] * 16, 5, 6, 7, 8, 10, 4]] * images
    return {"input_ids": torch.tensor(ids), "pixel_values": torch.randn(images, 3, 32, 32)}


def test_sizes_of_the_defaults_are_llava_1_5_7b():
    shapes = our_shapes(VTCCLSConfig())
    count = {
        part: sum(torch.Size(s).numel() for name, s in shapes.items() if name.startswith(part))
        for part in ("model.vision_tower.", "model.multi_modal_projector.", "model.language_model.", "lm_head.")
    }
    # CLIP ViT-L/14-336; 1024 -> 4096 -> 4096; Vicuna-7B with 64 more rows in both tables
    assert count["model.vision_tower."] == 303_507_456
    assert count["model.multi_modal_projector."] == 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    assert count["model.language_model."] + count["lm_head."] == 6_738_415_616 + 2 * 64 * 4096
    names = {their_name(name, "liuhaotian") for name in shapes}
    assert {
        "model.embed_tokens.weight",
        "model.layers.31.mlp.down_proj.weight",
        "model.mm_projector.0.weight",
        "model.mm_projector.2.bias",
        "model.vision_tower.vision_tower.vision_model.pre_layrnorm.weight",
        "lm_head.weight",
    } <= names
    names = {their_name(name, "llava-hf") for name in shapes}
    assert {
        "language_model.model.layers.0.self_attn.q_proj.weight",
        "language_model.lm_head.weight",
        "multi_modal_projector.linear_2.weight",
        "vision_tower.vision_model.encoder.layers.23.self_attn.k_proj.bias",
        "vision_tower.vision_model.embeddings.class_embedding",
    } <= names


def test_golden_choices():
    scores = torch.tensor([[0.1, 0.4, 0.4, 0.05, 0.3, 0.4]])
    for k, kept in ((2, [1, 2]), (3, [1, 2, 5]), (4, [1, 2, 4, 5]), (1, [1])):
        assert mmkernels.prune_tokens(torch.zeros(1, 6, 2), scores, num_keep=k).keep_indices[0].tolist() == kept


@torch.no_grad()
def test_golden_scores(model):
    """Rows of a real tower: a zero query is uniform over N + 1 keys, and each layer's sum is 1 - p(CLS -> CLS)."""
    flat = copy.deepcopy(model)
    for layer in flat.model.vision_tower.encoder.layers:
        layer.self_attn.q_proj.weight.zero_()
        layer.self_attn.q_proj.bias.zero_()
    from mmkernels.interop.prune_tower import vit
    from mmkernels.pruning.pruner import Tap

    taps, pixels = (Tap(1, "cls_row"), Tap(2, "cls_row")), inputs()["pixel_values"]
    rows = vit(flat.model.vision_tower).run(pixels, num_tokens=16, layers=(2,), taps=taps).taps
    total = sum(rows[tap] for tap in taps)
    torch.testing.assert_close(total, torch.full((2, 16), 2 / 17))
    torch.testing.assert_close(total.sum(-1), torch.full((2,), 2 * 16 / 17))
    rows = vit(model.model.vision_tower).run(pixels, num_tokens=16, layers=(2,), taps=taps).taps
    eager = copy.deepcopy(model.model.vision_tower)
    eager.set_attn_implementation("eager")
    maps = eager(pixels, output_attentions=True).attentions
    for tap in taps:
        torch.testing.assert_close(rows[tap].sum(-1), 1 - maps[tap.layer].mean(1)[:, 0, 0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_model_is_llava_with_a_pruner_built_in(model, tmp_path):
    given = inputs()
    stock = stirred(tiny(), LlavaForConditionalGeneration)
    stock.load_state_dict(model.state_dict())
    with mmkernels.prune(stock, "vtc_cls", num_keep=5, num_layers=2):
        expected = stock(**given).logits
    assert torch.equal(model(**given).logits, expected)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert type(again) is VTCCLSForConditionalGeneration
    assert again.config.num_keep == 5
    assert torch.equal(again(**given).logits, expected)
    assert torch.equal(copy.deepcopy(again)(**given).logits, expected)
    again.keep_tokens(16)
    assert torch.equal(again(**given).logits, stock(**given).logits)
    again.keep_tokens(None)
    assert torch.equal(again(**given).logits, stock(**given).logits)
    with mmkernels.prune(model, "random", num_keep=3):
        assert model(**given).logits.shape[1] == expected.shape[1] - 2
    with mmkernels.prune(model, "fastv", num_keep=3, layer=1):  # beside the one built in
        assert model(**given).logits.shape[1] == expected.shape[1] - 2
    assert torch.equal(model(**given).logits, expected)
    asked = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    together = model.generate(**given, **asked)
    for i in range(2):
        alone = {name: value[i : i + 1] for name, value in given.items()}
        assert torch.equal(model.generate(**alone, **asked)[0], together[i])


def test_settings_that_do_not_fit():
    with pytest.raises(ConfigError, match=r"lie in 1\.\.16"):
        tiny(num_keep=17)
    with pytest.raises(ConfigError, match="num_layers must be at most 3"):
        VTCCLSForConditionalGeneration(tiny(num_layers=4))
    with pytest.raises(ShapeError, match="got 17"):
        VTCCLSForConditionalGeneration(tiny()).keep_tokens(17)


def official(state, layout, *, rows=None, tower=True):
    """A file of one of the official layouts, as published: float16 tensors, liuhaotian's without the added rows."""
    weights = {their_name(name, layout): value.half() for name, value in state.items()}
    if rows:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            weights[name] = weights[name][:rows].clone()
    return weights if tower else {n: v for n, v in weights.items() if "vision_tower" not in n}


@torch.no_grad()
def test_both_official_layouts_load_strictly_and_come_back(model, tmp_path):
    config, state = model.config, model.state_dict()
    save_file(official(state, "llava-hf"), tmp_path / "hf.safetensors")
    loaded, _ = load_checkpoint(tmp_path / "hf.safetensors", config=config)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name].half()) for name in state)

    split = official(state, "liuhaotian", rows=IMAGE)
    split["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    torch.save(split, tmp_path / "pytorch_model.bin")
    loaded, _ = load_checkpoint(tmp_path, config=config)
    for name, value in loaded.items():
        if name in ("lm_head.weight", "model.language_model.embed_tokens.weight"):
            assert value.shape == state[name].shape
            assert torch.equal(value[:IMAGE], state[name][:IMAGE].half())
            torch.testing.assert_close(value[-1].float(), state[name][:IMAGE].half().float().mean(0), atol=1e-3, rtol=0)
        else:
            assert torch.equal(value, state[name].half())

    save_file(official(state, "liuhaotian", tower=False), tmp_path / "frozen.safetensors")
    clip = {n.replace("model.vision_tower", "vision_model"): v.half() for n, v in state.items() if "vision_tower" in n}
    clip |= {"text_model.final_layer_norm.weight": torch.ones(3), "logit_scale": torch.ones(())}
    clip["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(clip, tmp_path / "clip.safetensors")
    with pytest.raises(ConfigError, match="base must be given"):
        load_checkpoint(tmp_path / "frozen.safetensors", config=config)
    loaded, _ = load_checkpoint(tmp_path / "frozen.safetensors", base=tmp_path / "clip.safetensors", config=config)
    assert all(torch.equal(loaded[name], state[name].half()) for name in state)

    ours = convert_checkpoint(tmp_path / "hf.safetensors", tmp_path / "ours", config=config)
    again = VTCCLSForConditionalGeneration.from_pretrained(ours)
    assert again.dtype == torch.float16
    back = convert_checkpoint(ours, tmp_path / "back", to="llava-hf")
    from safetensors.torch import load_file

    written, first = load_file(back / "model.safetensors"), load_file(tmp_path / "hf.safetensors")
    assert written.keys() == first.keys()
    assert all(torch.equal(written[name], first[name]) for name in first)


def test_wrong_files_are_named(model, tmp_path):
    config, weights = model.config, official(model.state_dict(), "llava-hf")
    del weights["multi_modal_projector.linear_2.bias"]
    weights["language_model.model.layers.9.mlp.up_proj.weight"] = torch.zeros(2)
    weights["language_model.model.norm.weight"] = torch.zeros(5)
    save_file(weights, tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError, match=r"1 missing .*linear_2.bias.*1 unexpected .*layers\.9.*of another shape"):
        load_checkpoint(tmp_path / "bad.safetensors", config=config)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="must be a LLaVA"):
        load_checkpoint(tmp_path / "other.safetensors", config=config)
    with pytest.raises(ConfigError, match="'llava-hf'"):
        convert_checkpoint(tmp_path / "bad.safetensors", tmp_path / "x", to="llava_hf")
    folder = tmp_path / "other_tower"
    folder.mkdir()
    save_file(official(model.state_dict(), "liuhaotian"), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"mm_vision_tower": "google/siglip"}))
    with pytest.raises(ConfigError, match="mm_vision_tower must be"):
        load_checkpoint(folder)


def test_the_evaluation_runs_from_the_command_line(model, tmp_path, capsys):
    tokenizer = build_word_tokenizer(
        [*WORDS, "<image>", "<pad>"],
        bos_token="<s>",
        eos_token="</s>",
        special_tokens=["<image>", "USER:", "ASSISTANT:"],
    )
    tokenizer.pad_token = "<pad>"
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    folder = tmp_path / "model"
    model.generation_config.pad_token_id = PAD
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    from PIL import Image

    rows = []
    for i in range(3):
        Image.new("RGB", (40, 32 + i), (i * 80, 9, 200)).save(tmp_path / f"{i}.png")
        rows.append({"image": f"{i}.png", "question": "is there a cat ?", "answer": ["yes", "no"]})
    data = tmp_path / "questions.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    recipe = tmp_path / "quick.yaml"
    recipe.write_text("name: quick\nbudgets: [null, 4]\nnum_layers: 2\nbatch_size: 2\nmax_new_tokens: 2\n")
    asked = [str(recipe), "--model", str(folder), "--data", str(data), "--out", str(tmp_path / "out")]
    assert main(asked) == 0
    results = json.loads((tmp_path / "out/results.json").read_text())["results"]
    assert [(r["budget"], r["questions"]) for r in results] == [(None, 3), (4, 3)]
    assert "| 4 | 3 |" in capsys.readouterr().out
    data.write_text('{"image": "0.png"}')
    assert main(asked) == 2
    assert "must have image, question and answer" in capsys.readouterr().err
    assert load_recipe("paper").budgets == (None, 256, 128, 64)
    assert is_right("The cat.", ["dog", "cat"])
    assert not is_right("cats", "cat")
    data.write_text("\n")
    with pytest.raises(DataError, match="at least one"):
        read_questions(data)
