"""mmMamba and its teacher HoVLE: configuration, model, processor, converters; registered with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from mmkernels.models.common.images import load_image
from mmkernels.models.mmmamba.configuration_mmmamba import MMMambaConfig, head_interleaved, layer_types_keeping
from mmkernels.models.mmmamba.convert_mmmamba import convert_checkpoint, load_checkpoint
from mmkernels.models.mmmamba.modeling_mmmamba import (
    MMMambaForConditionalGeneration,
    MMMambaModel,
    MMMambaPreTrainedModel,
)
from mmkernels.models.mmmamba.processing_mmmamba import MMMambaProcessor
from mmkernels.models.mmmamba.tiling_mmmamba import ImageTiler

AutoConfig.register(MMMambaConfig.model_type, MMMambaConfig)
AutoModel.register(MMMambaConfig, MMMambaModel)
AutoModelForImageTextToText.register(MMMambaConfig, MMMambaForConditionalGeneration)
AutoProcessor.register(MMMambaConfig, MMMambaProcessor)

__all__ = [
    "ImageTiler",
    "MMMambaConfig",
    "MMMambaForConditionalGeneration",
    "MMMambaModel",
    "MMMambaPreTrainedModel",
    "MMMambaProcessor",
    "convert_checkpoint",
    "head_interleaved",
    "layer_types_keeping",
    "load_checkpoint",
    "load_image",
]
