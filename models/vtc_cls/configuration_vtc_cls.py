"""VTCCLSConfig: LLaVA-1.5, and how many visual tokens of it the decoder reads.

Source: VTC-CLS (arXiv 2412.05819); sizes of liuhaotian/llava-v1.5-7b and openai/clip-vit-large-patch14-336.
"""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from mmkernels.errors import ConfigError


def clip_l_336(**overrides: Any) -> CLIPVisionConfig:
    """The tower of LLaVA-1.5: 24 x 24 patches of width 1024, 24 layers.

    >>> (clip_l_336().image_size // clip_l_336().patch_size) ** 2
    576
    """
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    return CLIPVisionConfig(**{**sizes, "image_size": 336, "patch_size": 14, "projection_dim": 768, **overrides})


def vicuna_7b(**overrides: Any) -> LlamaConfig:
    """Vicuna-7B v1.5 with room for the image placeholder and padding: 32000 ids and 64 more rows.

    >>> vicuna_7b().vocab_size
    32064
    """
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    rest = {"vocab_size": 32064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "pad_token_id": 32001}
    return LlamaConfig(**{**sizes, **rest, **overrides})


@strict
class VTCCLSConfig(LlavaConfig):
    """Configuration of `VTCCLSForConditionalGeneration`; the defaults are LLaVA-1.5-7B with 128 of 576 visual tokens.

    Args:
        num_keep: visual tokens of each image that the decoder reads; None: all, which is LLaVA-1.5.
        num_layers: scoring layers K, counted back from the feature layer: 3 is the paper's, 7 the released program's
            default, 1 is FasterVLM.
        score_source: "cls", or for towers without [CLS] "probe", "column", "mean_query".
        position_policy: "compact" (released) or "original".

    The rest as `LlavaConfig`.

    Raises:
        ConfigError: num_keep below 1 or above the number of patches.

    Example:
        >>> VTCCLSConfig(num_keep=64).num_keep
        64

    Source: parameter counts of the defaults equal LLaVA-1.5-7B's (tests/models/test_vtc_cls.py).
    """

    model_type = "vtc_cls"

    num_keep: int | None = 128
    num_layers: int = 3
    score_source: str = "cls"
    position_policy: Literal["compact", "original"] = "compact"

    def __post_init__(self, **kwargs: Any) -> None:
        self.vision_config = clip_l_336() if self.vision_config is None else self.vision_config
        self.text_config = vicuna_7b() if self.text_config is None else self.text_config
        super().__post_init__(**kwargs)
        vision: Any = self.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        if self.num_keep is not None and not 1 <= self.num_keep <= patches:
            raise ConfigError(
                f"VTCCLSConfig: num_keep must be None or lie in 1..{patches}, the patches of an image; got "
                f"{self.num_keep}. The paper's budgets are 256, 128 and 64."
            )
