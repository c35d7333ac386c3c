"""Mamba-2 checkpoints of state-spaces and of transformers to ours, and ours to state-spaces' layout.

Strict in every direction: a missing, unexpected, misshapen or non-finite tensor stops the conversion and is named.
Sources: key layout and config.json of the state-spaces/mamba2-* releases; transformers' Mamba2ForCausalLM.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Mamba2Config

from mmkernels.errors import CheckpointError, ConfigError, nearest
from mmkernels.models.common.checkpoint_files import check_weights, listing, read_json, read_weights
from mmkernels.models.common.conversion import (
    Shapes,
    check_known,
    free_destination,
    model_shapes,
    save_model,
    written_whole,
)
from mmkernels.models.mamba2.configuration_mamba2 import Mamba2LMConfig
from mmkernels.models.mamba2.modeling_mamba2 import Mamba2LMForCausalLM

LAYOUTS = ("auto", "state-spaces", "transformers", "mmkernels")
TARGETS = ("mmkernels", "state-spaces")
_OURS, _THEIRS = "backbone.embedding.weight", "backbone.embeddings.weight"
_HEAD = "lm_head.weight"

# state-spaces: name in config.json -> ours.  What its ssm_cfg may override has the mixer's own argument names.
_FIELDS = {
    "d_model": "hidden_size",
    "n_layer": "num_hidden_layers",
    "vocab_size": "vocab_size",
    "pad_vocab_size_multiple": "pad_vocab_size_multiple",
    "residual_in_fp32": "residual_in_fp32",
    "tie_embeddings": "tie_word_embeddings",
}
_MIXER_FIELDS = {
    "d_state": "state_size",
    "d_conv": "conv_kernel",
    "expand": "expand",
    "headdim": "head_dim",
    "ngroups": "n_groups",
    "D_has_hdim": "skip_per_channel",
    "rmsnorm": "rmsnorm",
    "norm_before_gate": "norm_before_gate",
    "dt_limit": "time_step_limit",
    "bias": "use_bias",
    "conv_bias": "use_conv_bias",
    "chunk_size": "chunk_size",
}
# Options of training and of its fused kernels, and what is another model unless it has this value.
_IGNORED = {"fused_add_norm", "dt_min", "dt_max", "dt_init_floor", "A_init_range", "use_mem_eff_path"}
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "d_intermediate": (0,),
    "attn_layer_idx": ([], None),
    "attn_cfg": ({}, None),
    "rms_norm": (True,),
}
_FROM_TRANSFORMERS = {
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "vocab_size": "vocab_size",
    "state_size": "state_size",
    "conv_kernel": "conv_kernel",
    "expand": "expand",
    "head_dim": "head_dim",
    "n_groups": "n_groups",
    "time_step_limit": "time_step_limit",
    "use_bias": "use_bias",
    "use_conv_bias": "use_conv_bias",
    "layer_norm_epsilon": "rms_norm_eps",
    "residual_in_fp32": "residual_in_fp32",
    "tie_word_embeddings": "tie_word_embeddings",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
}


def convert_checkpoint(
    source: str | Path,
    destination: str | Path,
    *,
    layout: str = "auto",
    to: str = "mmkernels",
    config: Mamba2LMConfig | None = None,
    overwrite: bool = False,
) -> Path:
    """Convert a Mamba-2 checkpoint and check that every tensor arrived.

    Args:
        source: a weight file, or a folder with weights (pytorch_model.bin or safetensors) and config.json.
        destination: folder to write; it appears when it is complete.
        layout: of the source: "state-spaces", "transformers", "mmkernels", or "auto" to tell by its tensors.
        to: "mmkernels" (for from_pretrained) or "state-spaces" (pytorch_model.bin as released).
        config: instead of the source's config.json.
        overwrite: replace an existing destination.

    Returns:
        The destination.

    Raises:
        CheckpointError: the source is damaged, incomplete or of another layout; the destination exists.
        ConfigError: an unknown option, or a configuration of another model.

    Example:
        >>> convert_checkpoint("mamba2-130m", "mamba2-130m-mmk")  # doctest: +SKIP
        >>> Mamba2LMForCausalLM.from_pretrained("mamba2-130m-mmk")  # doctest: +SKIP
    """
    check_known(to=(to, TARGETS))
    target = free_destination(destination, overwrite)
    weights, config = load_checkpoint(source, layout=layout, config=config)
    with written_whole(target) as folder:
        if to == "state-spaces":
            torch.save(weights, folder / "pytorch_model.bin")
            (folder / "config.json").write_text(json.dumps(_state_spaces_config(config), indent=2) + "\n")
        else:
            save_model(Mamba2LMForCausalLM, config, weights, folder, head=_HEAD)
    return target


def load_checkpoint(
    source: str | Path, *, layout: str = "auto", config: Mamba2LMConfig | None = None
) -> tuple[dict[str, Tensor], Mamba2LMConfig]:
    """The weights of a checkpoint under our names, checked, and their configuration.

    Args, Raises: as `convert_checkpoint`.

    Returns:
        State dict and configuration: `Mamba2LMForCausalLM(config).load_state_dict(state)` is strict.  Step-size bias,
        decay and skip are float32 whatever the file holds.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"load_checkpoint: layout must be known; got {layout!r}. {nearest(layout, LAYOUTS)}")
    path = Path(source)
    weights = read_weights(path)
    folder = path if path.is_dir() else path.parent
    raw = read_json(folder / "config.json") if (folder / "config.json").is_file() else None
    if layout == "auto":
        layout = _detect(path, weights, raw)
    if config is None:
        if raw is None:
            raise CheckpointError(
                f"{folder} must hold a config.json beside the weights; got none. Download it or pass config=."
            )
        config = _read_config(raw, layout, folder)
    ours = dict(weights)
    if _THEIRS in ours and _OURS not in ours and layout == "transformers":
        ours[_OURS] = ours.pop(_THEIRS)
    if config.tie_word_embeddings:
        if _HEAD not in ours and _OURS in ours:
            ours[_HEAD] = ours[_OURS]
        elif _HEAD in ours and _OURS in ours and not torch.equal(ours[_HEAD], ours[_OURS]):
            raise CheckpointError(
                f"{path} must hold one table for embedding and head; got two that differ. "
                "Pass a config with tie_word_embeddings=False if they are meant to."
            )
    check_weights(path, ours, our_shapes(config))
    wide = Mamba2LMForCausalLM._keep_in_fp32_modules_strict or []
    widened = {name: value.float() if name.rsplit(".", 1)[-1] in wide else value for name, value in ours.items()}
    if config.tie_word_embeddings:
        widened[_HEAD] = widened[_OURS]
    return widened, config


