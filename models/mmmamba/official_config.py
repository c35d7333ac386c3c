"""The official config.json in terms of ours, and back.

Source: field names as the released checkpoints' remote code reads them; their class defaults are never relied on.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmkernels.errors import CheckpointError, ConfigError
from mmkernels.models.mmmamba.configuration_mmmamba import FULL, LINEAR, MMMambaConfig
from mmkernels.models.mmmamba.layouts_mmmamba import layer_prefixes

_BLOCKS = {FULL: "mha", LINEAR: "mamba2"}
# ours -> the official field that both sub-configurations must agree on
_SHARED = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "rms_norm_eps": "rms_norm_eps",
    "max_position_embeddings": "max_position_embeddings",
}


def config_from_official(
    raw: Mapping[str, Any], kinds: Mapping[str, str], *, conv_kernel: int, dynamic_rope: bool, where: Path
) -> MMMambaConfig:
    """Read an official configuration.

    Args:
        raw: the content of config.json.
        kinds: official layer prefix -> the kind its tensors say it is.
        conv_kernel: taps of the convolution, which no official field gives.
        dynamic_rope: whether rope_scaling counts (the deployed mmMamba code ignores it).
        where: the file, for messages.

    Raises:
        CheckpointError: a field is missing, the two halves disagree, or the labels contradict the tensors.
        ConfigError: a feature that this model does not have.
    """

    def read(section: str, field: str) -> Any:
        part = raw.get(section)
        if not isinstance(part, Mapping) or field not in part:
            raise CheckpointError(f"{where} must give {section}.{field}; got no such field. Pass config= instead.")
        return part[field]

    _refuse_features(raw, where)
    sizes: dict[str, Any] = {}
    for name, field in _SHARED.items():
        first, second = read("embedding_config", field), read("llm_config", field)
        if first != second:
            raise CheckpointError(
                f"{where} must give one {field} for embedding and language model; got {first} and {second}. "
                "This model has a single width."
            )
        sizes[name] = second
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(read("llm_config", "rope_theta"))}
    scaling = raw["llm_config"].get("rope_scaling")
    if dynamic_rope and scaling:
        rope.update(rope_type=scaling.get("type", scaling.get("rope_type")), factor=float(scaling["factor"]))
    embedding, language = raw["embedding_config"], raw["llm_config"]
    config = MMMambaConfig(
        **sizes,
        vocab_size=read("llm_config", "vocab_size"),
        num_embedding_layers=read("embedding_config", "num_hidden_layers"),
        num_hidden_layers=read("llm_config", "num_hidden_layers"),
        image_size=read("embedding_config", "image_size"),
        patch_size=read("embedding_config", "patch_size"),
        image_token_id=read("embedding_config", "img_context_token_id"),
        downsample_ratio=raw.get("downsample_ratio", 0.5),
        normalize_embedding_output=bool(raw.get("normalize_encoder_output", False)),
        rope_parameters=rope,
        mixer_conv_kernel=conv_kernel,
        bos_token_id=language.get("bos_token_id", 1),
        eos_token_id=language.get("eos_token_id", 2),
        pad_token_id=language.get("pad_token_id", 2),
    )
    config.layer_types = _kinds(config, kinds, embedding, language, where)
    return config


def _refuse_features(raw: Mapping[str, Any], where: Path) -> None:
    embedding, language = raw.get("embedding_config") or {}, raw.get("llm_config") or {}
    refused = {
        "embedding_config.use_ls": bool(embedding.get("use_ls", False)),
        "embedding_config.pixel_shuffle_loc": embedding.get("pixel_shuffle_loc", "pre") != "pre",
        "embedding_config.use_pixel_shuffle_proj": not embedding.get("use_pixel_shuffle_proj", True),
        "embedding_config.special_token_maps": bool(embedding.get("special_token_maps")),
        "llm_config.bias": bool(language.get("bias", False)),
        "llm_config.tie_word_embeddings": bool(language.get("tie_word_embeddings", False)),
    }
    found = [name for name, present in refused.items() if present]
    if found:
        raise ConfigError(
            f"{where} must describe the released architecture; got {', '.join(found)} set otherwise. "
            "Layer scale, post-shuffle (HoVLE-HD), extra token tables, biases and tied heads are not supported."
        )


def _kinds(
    config: MMMambaConfig,
    kinds: Mapping[str, str],
    embedding: Mapping[str, Any],
    language: Mapping[str, Any],
    where: Path,
) -> list[str]:
    """Layer kinds from the tensors; the file's labels, where there are any, must say the same."""
    found = [kinds.get(prefix, FULL) for prefix, _ in layer_prefixes(config)]
    first, total = config.num_embedding_layers, config.total_layers
    for section, part, span in (("embedding_config", embedding, (0, first)), ("llm_config", language, (first, total))):
        labels = part.get("layers_block_type")
        actual = [_BLOCKS[kind] for kind in found[slice(*span)]]
        if labels is not None and list(labels) != actual:
            wrong = [i for i, (a, b) in enumerate(zip(labels, actual, strict=False)) if a != b]
            raise CheckpointError(
                f"{where} must label layers as their tensors are; got another {section}.layers_block_type at {wrong}. "
                "A known export fault labels fused Mamba layers 'mha': restore their attention from the teacher."
            )
    return found


