"""The Mamba-2 language model: configuration, model, converters; registered with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from mmkernels.models.mamba2.configuration_mamba2 import OFFICIAL_SIZES, Mamba2LMConfig
from mmkernels.models.mamba2.convert_mamba2 import config_from_state_spaces, convert_checkpoint, load_checkpoint
from mmkernels.models.mamba2.modeling_mamba2 import Mamba2LMForCausalLM, Mamba2LMModel, Mamba2LMPreTrainedModel

AutoConfig.register(Mamba2LMConfig.model_type, Mamba2LMConfig)
AutoModel.register(Mamba2LMConfig, Mamba2LMModel)
AutoModelForCausalLM.register(Mamba2LMConfig, Mamba2LMForCausalLM)

__all__ = [
    "OFFICIAL_SIZES",
    "Mamba2LMConfig",
    "Mamba2LMForCausalLM",
    "Mamba2LMModel",
    "Mamba2LMPreTrainedModel",
    "config_from_state_spaces",
    "convert_checkpoint",
    "load_checkpoint",
]
