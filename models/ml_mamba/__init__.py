"""ML-Mamba: configuration, model, processor, converter; registered with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from mmkernels.models.ml_mamba.configuration_ml_mamba import (
    ENCODERS,
    MLMambaConfig,
    PatchVisionConfig,
    encoder_configs,
)
from mmkernels.models.ml_mamba.convert_ml_mamba import convert_checkpoint, from_parts, load_checkpoint
from mmkernels.models.ml_mamba.layout_ml_mamba import image_first
from mmkernels.models.ml_mamba.modeling_ml_mamba import MLMambaForConditionalGeneration, MLMambaPreTrainedModel
from mmkernels.models.ml_mamba.processing_ml_mamba import MLMambaProcessor, image_to_tower, zephyr_turn
from mmkernels.models.ml_mamba.vision_ml_mamba import FusedVisionTower, PatchVisionModel

AutoConfig.register(PatchVisionConfig.model_type, PatchVisionConfig)
AutoModel.register(PatchVisionConfig, PatchVisionModel)
AutoConfig.register(MLMambaConfig.model_type, MLMambaConfig)
AutoModel.register(MLMambaConfig, MLMambaForConditionalGeneration)
AutoModelForImageTextToText.register(MLMambaConfig, MLMambaForConditionalGeneration)
AutoProcessor.register(MLMambaConfig, MLMambaProcessor)

__all__ = [
    "ENCODERS",
    "FusedVisionTower",
    "MLMambaConfig",
    "MLMambaForConditionalGeneration",
    "MLMambaPreTrainedModel",
    "MLMambaProcessor",
    "PatchVisionConfig",
    "PatchVisionModel",
    "convert_checkpoint",
    "encoder_configs",
    "from_parts",
    "image_first",
    "image_to_tower",
    "load_checkpoint",
    "zephyr_turn",
]
