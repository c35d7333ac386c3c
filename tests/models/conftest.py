"""Tiny models of every kind, with weights large enough that a wrong mask or state cannot hide in rounding."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from mmkernels.models.mmmamba import MMMambaConfig, MMMambaForConditionalGeneration, layer_types_keeping

LAYERS = 4
KINDS: dict[str, tuple[int, ...]] = {"teacher": (0, 1, 2, 3), "linear": (), "hybrid": (0, 3), "linear_first": (2,)}
SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_embedding_layers": 1,
    "num_hidden_layers": LAYERS - 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "image_size": 8,
    "patch_size": 2,
    "image_token_id": 49,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,  # no early end: generated rows stay comparable
}


def build_config(kind: str = "hybrid", **overrides: Any) -> MMMambaConfig:
    return MMMambaConfig(**{**SIZES, "layer_types": layer_types_keeping(LAYERS, KINDS[kind]), **overrides})


def liven(model: torch.nn.Module) -> None:
    """Leave the start-up regime: attention that differs by position, steps and decays that differ by token and head."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32).to(parameter.dtype)
            if name.endswith(("dt_bias", "A_log_bias", "D", "bias", "g_norm.weight")):
                parameter.add_(0.5 * noise)
            elif "conv1d" in name or "in_proj" in name:
                parameter.add_(0.3 * noise)
            elif parameter.ndim >= 2:
                parameter.copy_(noise * 1.5 / parameter[0].numel() ** 0.5)
            else:
                parameter.add_(0.1 * noise)


def build_model(
    kind: str = "hybrid", dtype: torch.dtype = torch.float64, **overrides: Any
) -> MMMambaForConditionalGeneration:
    torch.manual_seed(0)
    model = MMMambaForConditionalGeneration(build_config(kind, **overrides)).to(dtype).eval()
    liven(model)
    return model


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors lose more to waiting threads than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=sorted(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., MMMambaConfig]:
    """tiny_config(kind, **overrides)."""
    return build_config


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., MMMambaForConditionalGeneration]:
    """tiny_model(kind, dtype, **overrides), livened and in eval mode."""
    return build_model
