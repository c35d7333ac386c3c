"""AdamW groups and the warmup-stable-decay schedule of the recipes.

Source: mmMamba (arXiv 2502.13145) section 5.1; the schedule equals transformers' get_wsd_schedule with its defaults.
"""

import math

import torch
from torch import nn

from mmkernels.distill.recipe import StageConfig


def wsd_factor(step: int, *, warmup: int, stable: int, decay: int) -> float:
    """Share of the peak learning rate at a step: linear from 0, then 1, then half a cosine down to 0.

    >>> [wsd_factor(step, warmup=2, stable=1, decay=2) for step in range(6)]
    [0.0, 0.5, 1.0, 1.0, 0.5, 0.0]
    """
    if step < warmup:
        return step / warmup
    if step < warmup + stable:
        return 1.0
    if step < warmup + stable + decay:
        return 0.5 * (1.0 + math.cos(math.pi * (step - warmup - stable) / decay))
    return 0.0


def learning_rate(stage: StageConfig, step: int) -> float:
    """Learning rate of optimizer step `step` (from 0) of a stage."""
    parts = {"warmup": stage.warmup_steps, "stable": stage.stable_steps, "decay": stage.decay_steps}
    return stage.lr * wsd_factor(step, **parts)


def make_optimizer(model: nn.Module, stage: StageConfig) -> torch.optim.AdamW:
    """AdamW over the parameters that require gradients; names that contain "bias" are not decayed.

    dt_bias, A_log_bias and the convolution's bias are named so that this rule spares them.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    decayed = [parameter for name, parameter in trained if "bias" not in name]
    spared = [parameter for name, parameter in trained if "bias" in name]
    groups = [{"params": decayed, "weight_decay": stage.weight_decay}, {"params": spared, "weight_decay": 0.0}]
    filled = [group for group in groups if group["params"]]
    return torch.optim.AdamW(filled, lr=stage.lr, betas=stage.betas, eps=stage.eps)
