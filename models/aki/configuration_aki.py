"""AkiConfig: vision tower, resampler, decoder, and which text the image tokens may read.

Source: AKI (arXiv 2503.02597) and the configuration of its released checkpoint, AKI-4B-phi-3.5-mini.
"""

from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from transformers import Phi3Config, PreTrainedConfig, SiglipVisionConfig

from mmkernels.errors import ConfigError, nearest
from mmkernels.ops.mma_attention.spans import POLICIES

# One factor per pair of rotary channels (48 pairs of head_dim 96), from Phi-3.5-mini's published configuration.
_SHORT = [1.0, 1.0199999809265137, 1.0299999713897705, 1.0299999713897705]
_SHORT += [1.0499999523162842] * 5
_SHORT += [1.0699999332427979, 1.0999999046325684, 1.1099998950958252, 1.1599998474121094, 1.1599998474121094]
_SHORT += [1.1699998378753662, 1.2899998426437378, 1.339999794960022, 1.679999828338623, 1.7899998426437378]
_SHORT += [1.8199998140335083, 1.8499997854232788, 1.8799997568130493, 1.9099997282028198, 1.9399996995925903]
_SHORT += [1.9899996519088745] + [2.0199997425079346] * 6 + [2.0299997329711914] * 9
_SHORT += [2.0799996852874756, 2.0899996757507324, 2.189999580383301, 2.2199995517730713, 2.5899994373321533]
_SHORT += [2.729999542236328, 2.749999523162842, 2.8399994373321533]
_LONG = [1.0800000429153442, 1.1100000143051147, 1.1399999856948853, 1.340000033378601, 1.5899999141693115]
_LONG += [1.600000023841858, 1.6200000047683716, 2.620000123977661, 3.2300000190734863, 3.2300000190734863]
_LONG += [4.789999961853027, 7.400000095367432, 7.700000286102295, 9.09000015258789, 12.199999809265137]
_LONG += [17.670000076293945, 24.46000099182129, 28.57000160217285, 30.420001983642578, 30.840002059936523]
_LONG += [32.590003967285156, 32.93000411987305, 42.320003509521484, 44.96000289916992, 50.340003967285156]
_LONG += [50.45000457763672, 57.55000305175781, 57.93000411987305, 58.21000289916992, 60.1400032043457]
_LONG += [62.61000442504883, 62.62000274658203, 62.71000289916992, 63.1400032043457, 63.1400032043457]
_LONG += [63.77000427246094, 63.93000411987305, 63.96000289916992, 63.970001220703125, 64.02999877929688]
_LONG += [64.06999969482422, 64.08000183105469, 64.12000274658203, 64.41000366210938, 64.4800033569336]
_LONG += [64.51000213623047, 64.52999877929688, 64.83999633789062]


def phi_3_5_mini(**overrides: Any) -> Phi3Config:
    """Phi-3.5-mini as AKI uses it: padding with its own token, and no sliding window (its 262144 never binds).

    >>> phi_3_5_mini().hidden_size // phi_3_5_mini().num_attention_heads
    96
    """
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 32.0}
    rope |= {"short_factor": list(_SHORT), "long_factor": list(_LONG)}
    settings = {"rope_parameters": rope, "max_position_embeddings": 131072, "original_max_position_embeddings": 4096}
    return Phi3Config(**{**settings, "pad_token_id": 32011, "sliding_window": None, **overrides})


def siglip_so400m(**overrides: Any) -> SiglipVisionConfig:
    """The tower of siglip-so400m-patch14-384: 27 x 27 patches of width 1152.

    >>> (siglip_so400m().image_size // siglip_so400m().patch_size) ** 2
    729
    """
    sizes = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    return SiglipVisionConfig(**{**sizes, "image_size": 384, "patch_size": 14, **overrides})


