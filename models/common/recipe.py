"""StageRecipe: rates, batches and steps of one supervised training stage; each model adds what is its own."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from mmkernels._recipes import one_of, plain, read_fields, require

PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class StageRecipe:
    """One stage of supervised training, read strictly from YAML.

    Args:
        name: of the recipe.
        stage: one of the model's `STAGES`.
        lr, min_lr: from min_lr up to lr over warmup_steps, then down to min_lr along half a cosine.
        warmup_steps, steps: optimizer steps.
        global_batch: samples of one optimizer step over all processes.
        micro_batch: samples of one forward pass of one process.
        max_text_tokens: longer texts lose their end; images count as the model's processor says.
        weight_decay: of the parameters the model's optimizer decays.
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

    STAGES: ClassVar[tuple[str, ...]] = ()

    name: str
    stage: str
    lr: float
    min_lr: float
    warmup_steps: int
    steps: int
    global_batch: int
    micro_batch: int
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
        where = f"{type(self).__name__} {self.name!r}"
        one_of(where, "stage", self.stage, self.STAGES)
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
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Strictly: unknown fields, wrong types and values out of range are errors that name the nearest valid one."""
        return read_fields(cls, values, "recipe")

    def learning_rate(self, step: int) -> float:
        """At optimizer step `step`, from 0: warm-up, then half a cosine."""
        span = self.lr - self.min_lr
        if step < self.warmup_steps:
            return self.min_lr + span * step / self.warmup_steps
        done = min((step - self.warmup_steps) / max(self.steps - self.warmup_steps, 1), 1.0)
        return self.min_lr + span * 0.5 * (1.0 + math.cos(math.pi * done))
