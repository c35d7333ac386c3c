"""The vision side: one or two frozen towers, one layer before their last, patches only, channels side by side.

Source: ML-Mamba (arXiv 2407.19832, section 3.2) and its released code, which puts DINOv2's channels first.
"""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import (
    CLIPVisionModel,
    Dinov2Model,
    Dinov2WithRegistersModel,
    PreTrainedModel,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput

from mmkernels.errors import ConfigError, ShapeError, nearest
from mmkernels.models.ml_mamba.configuration_ml_mamba import MLMambaConfig, PatchVisionConfig, prefix_tokens

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
NORMALISATION = {
    "dinov2": IMAGENET,
    "dinov2_with_registers": IMAGENET,
    "siglip_vision_model": HALF,
    "clip_vision_model": OPENAI_CLIP,
    "vit": HALF,  # of those pretrained on ImageNet-21k
    PatchVisionConfig.model_type: HALF,
}


class PatchVisionModel(PreTrainedModel):
    """One linear map of each patch; its output is its only hidden state."""

    config_class = PatchVisionConfig
    main_input_name = "pixel_values"

    def __init__(self, config: PatchVisionConfig):
        super().__init__(config)
        self.patch_embedding = nn.Linear(config.num_channels * config.patch_size**2, config.hidden_size)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):  # pixels of a patch rise and fall together: the usual 1/sqrt(n) is too small
            init.normal_(module.weight, mean=0.0, std=module.in_features**-0.5)
            init.zeros_(module.bias)

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutput:
        """(images, channels, size, size) -> patches (images, rows * columns, hidden_size), row by row."""
        size = self.config.patch_size
        rows, columns = pixel_values.shape[-2] // size, pixel_values.shape[-1] // size
        whole = pixel_values[..., : rows * size, : columns * size]
        patches = rearrange(whole, "b c (r y) (s x) -> b (r s) (c y x)", y=size, x=size)
        hidden = self.patch_embedding(patches)
        return BaseModelOutput(last_hidden_state=hidden, hidden_states=(hidden,))


class UnpooledViTModel(ViTModel):
    """A ViT without the pooler of its class token, which nobody reads."""

    def __init__(self, config: ViTConfig):
        super().__init__(config, add_pooling_layer=False)


TOWERS: dict[str, Any] = {
    "dinov2": Dinov2Model,
    "dinov2_with_registers": Dinov2WithRegistersModel,
    "siglip_vision_model": SiglipVisionModel,
    "clip_vision_model": CLIPVisionModel,
    "vit": UnpooledViTModel,
    PatchVisionConfig.model_type: PatchVisionModel,
}


def build_tower(config: Any) -> Any:
    """A tower of transformers for a configuration.

    Raises:
        ConfigError: a model type whose tokens and normalisation are not known here.
    """
    if config.model_type not in TOWERS:
        raise ConfigError(
            f"MLMamba: a tower's model_type must be known; got {config.model_type!r}. "
            f"{nearest(config.model_type, TOWERS)}"
        )
    return TOWERS[config.model_type](config)


class FusedVisionTower(nn.Module):
    """Patches of one image through every tower: (images, patches, channels of all towers).

    F = [h_1^{(n_1 - 2)} | h_2^{(n_2 - 2)}]: the output of each tower's block before the last (counted from 0), without
    a final norm, class and register tokens dropped, channels side by side in the towers' order.

    Args:
        config: which towers, and whether they are frozen.
    """

    def __init__(self, config: MLMambaConfig):
        super().__init__()
        self.frozen, self.grid = config.freeze_vision, config.grid
        self.size, self.channels = config.image_size, [int(tower.num_channels) for tower in config.towers]
        self.prefixes = [prefix_tokens(tower) for tower in config.towers]
        self.towers = nn.ModuleList(build_tower(tower) for tower in config.towers)

    def train(self, mode: bool = True) -> "FusedVisionTower":
        """Frozen towers stay in evaluation mode."""
        return super().train(mode and not self.frozen)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Features and a summary of each image.

        Args:
            pixel_values: (images, towers, channels, size, size), each tower's own normalisation.

        Returns:
            features (images, rows * columns, width), row by row; scores (images, rows * columns) float32: how alike a
            patch and its image are, the mean over towers of the cosine with the tower's class token of the same layer,
            or with the mean patch where there is none.

        Raises:
            ShapeError: other sizes than the configuration's.
        """
        expected = (len(self.towers), self.channels[0], self.size, self.size)
        if pixel_values.ndim != 5 or tuple(pixel_values.shape[1:]) != expected:
            raise ShapeError(
                f"MLMamba: pixel_values must have shape (images, {', '.join(map(str, expected))}): towers, channels, "
                f"height, width; got {tuple(pixel_values.shape)}. Let MLMambaProcessor make them."
            )
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            states = [self._hidden(i, pixel_values[:, i]) for i in range(len(self.towers))]
            patches = [state[:, prefix:] for state, prefix in zip(states, self.prefixes, strict=True)]
            scores = [
                _alikeness(part, state[:, :1] if prefix else part.mean(1, keepdim=True))
                for part, state, prefix in zip(patches, states, self.prefixes, strict=True)
            ]
            return torch.cat(patches, -1), torch.stack(scores).mean(0)

    def _hidden(self, index: int, pixels: Tensor) -> Tensor:
        """All tokens of a tower after its block before the last."""
        tower: Any = self.towers[index]
        states = tower(pixels.to(tower.dtype), output_hidden_states=True).hidden_states
        # states[0] enters block 0, states[i + 1] leaves block i; a tower without blocks has one state only
        hidden = states[-2] if len(states) > 1 else states[0]
        tokens = self.prefixes[index] + self.grid[0] * self.grid[1]
        if hidden.shape[1] != tokens:
            raise ShapeError(
                f"MLMamba: tower {index} must give {tokens} tokens; got {hidden.shape[1]}. Its configuration does not "
                "belong to image_size."
            )
        return hidden


def _alikeness(patches: Tensor, summary: Tensor) -> Tensor:
    return nn.functional.cosine_similarity(patches.detach().float(), summary.detach().float(), dim=-1)
