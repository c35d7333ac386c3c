"""Distillation of attention into linear time: seeding, losses, stages, recipes and a small trainer."""

from mmkernels.distill.linearize import linearize, parse_keep_attention, restore_attention
from mmkernels.distill.losses import layer_errors, layerwise_mse, logit_kl, token_mask
from mmkernels.distill.recipe import DistillRecipe, StageConfig, load_recipe
from mmkernels.distill.seeding import fuse_qkv, seed_mixer, split_fused_qkv
from mmkernels.distill.sources import BatchSource, dataset_source, iterable_source
from mmkernels.distill.stages import (
    StageLoss,
    capture_mixers,
    layerwise_loss,
    logit_loss,
    model_inputs,
    set_trainable,
    trainable_names,
)
from mmkernels.distill.trainer import Distiller, DistillResult, run

__all__ = [
    "BatchSource",
    "capture_mixers",
    "dataset_source",
    "Distiller",
    "DistillRecipe",
    "DistillResult",
    "fuse_qkv",
    "iterable_source",
    "layer_errors",
    "layerwise_loss",
    "layerwise_mse",
    "linearize",
    "load_recipe",
    "logit_kl",
    "logit_loss",
    "model_inputs",
    "parse_keep_attention",
    "restore_attention",
    "run",
    "seed_mixer",
    "set_trainable",
    "split_fused_qkv",
    "StageConfig",
    "StageLoss",
    "token_mask",
    "trainable_names",
]
