"""MLMambaConfig: vision towers, scan connector and Mamba-2 language model; the encoders and sizes of the paper.

Source: ML-Mamba (arXiv 2407.19832) and the settings of its released code.
"""

from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    Dinov2WithRegistersConfig,
    PreTrainedConfig,
    SiglipVisionConfig,
    ViTConfig,
)

from mmkernels.errors import ConfigError, nearest
from mmkernels.models.mamba2.configuration_mamba2 import Mamba2LMConfig

VARIANTS = ("mlp", "msc_basic", "msc_advanced")
SCANS = ("bidirectional", "cross", "raster")
ENCODERS = (
    "dinosiglip-vit-so-384px",
    "dinoclip-vit-l-336px",
    "dinov2-vit-l",
    "in1k-vit-l",
    "clip-vit-b",
    "clip-vit-l",
    "clip-vit-l-336px",
    "siglip-vit-b16-224px",
    "siglip-vit-b16-256px",
    "siglip-vit-b16-384px",
    "siglip-vit-so400m",
    "siglip-vit-so400m-384px",
)
_ALIASES = {"dinov2-vit-l-224px": "dinov2-vit-l", "clip-vit-l-224px": "clip-vit-l"}  # 224 is what no size means


@strict
class PatchVisionConfig(PreTrainedConfig):
    """A tower that is one linear map of each patch, and nothing else: no mixing, no positions.

    For small models: what knows where a patch is, or what is beside it, is then the connector or the language model.

    Args:
        hidden_size: channels of a patch.
        image_size, patch_size, num_channels: pixels.

    Raises:
        ConfigError: a patch that does not fit in the image.
    """

    model_type = "mmkernels_patches"

    hidden_size: int = 64
    image_size: int = 48
    patch_size: int = 16
    num_channels: int = 3
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if not 1 <= self.patch_size <= self.image_size:
            raise ConfigError(
                f"PatchVisionConfig: patch_size must lie in 1..{self.image_size}; got {self.patch_size}. Shrink it."
            )


def _dinov2_large(size: int) -> Dinov2WithRegistersConfig:
    # Released for 518 pixels: its table of 37 x 37 positions is resampled to the grid of `size`.
    shape: dict[str, Any] = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14}
    return Dinov2WithRegistersConfig(**shape, image_size=518, num_register_tokens=4)


def _imagenet_large(size: int) -> ViTConfig:
    # The epsilon is that of the training code; transformers' default, 1e-12, is no float32 number beside a variance.
    shape: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    return ViTConfig(**shape, num_attention_heads=16, patch_size=16, image_size=size, layer_norm_eps=1e-6)


def _clip(size: int, large: bool) -> CLIPVisionConfig:
    shape: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "patch_size": 16}
    if large:
        shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "patch_size": 14}
    heads = shape["hidden_size"] // 64
    return CLIPVisionConfig(**shape, num_attention_heads=heads, image_size=size, hidden_act="quick_gelu")


def _siglip(size: int, so400m: bool) -> SiglipVisionConfig:
    if so400m:
        shape: dict[str, Any] = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27}
        return SiglipVisionConfig(
            **shape, num_attention_heads=16, image_size=size, patch_size=14, vision_use_head=False
        )
    return SiglipVisionConfig(image_size=size, patch_size=16, vision_use_head=False)  # the base size is its default


def encoder_configs(name: str) -> tuple[list[PreTrainedConfig], int]:
    """Towers, in the order of their channels, and pixels of a side of one of the paper's encoders.

    >>> [tower.model_type for tower in encoder_configs("dinosiglip-vit-so-384px")[0]]
    ['dinov2_with_registers', 'siglip_vision_model']

    Raises:
        ConfigError: an unknown encoder.
    """
    name = _ALIASES.get(name, name)
    if name not in ENCODERS:
        raise ConfigError(f"encoder_configs: name must be known; got {name!r}. {nearest(name, ENCODERS)}")
    size = int(name.removesuffix("px").rsplit("-", 1)[1]) if name.endswith("px") else 224
    towers: dict[str, list[PreTrainedConfig]] = {
        "dinosiglip": [_dinov2_large(size), _siglip(size, True)],
        "dinoclip": [_dinov2_large(size), _clip(size, True)],
        "dinov2": [_dinov2_large(size)],
        "in1k": [_imagenet_large(size)],
        "clip": [_clip(size, "vit-l" in name)],
        "siglip": [_siglip(size, "so400m" in name)],
    }
    return towers[name.split("-", 1)[0]], size


def prefix_tokens(tower: PreTrainedConfig) -> int:
    """Tokens a tower puts in front of its patches: class and register tokens."""
    if tower.model_type in ("dinov2", "dinov2_with_registers"):
        return 1 + int(getattr(tower, "num_register_tokens", 0))
    return 1 if tower.model_type in ("clip_vision_model", "vit") else 0


