"""AkiRecipe: one stage of AKI's training, its learning rate and its parameter groups.

Source: AKI (arXiv 2503.02597) and the settings shipped with its official code.
"""

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import ClassVar

import torch

from mmkernels._recipes import one_of, read_yaml
from mmkernels.models.aki.modeling_aki import AkiForConditionalGeneration
from mmkernels.models.common.recipe import StageRecipe
from mmkernels.ops.mma_attention.spans import POLICIES


@dataclass(frozen=True)
class AkiRecipe(StageRecipe):
    """One stage: what the loss is on, what images read, and for how long; the rest as `StageRecipe`.

    Args:
        stage: "pretrain" (captions, loss on all text) or "sft" (questions and answers, loss on the answers).
        policy: of the attention mask while training, see `AkiConfig`; the saved model keeps its own.
        max_text_tokens: longer texts lose their end; an image counts as one token.
        weight_decay: of everything but the token tables.

    Raises:
        ConfigError: values out of range.

    Example:
        >>> recipe = AkiRecipe("x", "sft", lr=3.0, min_lr=1.0, warmup_steps=2, steps=6, global_batch=1, micro_batch=1)
        >>> [recipe.learning_rate(step) for step in (0, 1, 2, 4, 6)]
        [1.0, 2.0, 3.0, 2.0, 1.0]
    """

    STAGES: ClassVar[tuple[str, ...]] = ("pretrain", "sft")

    policy: str = "prompt"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(f"AkiRecipe {self.name!r}", "policy", self.policy, POLICIES)


def load_recipe(source: str | Path) -> AkiRecipe:
    """Reads a recipe from a YAML file, or "pretrain" or "sft", which come with the package.

    Raises:
        ConfigError: no such file or name, not YAML, or not a valid recipe.

    Example:
        >>> load_recipe("sft").max_text_tokens
        512
    """
    folder = resources.files("mmkernels.models.aki").joinpath("recipes")
    bundled = {item.name[:-5]: item for item in folder.iterdir() if item.name.endswith(".yaml")}
    return AkiRecipe.from_dict(read_yaml("load_recipe", source, bundled))


def make_optimizer(model: AkiForConditionalGeneration, recipe: AkiRecipe) -> torch.optim.AdamW:
    """AdamW over all but the frozen vision tower; the token tables are not decayed, norms and biases are (as AKI's)."""
    model.vision_tower.requires_grad_(False)
    tables = {id(model.get_input_embeddings().weight), id(model.extra_embedding.weight)}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) not in tables], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if id(p) in tables], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr)
