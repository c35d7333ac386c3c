"""A tiny ML-Mamba: linear patches, one of the connectors, two Mamba-2 blocks."""

from typing import Any

import torch

from mmkernels.demo.ml_mamba.arms import Arm
from mmkernels.demo.ml_mamba.talk import CanvasTalk

_WIDTH = 64
_INITIALIZER_RANGE = 0.05  # a common 0.02 is made for models ten times as wide


def tiny_ml_mamba(talk: CanvasTalk, arm: Arm, seed: int) -> Any:
    """A fresh model whose tower is trained with its connector; the same for every arm but for the connector.

    Args:
        talk: tells words, cells and pixels.
        arm: the connector.
        seed: of the weights.
    """
    from mmkernels.models.mamba2 import Mamba2LMConfig
    from mmkernels.models.ml_mamba import MLMambaConfig, MLMambaForConditionalGeneration, PatchVisionConfig

    task = talk.task
    text = Mamba2LMConfig(
        vocab_size=len(talk.words),
        hidden_size=_WIDTH,
        num_hidden_layers=2,
        head_dim=32,
        state_size=32,
        initializer_range=_INITIALIZER_RANGE,
    )
    patches = PatchVisionConfig(
        hidden_size=_WIDTH,
        image_size=task.image_size,
        patch_size=task.cell // task.tokens_per_cell,
        num_channels=task.channels,
    )
    torch.manual_seed(seed)
    config = MLMambaConfig(
        text_config=text,
        vision_config=patches,
        image_size=task.image_size,
        connector_variant=arm.variant,
        connector_scan=arm.scan,
        connector_state_size=16,
        connector_head_dim=32,
        freeze_vision=False,
    )
    return MLMambaForConditionalGeneration(config)


def processor_of(talk: CanvasTalk, model: Any) -> Any:
    """The processor that makes of a canvas file what the model is trained on."""
    from mmkernels.models.ml_mamba import MLMambaProcessor

    mean, std = _pixel_statistics(talk)
    return MLMambaProcessor.from_config(talk.tokenizer(), model.config, image_mean=[[mean]], image_std=[[std]])


def _pixel_statistics(talk: CanvasTalk) -> tuple[float, float]:
    """Mean and deviation of the pixels of some training canvases.

    Canvases are dark: with the usual 0.5 and 0.5 a patch is mostly a constant, and the Advanced connector, whose mixers
    read features that no norm has centred, had not begun to learn after 300 steps.
    """
    images = talk.batch(0, 256)["images"]
    return round(float(images.mean()), 3), round(float(images.std()), 3)


def pixel_values(images: torch.Tensor, processor: Any) -> torch.Tensor:
    """(batch, 1, height, width) in [0, 1] to what the model reads: one tower, normalised as the processor does."""
    mean, std = torch.tensor(processor.image_mean[0]), torch.tensor(processor.image_std[0])
    return ((images - mean[:, None, None]) / std[:, None, None])[:, None]