def official_from_config(config: MMMambaConfig) -> dict[str, Any]:
    """An official config.json for the weights that `convert_checkpoint(..., to="official")` writes.

    Raises:
        ConfigError: a setting that the official code hard-codes otherwise.
    """
    teacher = all(kind == FULL for kind in config.layer_types)
    rope = config.rope_parameters
    fixed = {
        "head_dim": (config.head_dim, config.hidden_size // config.num_attention_heads),
        "mixer_norm_eps": (config.mixer_norm_eps, 1e-5),
        "mixer_scale_input_by_dt": (config.mixer_scale_input_by_dt, True),
        "rope_parameters['rope_type']": (rope["rope_type"], rope["rope_type"] if teacher else "default"),
    }
    for name, (value, official) in fixed.items():
        if value != official:
            raise ConfigError(
                f"official_from_config: {name} must be {official!r}, which the official code takes for granted; got "
                f"{value!r}. Change the configuration if that is meant, or keep this layout."
            )
    scaling = {"type": "dynamic", "factor": rope["factor"]} if rope["rope_type"] == "dynamic" else None
    shared = {field: getattr(config, name) for name, field in _SHARED.items()}
    shared |= {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}
    blocks = [_BLOCKS[kind] for kind in config.layer_types]
    first = config.num_embedding_layers
    embedding: dict[str, Any] = {
        **shared,
        "model_type": "holistic_embedding" if teacher else "mmMamba_embedding",
        "num_hidden_layers": first,
        "patch_size": config.patch_size,
        "image_size": config.image_size,
        "use_ls": False,
        "use_pixel_shuffle_proj": True,
        "pixel_shuffle_loc": "pre",
        "special_token_maps": {},
        "llm_vocab_size": config.vocab_size,
        "llm_hidden_size": config.hidden_size,
        "img_context_token_id": config.image_token_id,
    }
    language: dict[str, Any] = {
        **shared,
        "model_type": "internlm2" if teacher else "mmMamba",
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_hidden_layers,
        "bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
    if not teacher:
        embedding["layers_block_type"], language["layers_block_type"] = blocks[:first], blocks[first:]
    return {
        "model_type": "internvl_chat" if teacher else "mmMamba_chat",
        "architectures": ["InternVLChatModel" if teacher else "mmMambaChatModel"],
        "downsample_ratio": config.downsample_ratio,
        "force_image_size": config.image_size,
        "template": "internlm2-chat",
        "normalize_encoder_output": config.normalize_embedding_output,
        "embedding_config": embedding,
        "llm_config": language,
    }
