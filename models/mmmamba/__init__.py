"""mmMamba and its teacher HoVLE: configuration, model, processor, converters; registered with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from mmkernels.models.mmmamba.configuration_mmmamba import MMMambaConfig, head_interleaved, layer_types_keeping
from mmkernels.models.mmmamba.modeling_mmmamba import (
    MMMambaForConditionalGeneration,
    MMMambaModel,
    MMMambaPreTrainedModel,
)

AutoConfig.register(MMMambaConfig.model_type, MMMambaConfig)
AutoModel.register(MMMambaConfig, MMMambaModel)
AutoModelForImageTextToText.register(MMMambaConfig, MMMambaForConditionalGeneration)

__all__ = [
    "MMMambaConfig",
    "MMMambaForConditionalGeneration",
    "MMMambaModel",
    "MMMambaPreTrainedModel",
    "head_interleaved",
    "layer_types_keeping",
]
