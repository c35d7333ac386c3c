"""A tiny ML-Mamba, its towers, word tokenizer and processor, shared by the tests."""

from typing import Any

import torch
from conftest import liven
from transformers import CLIPVisionConfig, Dinov2WithRegistersConfig, SiglipVisionConfig, ViTConfig

from mmkernels.models.common.word_tokenizer import build_word_tokenizer
from mmkernels.models.mamba2 import Mamba2LMConfig
from mmkernels.models.ml_mamba import MLMambaConfig, MLMambaForConditionalGeneration, MLMambaProcessor

EOS = "<|endoftext|>"
WORDS = [EOS, "<unk>", "<|user|>", "<|assistant|>", "what", "is", "here", "?", "a", "red", "cat", "dog", "left", "why"]
ID = {word: index for index, word in enumerate(WORDS)}
SIZE, GRID, TOKENS = 14, 3, 9  # 14 pixels hold 3 whole patches of 4, as 384 hold 27 of 14


def dinov2(**overrides: Any) -> Dinov2WithRegistersConfig:
    """Released for 20 pixels, a table of 5 x 5 positions."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "num_register_tokens": 2}
    return Dinov2WithRegistersConfig(**{**sizes, "image_size": 20, "patch_size": 4, **overrides})


def siglip(**overrides: Any) -> SiglipVisionConfig:
    sizes = {"hidden_size": 24, "intermediate_size": 30, "num_hidden_layers": 3, "num_attention_heads": 2}
    return SiglipVisionConfig(**{**sizes, "image_size": SIZE, "patch_size": 4, "vision_use_head": False, **overrides})


def clip(**overrides: Any) -> CLIPVisionConfig:
    sizes = {"hidden_size": 24, "intermediate_size": 30, "num_hidden_layers": 3, "num_attention_heads": 2}
    return CLIPVisionConfig(**{**sizes, "image_size": SIZE, "patch_size": 4, **overrides})


def vit(**overrides: Any) -> ViTConfig:
    sizes = {"hidden_size": 24, "intermediate_size": 30, "num_hidden_layers": 3, "num_attention_heads": 2}
    return ViTConfig(**{**sizes, "image_size": SIZE, "patch_size": 4, **overrides})


def text(**overrides: Any) -> Mamba2LMConfig:
    """More rows than words, as the released table has."""
    sizes = {"vocab_size": len(WORDS), "hidden_size": 32, "num_hidden_layers": 2, "head_dim": 8, "state_size": 6}
    return Mamba2LMConfig(**{**sizes, **overrides})


def tiny_config(lm: dict[str, Any] | None = None, **overrides: Any) -> MLMambaConfig:
    settings = {"vision_config": dinov2(), "second_vision_config": siglip(), "image_size": SIZE}
    settings |= {"connector_state_size": 6, "connector_head_dim": 8}
    return MLMambaConfig(text_config=text(**(lm or {})), **{**settings, **overrides})


def tiny_model(
    dtype: torch.dtype = torch.float64, lm: dict[str, Any] | None = None, **overrides: Any
) -> MLMambaForConditionalGeneration:
    """In eval mode, with weights large enough that a wrong state or order cannot hide in rounding."""
    torch.manual_seed(0)
    model = MLMambaForConditionalGeneration(tiny_config(lm, **overrides)).eval()
    liven(model)
    return model.to(dtype)


def tiny_processor(**settings: Any) -> MLMambaProcessor:
    tokenizer = build_word_tokenizer(WORDS, pad_token=EOS, eos_token=EOS)
    return MLMambaProcessor.from_config(tokenizer, tiny_config(), **settings)


def pixels(count: int = 1, seed: int = 0, dtype: torch.dtype = torch.float64, towers: int = 2) -> torch.Tensor:
    shape = (count, towers, 3, SIZE, SIZE)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tokens(batch: int, seqlen: int, seed: int = 0) -> torch.Tensor:
    """Ids without the end token, which would stop generation."""
    return torch.randint(1, len(WORDS), (batch, seqlen), generator=torch.Generator().manual_seed(seed))
