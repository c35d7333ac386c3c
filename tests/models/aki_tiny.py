"""A tiny AKI, its word tokenizer and its processor, shared by the tests."""

from typing import Any

import torch
from transformers import Phi3Config, SiglipVisionConfig

from mmkernels.models.aki import AkiConfig, AkiForConditionalGeneration, AkiProcessor
from mmkernels.models.common.word_tokenizer import build_word_tokenizer

# ids as in the released checkpoint's order: base words, then <pad> as the last of them, then the two extra ones
SPECIAL = ["<s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"]
WORDS = ["<unk>", *SPECIAL, "be", "kind", "what", "is", "shown", "here", "?", "a", "cat", "dog", "left", "red", "<pad>"]
BASE = len(WORDS)
VOCAB = [*WORDS, "<image>", "<|endofchunk|>"]
ID = {word: index for index, word in enumerate(VOCAB)}
IMAGE, TAG, PAD, EOS = ID["<image>"], ID["<|assistant|>"], ID["<pad>"], ID["<|endoftext|>"]
LATENTS, SIZE = 3, 8


def tiny_tokenizer() -> Any:
    return build_word_tokenizer(
        VOCAB,
        bos_token="<s>",
        eos_token="<|endoftext|>",
        special_tokens=[*SPECIAL[2:], "<image>", "<|endofchunk|>"],
    )


def tiny_processor(**settings: Any) -> AkiProcessor:
    return AkiProcessor(
        tiny_tokenizer(), **{"image_size": SIZE, "num_vision_tokens": LATENTS, "system_message": "be kind", **settings}
    )


def tiny_config(text: dict[str, Any] | None = None, **overrides: Any) -> AkiConfig:
    """Tables with three rows more than base words, as the released ones have 52."""
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2}
    sizes |= {"vocab_size": BASE + 3, "max_position_embeddings": 64}
    roles = {"pad_token_id": PAD, "bos_token_id": ID["<s>"], "eos_token_id": EOS}
    text_config = Phi3Config(**{**sizes, **roles, **(text or {})})
    vision_config = SiglipVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=SIZE, patch_size=2
    )
    settings: dict[str, Any] = {
        "num_vision_tokens": LATENTS,
        "resampler_depth": 2,
        "resampler_heads": 2,
        "resampler_head_dim": 4,
        "num_base_tokens": BASE,
        "image_token_id": IMAGE,
        "prompt_end_token_id": TAG,
    }
    return AkiConfig(text_config=text_config, vision_config=vision_config, **{**settings, **overrides})


def tiny_model(
    dtype: torch.dtype = torch.float32, text: dict[str, Any] | None = None, implementation: Any = None, **overrides: Any
) -> AkiForConditionalGeneration:
    """In eval mode, with weights large enough that a wrong mask cannot hide in rounding."""
    torch.manual_seed(0)
    config = tiny_config(text, **overrides)
    model = AkiForConditionalGeneration._from_config(config, attn_implementation=implementation).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                parameter.copy_(noise * 1.5 / parameter[0].numel() ** 0.5)
            else:
                parameter.add_(0.2 * noise)
    return model.to(dtype)


def pixels(count: int = 1, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ids(text: str) -> list[int]:
    """Words to ids, <image> expanded."""
    return [i for word in text.split() for i in [ID[word]] * (LATENTS if word == "<image>" else 1)]
