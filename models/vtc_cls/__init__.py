"""LLaVA-1.5 with VTC-CLS: configuration, model, converter; registered with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, LlavaProcessor

from mmkernels.models.vtc_cls.configuration_vtc_cls import VTCCLSConfig, clip_l_336, vicuna_7b
from mmkernels.models.vtc_cls.convert_vtc_cls import convert_checkpoint, load_checkpoint
from mmkernels.models.vtc_cls.modeling_vtc_cls import VTCCLSForConditionalGeneration

AutoConfig.register(VTCCLSConfig.model_type, VTCCLSConfig)
AutoModel.register(VTCCLSConfig, VTCCLSForConditionalGeneration)
AutoModelForImageTextToText.register(VTCCLSConfig, VTCCLSForConditionalGeneration)
AutoProcessor.register(VTCCLSConfig, LlavaProcessor)

__all__ = [
    "VTCCLSConfig",
    "VTCCLSForConditionalGeneration",
    "clip_l_336",
    "convert_checkpoint",
    "load_checkpoint",
    "vicuna_7b",
]
