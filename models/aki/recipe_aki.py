"""AkiRecipe: one stage of AKI's training, its learning rate and its parameter groups.

Source: AKI (arXiv 2503.02597) and the settings shipped with its official code.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from mmkernels._recipes import one_of, plain, read_fields, read_yaml, require
from mmkernels.models.aki.modeling_aki import AkiForConditionalGeneration
from mmkernels.ops.mma_attention.spans import POLICIES

STAGES = ("pretrain", "sft")
PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class AkiRecipe:
    """One stage: what the loss is on, what images read, and for how long.

    Args:
        name: of the recipe.
        stage: "pretrain" (captions, loss on all text) or "sft" (questions and answers, loss on the answers).
        lr, min_lr: from min_lr up to lr over warmup_steps, then down to min_lr along half a cosine.
        warmup_steps, steps: optimizer steps.
        global_batch: samples of one optimizer step over all processes.
        micro_batch: samples of one forward pass of one process.
        policy: of the attention mask while training, see `AkiConfig`; the saved model keeps its own.
        max_text_tokens: longer texts lose their end; an image counts as one token.
        weight_decay: of everything but the token tables.
        max_grad_norm: clipping by global norm; 0 = none.
        weights: how often each data file is drawn from (with replacement); None = every sample once per epoch.
        precision: "fp32", or "bf16" autocast with float32 parameters and optimizer states.
        seed: of order and random state.
        log_every, checkpoint_every: in optimizer steps; 0 = only at the end.
        keep_checkpoints: how many of the latest to keep.
        about: a sentence on where the numbers come from.

    Raises:
        ConfigError: values out of range.
    """

    name: str
    stage: str
    lr: float
    min_lr: float
    warmup_steps: int
    steps: int
    global_batch: int
    micro_batch: int
    policy: str = "prompt"
    max_text_tokens: int | None = None
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    weights: tuple[float, ...] | None = None
    precision: str = "fp32"
    seed: int = 42
    log_every: int = 10
    checkpoint_every: int = 5000
    keep_checkpoints: int = 2
    about: str = ""

    def __post_init__(self) -> None:
        where = f"AkiRecipe {self.name!r}"
        one_of(where, "stage", self.stage, STAGES)
        one_of(where, "policy", self.policy, POLICIES)
        one_of(where, "precision", self.precision, PRECISIONS)
        require(where, "lr", self.lr, self.lr >= self.min_lr >= 0 and self.lr > 0, "be positive and at least min_lr")
        for name in ("steps", "global_batch", "micro_batch", "keep_checkpoints"):
            require(where, name, getattr(self, name), getattr(self, name) >= 1, "be at least 1")
        for name in ("warmup_steps", "weight_decay", "max_grad_norm", "seed", "log_every", "checkpoint_every"):
            require(where, name, getattr(self, name), getattr(self, name) >= 0, "be 0 or more")
        require(where, "warmup_steps", self.warmup_steps, self.warmup_steps <= self.steps, "be at most steps")
        whole = self.global_batch % self.micro_batch == 0
        require(where, "global_batch", self.global_batch, whole, f"be a multiple of micro_batch {self.micro_batch}")
        drawn = self.weights is None or (all(w >= 0 for w in self.weights) and sum(self.weights) > 0)
        require(where, "weights", self.weights, drawn, "be 0 or more and not all 0")
        limit = self.max_text_tokens
        require(where, "max_text_tokens", limit, limit is None or limit >= 2, "be at least 2")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as a YAML file holds them."""
        return plain(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "AkiRecipe":
        """Strictly: unknown fields, wrong types and values out of range are errors that name the nearest valid one."""
        return read_fields(cls, values, "recipe")

    def learning_rate(self, step: int) -> float:
        """At optimizer step `step`, from 0.

        >>> recipe = AkiRecipe("x", "sft", lr=3.0, min_lr=1.0, warmup_steps=2, steps=6, global_batch=1, micro_batch=1)
        >>> [recipe.learning_rate(step) for step in (0, 1, 2, 4, 6)]
        [1.0, 2.0, 3.0, 2.0, 1.0]
        """
        span = self.lr - self.min_lr
        if step < self.warmup_steps:
            return self.min_lr + span * step / self.warmup_steps
        done = min((step - self.warmup_steps) / max(self.steps - self.warmup_steps, 1), 1.0)
        return self.min_lr + span * 0.5 * (1.0 + math.cos(math.pi * done))


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