@strict
class MLMambaConfig(PreTrainedConfig):
    """Configuration of `MLMambaForConditionalGeneration`; the defaults are the released 2.7b model.

    Args:
        text_config: the Mamba-2 language model.
        vision_config: the first tower; its channels come first.
        second_vision_config: a second tower, or None.
        image_size: pixels of a side, the same for both towers, whose grids must agree.
        connector_variant: "mlp" (no scan), "msc_basic" (scan), "msc_advanced" (scan and SwiGLU, as released).
        connector_scan: "bidirectional" (rows, both ways, as released), "cross" (rows and columns, both ways), "raster".
        connector_layers, connector_state_size, connector_head_dim, connector_expand, connector_conv_kernel: its scan's.
        num_keep: visual tokens kept of each image, after the connector's scan and before its projector; None keeps all.
        freeze_vision: run the towers without gradients, in evaluation mode.

    Raises:
        ConfigError: towers whose grids differ, sizes that contradict each other, unknown variants.

    Example:
        >>> config = MLMambaConfig.official("2.7b")
        >>> config.grid, config.vision_width, config.text_config.hidden_size
        ((27, 27), 2176, 2560)

    Source: parameter counts of the defaults (tests/models/test_ml_mamba_sizes.py).
    """

    model_type = "ml_mamba"
    keys_to_ignore_at_inference = ["past_key_values"]
    sub_configs = {"text_config": Mamba2LMConfig, "vision_config": AutoConfig, "second_vision_config": AutoConfig}

    if TYPE_CHECKING:  # mappings and None only until __post_init__ has made configurations of them
        text_config: Mamba2LMConfig = Mamba2LMConfig()
        vision_config: PreTrainedConfig = SiglipVisionConfig()
    else:
        text_config: dict | PreTrainedConfig | None = None
        vision_config: dict | PreTrainedConfig | None = None
    second_vision_config: dict | PreTrainedConfig | None = None
    image_size: int = 384
    connector_variant: str = "msc_advanced"
    connector_scan: str = "bidirectional"
    connector_layers: int = 2
    connector_state_size: int = 128
    connector_head_dim: int = 64
    connector_expand: int = 2
    connector_conv_kernel: int = 4
    num_keep: int | None = None
    freeze_vision: bool = True
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        if self.text_config is None:
            self.text_config = Mamba2LMConfig.official("2.7b")
        elif isinstance(self.text_config, dict):
            self.text_config = Mamba2LMConfig(**self.text_config)
        if self.vision_config is None:
            towers, _ = encoder_configs(ENCODERS[0])
            self.vision_config, self.second_vision_config = towers
        else:
            self.vision_config = _tower_config(self.vision_config)
            if self.second_vision_config is not None:
                self.second_vision_config = _tower_config(self.second_vision_config)
        self.tie_word_embeddings = self.text_config.tie_word_embeddings
        super().__post_init__(**kwargs)
        self._check_sizes()

    @property
    def towers(self) -> list[Any]:
        """Configurations of the towers, in the order of their channels."""
        both = [self.vision_config, self.second_vision_config]
        return [tower for tower in both if tower is not None]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        side = self.image_size // self.vision_config.patch_size
        return side, side

    @property
    def vision_width(self) -> int:
        """Channels of a patch, all towers together."""
        return sum(tower.hidden_size for tower in self.towers)

    @property
    def num_image_tokens(self) -> int:
        """Embeddings of one image in front of the text."""
        every = self.grid[0] * self.grid[1]
        return every if self.num_keep is None else self.num_keep

    @property
    def vocab_size(self) -> int:
        """Columns of the logits; rows that pad the table have none."""
        return self.text_config.vocab_size

    @property
    def hidden_size(self) -> int:
        """Channels of the language model."""
        return self.text_config.hidden_size

    @property
    def layer_types(self) -> list[str]:
        """Kinds of the language model's layers: all recurrent."""
        return self.text_config.layer_types

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:
        """The language model's configuration; with `decoder`, the view its cache is built from."""
        return self.text_config.get_text_config(decoder=decoder, encoder=encoder)

    @classmethod
    def official(cls, size: str = "2.7b", *, encoder: str = ENCODERS[0], **overrides: Any) -> "MLMambaConfig":
        """An encoder of the paper with state-spaces/mamba2-<size>; "2.7b" and the default encoder are the release."""
        towers, pixels = encoder_configs(encoder)
        text = Mamba2LMConfig.official(size)
        second = towers[1] if len(towers) > 1 else None
        settings = {"text_config": text, "vision_config": towers[0], "second_vision_config": second}
        return cls(**{**settings, "image_size": pixels, **overrides})

    def _check_sizes(self) -> None:
        def require(holds: bool, name: str, expectation: str, remedy: str) -> None:
            if not holds:
                raise ConfigError(f"MLMambaConfig: {name} must {expectation}; got {getattr(self, name)!r}. {remedy}")

        require(
            self.connector_variant in VARIANTS,
            "connector_variant",
            "be known",
            nearest(str(self.connector_variant), VARIANTS),
        )
        require(self.connector_scan in SCANS, "connector_scan", "be known", nearest(str(self.connector_scan), SCANS))
        for name in ("connector_layers", "connector_state_size", "connector_head_dim", "connector_conv_kernel"):
            require(getattr(self, name) >= 1, name, "be at least 1", "See the released sizes, the defaults.")
        grids = {self.image_size // tower.patch_size for tower in self.towers}
        require(
            len(grids) == 1 and min(grids) >= 1,
            "image_size",
            "give all towers one grid of patches",
            f"The towers' patches are {[tower.patch_size for tower in self.towers]} pixels.",
        )
        for tower in self.towers:
            require(
                tower.model_type.startswith("dinov2") or tower.image_size == self.image_size,
                "image_size",
                f"be the {tower.image_size} pixels of {tower.model_type}",
                "Only DINOv2's positions are resampled.",
            )
        every = self.grid[0] * self.grid[1]
        require(
            self.num_keep is None or 1 <= self.num_keep <= every,
            "num_keep",
            f"be None or lie in 1..{every}",
            "None keeps all.",
        )


def _tower_config(given: Any) -> Any:
    """A tower's configuration from a mapping that names its model_type."""
    if isinstance(given, PreTrainedConfig):
        return given
    values = dict(given)
    kind = values.pop("model_type", None)
    if kind is None:
        raise ConfigError(
            "MLMambaConfig: vision_config must name its model_type; got none. E.g. 'siglip_vision_model'."
        )
    if kind == PatchVisionConfig.model_type:
        return PatchVisionConfig(**values)
    return AutoConfig.for_model(kind, **values)
