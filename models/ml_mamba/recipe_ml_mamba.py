"""MLMambaRecipe: one stage of ML-Mamba's training, what it trains and which parameters decay.

Source: ML-Mamba (arXiv 2407.19832, table 1) and the settings shipped with its official code.
"""

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

import torch

from mmkernels._recipes import read_yaml
from mmkernels.models.common.recipe import StageRecipe
from mmkernels.models.ml_mamba.modeling_ml_mamba import MLMambaForConditionalGeneration

TRAINED = {  # parts of the model each stage trains
    "align": ("connector",),
    "finetune": ("connector", "language_model"),
    "full-finetune": ("connector", "language_model", "vision_tower"),
}


@dataclass(frozen=True)
class MLMambaRecipe(StageRecipe):
    """One stage; the fields are those of `StageRecipe`.

    Args:
        stage: "align" (captions; the connector alone is trained), "finetune" (conversations; the language model, too)
            or "full-finetune" (the towers, too).
        max_text_tokens: longer texts lose their end; the image does not count.
        weight_decay: of matrices; not of norms, biases, step sizes, decays and skips.

    Raises:
        ConfigError: values out of range.

    Example:
        >>> load_recipe("finetune").learning_rate(2 * 5195)
        0.0
    """

    STAGES: ClassVar[tuple[str, ...]] = tuple(TRAINED)


def load_recipe(source: str | Path) -> MLMambaRecipe:
    """Reads a recipe from a YAML file, or "align" or "finetune", which come with the package.

    Raises:
        ConfigError: no such file or name, not YAML, or not a valid recipe.

    Example:
        >>> load_recipe("align").global_batch
        256
    """
    folder = resources.files("mmkernels.models.ml_mamba").joinpath("recipes")
    bundled = {item.name[:-5]: item for item in folder.iterdir() if item.name.endswith(".yaml")}
    return MLMambaRecipe.from_dict(read_yaml("load_recipe", source, bundled))


def make_optimizer(model: MLMambaForConditionalGeneration, recipe: MLMambaRecipe) -> torch.optim.AdamW:
    """AdamW over what the stage trains, everything else frozen; matrices decay, all else does not."""
    parts = TRAINED[recipe.stage]
    for name, part in model.named_children():
        part.requires_grad_(name in parts)
    model.vision_tower.frozen = "vision_tower" not in parts
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": recipe.weight_decay},
        {"params": [], "weight_decay": 0.0},
    ]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and not name.endswith("bias") and not hasattr(parameter, "_no_weight_decay")
            groups[0 if decays else 1]["params"].append(parameter)
    return torch.optim.AdamW(groups, lr=recipe.lr)
