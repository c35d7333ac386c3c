"""Tiny random vision-language models and the prompts a processor would make for them."""

import torch
from transformers import (
    CLIPVisionConfig,
    GemmaConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    SiglipVisionConfig,
)

IMAGE, PAD, VOCAB = 60, 0, 64
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
PIXELS = {"image_size": 32, "patch_size": 8}
TEXT = {**SIZES, "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 512, "pad_token_id": PAD}


def stir(model):
    """Weights large enough that attention is not flat, in eval mode."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.25 if parameter.ndim > 1 else 0.5))
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    return model.eval()


def llava(tower="clip", text_layers=3, **overrides):
    """16 patches an image; a CLIP tower with [CLS], or a SigLIP tower without."""
    vision = (CLIPVisionConfig if tower == "clip" else SiglipVisionConfig)(
        **{**SIZES, **PIXELS, "num_hidden_layers": 4}
    )
    settings = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default" if tower == "clip" else "full"}
    text = LlamaConfig(**{**TEXT, "num_hidden_layers": text_layers})
    return stir(
        LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config=vision,
                text_config=text,
                **{"image_token_index": IMAGE, "image_seq_length": 16, **settings, **overrides},
            )
        )
    )


def llava_next(text_layers=3, **overrides):
    """A base crop and two tiles of 16 patches."""
    vision = CLIPVisionConfig(**{**SIZES, **PIXELS, "num_hidden_layers": 4})
    points = [[32, 64], [64, 32]]
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=LlamaConfig(**{**TEXT, "num_hidden_layers": text_layers}),
        image_token_index=IMAGE,
        image_grid_pinpoints=points,
        **overrides,
    )
    return stir(LlavaNextForConditionalGeneration(config))


def paligemma():
    """A SigLIP tower whose normed last state is projected."""
    vision = SiglipVisionConfig(**{**SIZES, **PIXELS, "vision_use_head": False, "projection_dim": 32})
    text = GemmaConfig(**{**TEXT, "head_dim": 8})
    config = PaliGemmaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, projection_dim=32, vocab_size=VOCAB
    )
    return stir(PaliGemmaForConditionalGeneration(config))


def batch(rows, *, side="left", tokens=16, seed=0):
    """Rows of text ids and "<image>" marks to padded ids, mask and pixels, as a processor makes them."""
    ids = [[t for part in row for t in ([IMAGE] * tokens if part == "<image>" else [part])] for row in rows]
    width = max(map(len, ids))
    pad = [[PAD] * (width - len(row)) for row in ids]
    full = [p + row if side == "left" else row + p for p, row in zip(pad, ids, strict=True)]
    ones = [
        [0] * len(p) + [1] * len(row) if side == "left" else [1] * len(row) + [0] * len(p)
        for p, row in zip(pad, ids, strict=True)
    ]
    images = sum(part == "<image>" for row in rows for part in row)
    made = {"input_ids": torch.tensor(full), "attention_mask": torch.tensor(ones)}
    if images:
        made["pixel_values"] = torch.randn(images, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return made