def our_shapes(config: Mamba2LMConfig) -> Shapes:
    """Name -> shape of every tensor of our model."""
    return model_shapes(Mamba2LMForCausalLM, config)


def _detect(path: Path, weights: Mapping[str, Tensor], raw: Mapping[str, Any] | None) -> str:
    if raw is not None and raw.get("model_type") == Mamba2LMConfig.model_type:
        return "mmkernels"
    if _THEIRS in weights:
        return "transformers"
    if _OURS in weights:
        return "state-spaces"
    raise CheckpointError(
        f"{path} must be a Mamba-2 checkpoint of state-spaces, transformers or mmkernels; got tensors like "
        f"{listing(weights)}. Name the layout, or check the path."
    )


def _read_config(raw: dict[str, Any], layout: str, folder: Path) -> Mamba2LMConfig:
    if layout == "mmkernels":
        return Mamba2LMConfig.from_pretrained(folder)
    where = folder / "config.json"
    if layout == "transformers":
        if raw.get("model_type") != "mamba2" or raw.get("hidden_act", "silu") != "silu":
            raise ConfigError(f"{where} must describe a Mamba-2 model with SiLU; got {raw.get('model_type')!r}.")
        # A file may leave out what has its class's default value.
        whole = Mamba2Config.from_pretrained(folder)
        fields = {ours: getattr(whole, theirs) for theirs, ours in _FROM_TRANSFORMERS.items()}
        return Mamba2LMConfig(**fields, pad_vocab_size_multiple=1)
    return config_from_state_spaces(raw, where)


def config_from_state_spaces(raw: Mapping[str, Any], where: object = "config.json") -> Mamba2LMConfig:
    """Our configuration of a state-spaces config.json; what it does not mention has the released models' value.

    Raises:
        ConfigError: fields of another model (attention layers, MLPs, Mamba-1), or unknown ones.
    """
    mixer = dict(raw.get("ssm_cfg") or {})
    kind = mixer.pop("layer", "Mamba1")
    if kind != "Mamba2":
        raise ConfigError(f"{where}: ssm_cfg['layer'] must be 'Mamba2'; got {kind!r}. Mamba-1 is another model.")
    known = {*_FIELDS, *_REQUIRED, *_IGNORED, "ssm_cfg"}
    unknown = [*(set(raw) - known), *(f"ssm_cfg.{k}" for k in set(mixer) - {*_MIXER_FIELDS, *_IGNORED})]
    if unknown:
        raise ConfigError(f"{where} must hold fields of a Mamba-2 model only; got {listing(unknown)}.")
    for name, allowed in _REQUIRED.items():
        if name in raw and raw[name] not in allowed:
            raise ConfigError(
                f"{where}: {name} must be {allowed[0]!r}; got {raw[name]!r}. Attention layers, MLPs and LayerNorm are "
                "not part of this model."
            )
    missing = [name for name in ("d_model", "n_layer", "vocab_size") if name not in raw]
    if missing:
        raise ConfigError(f"{where} must hold d_model, n_layer and vocab_size; got none for {listing(missing)}.")
    # The default of the released code is 8; every released file says 16.
    fields: dict[str, Any] = {"pad_vocab_size_multiple": 8}
    fields.update({ours: raw[theirs] for theirs, ours in _FIELDS.items() if theirs in raw})
    fields.update({ours: mixer[theirs] for theirs, ours in _MIXER_FIELDS.items() if theirs in mixer})
    return Mamba2LMConfig(**fields)


def _state_spaces_config(config: Mamba2LMConfig) -> dict[str, Any]:
    if config.rms_norm_eps != 1e-5:
        raise ConfigError(
            f"the state-spaces layout must have rms_norm_eps 1e-5; got {config.rms_norm_eps}. It has no field for it."
        )
    default = Mamba2LMConfig()
    mixer = {
        theirs: getattr(config, ours)
        for theirs, ours in _MIXER_FIELDS.items()
        if getattr(config, ours) != getattr(default, ours)
    }
    fixed = {"d_intermediate": 0, "attn_layer_idx": [], "attn_cfg": {}, "rms_norm": True, "fused_add_norm": True}
    named = {theirs: getattr(config, ours) for theirs, ours in _FIELDS.items()}
    return {**named, "ssm_cfg": {"layer": "Mamba2", **mixer}, **fixed}