@strict
class AkiConfig(PreTrainedConfig):
    """Configuration of `AkiForConditionalGeneration`; the defaults are the released AKI-4B-phi-3.5-mini.

    Args:
        text_config: Phi-3 decoder; its vocab_size counts the rows of the pretrained tables.
        vision_config: SigLIP vision tower.
        num_vision_tokens: image tokens (resampler latents), so placeholders, of one image.
        resampler_depth, resampler_heads, resampler_head_dim, resampler_ff_mult: see `PerceiverResampler`.
        num_base_tokens: ids below it use the pretrained tables, ids from it on the extra ones.
        num_extra_tokens: rows of the extra tables: `<image>` and `<|endofchunk|>`.
        image_token_id: placeholder; num_vision_tokens of them stand for one image.
        prompt_end_token_id: the assistant tag, after which the answer starts.
        include_prompt_end: whether image tokens read that tag too; the released weights were trained so.
        policy: what image tokens read beside what precedes them: "prompt" (the question, as released), "own_segment"
            (the text up to the next image), "none" (causal attention, as in pre-training).
        num_keep: of an image's tokens, the decoder reads the so many that the resampler's last layer attends to most;
            prompts keep num_vision_tokens placeholders an image.  None: all.

    Raises:
        ConfigError: sizes or ids that contradict each other, an unknown policy.

    Example:
        >>> AkiConfig().vocab_size
        32014

    Source: parameter counts of the defaults equal those of the released parts (tests/models/test_aki_sizes.py).
    """

    model_type = "aki"
    keys_to_ignore_at_inference = ["past_key_values"]
    sub_configs = {"text_config": Phi3Config, "vision_config": SiglipVisionConfig}

    if TYPE_CHECKING:  # mappings and None only until __post_init__ has made configurations of them
        text_config: Phi3Config = Phi3Config()
        vision_config: SiglipVisionConfig = SiglipVisionConfig()
    else:
        text_config: dict | PreTrainedConfig | None = None
        vision_config: dict | PreTrainedConfig | None = None
    num_vision_tokens: int = 144
    resampler_depth: int = 6
    resampler_heads: int = 8
    resampler_head_dim: int = 64
    resampler_ff_mult: int = 4
    num_base_tokens: int = 32012
    num_extra_tokens: int = 2
    image_token_id: int = 32012
    prompt_end_token_id: int = 32001
    include_prompt_end: bool = True
    policy: str = "prompt"
    num_keep: int | None = None
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.text_config is None:
            self.text_config = phi_3_5_mini()
        elif isinstance(self.text_config, dict):
            self.text_config = Phi3Config(**self.text_config)
        if self.vision_config is None:
            self.vision_config = siglip_so400m()
        elif isinstance(self.vision_config, dict):
            self.vision_config = SiglipVisionConfig(**self.vision_config)
        super().__post_init__(**kwargs)
        self._check_sizes()

    @property
    def vocab_size(self) -> int:
        """Columns of the logits."""
        return self.num_base_tokens + self.num_extra_tokens

    @property
    def modality_mutual(self) -> dict[str, Any]:
        """What `mmkernels.interop` needs to know to find the spans of a call."""
        names = ("image_token_id", "prompt_end_token_id", "include_prompt_end", "policy")
        return {name: getattr(self, name) for name in names}

    def _check_sizes(self) -> None:
        def require(holds: bool, name: str, expectation: str, remedy: str) -> None:
            if not holds:
                raise ConfigError(f"AkiConfig: {name} must {expectation}; got {getattr(self, name)!r}. {remedy}")

        require(self.policy in POLICIES, "policy", "be known", nearest(str(self.policy), POLICIES))
        for name in ("num_vision_tokens", "resampler_heads", "resampler_head_dim", "resampler_ff_mult"):
            require(getattr(self, name) >= 1, name, "be at least 1", "See the released sizes, the defaults.")
        require(self.resampler_depth >= 0, "resampler_depth", "be at least 0", "6 is the released model's.")
        require(
            self.num_keep is None or (1 <= self.num_keep <= self.num_vision_tokens and self.resampler_depth > 0),
            "num_keep",
            f"be None or lie in 1..{self.num_vision_tokens}, with a resampler that has layers",
            "It counts image tokens.",
        )
        require(self.num_extra_tokens >= 1, "num_extra_tokens", "be at least 1", "The image placeholder is one.")
        rows = self.text_config.vocab_size
        require(
            0 < self.num_base_tokens <= rows, "num_base_tokens", f"lie in 1..{rows}", "Raise text_config.vocab_size."
        )
        for name in ("image_token_id", "prompt_end_token_id"):
            require(
                0 <= getattr(self, name) < self.vocab_size, name, f"lie in 0..{self.vocab_size - 1}", "Check the ids."
            )
        require(
            self.image_token_id != self.prompt_end_token_id, "image_token_id", "differ from the tag", "Check the ids."
        )
