"""AKI: configuration, model, processor, converter; registered with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from mmkernels.models.aki.configuration_aki import AkiConfig, phi_3_5_mini, siglip_so400m
from mmkernels.models.aki.convert_aki import convert_checkpoint, load_checkpoint
from mmkernels.models.aki.modeling_aki import AkiForConditionalGeneration, AkiPreTrainedModel
from mmkernels.models.aki.processing_aki import AkiProcessor, expand_placeholders, image_to_pixels
from mmkernels.models.aki.resampler_aki import PerceiverResampler

AutoConfig.register(AkiConfig.model_type, AkiConfig)
AutoModel.register(AkiConfig, AkiForConditionalGeneration)
AutoModelForImageTextToText.register(AkiConfig, AkiForConditionalGeneration)
AutoProcessor.register(AkiConfig, AkiProcessor)

__all__ = [
    "AkiConfig",
    "AkiForConditionalGeneration",
    "AkiPreTrainedModel",
    "AkiProcessor",
    "PerceiverResampler",
    "convert_checkpoint",
    "expand_placeholders",
    "image_to_pixels",
    "load_checkpoint",
    "phi_3_5_mini",
    "siglip_so400m",
]
