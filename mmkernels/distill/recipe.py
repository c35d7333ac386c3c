"""Distillation recipes: dataclasses, and YAML files read strictly into them.

Source: mmMamba (arXiv 2502.13145) section 5.1 and the settings shipped with its official code.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from mmkernels._recipes import one_of, plain, read_fields, read_yaml, require
from mmkernels.distill.linearize import parse_keep_attention
from mmkernels.distill.losses import KL_REDUCTIONS, MASKS, MSE_REDUCTIONS
from mmkernels.distill.seeding import STRATEGIES
from mmkernels.distill.stages import TARGETS

LOSSES = ("layer_mse", "logit_kl")
PRECISIONS = ("fp32", "bf16")
_ANY_DEPTH = 1 << 16


@dataclass(frozen=True)
class StageConfig:
    """One stage: what is compared, what is trained, and for how long.

    Args:
        name: shown in logs and used to select stages.
        loss: "layer_mse" (stages 1 and 2) or "logit_kl" (stage 3).
        trainable: sets of `mmkernels.distill.stages.TRAINABLE`, or patterns of parameter names.
        lr: peak learning rate of the warmup-stable-decay schedule.
        warmup_steps, stable_steps, decay_steps: optimizer steps of linear warm-up, constant rate, cosine decay to 0.
        max_steps: where the stage ends; None = the sum of the three.  A smaller value cuts the schedule short.
        global_batch: samples of one optimizer step over all processes.
        micro_batch: samples of one forward pass of one process; accumulation is worked out from the two.
        betas, eps, weight_decay: AdamW; names that contain "bias" (dt_bias, A_log_bias, too) are not decayed.
        max_grad_norm: gradient clipping by global norm; 0 = none.
        target: layer_mse: "context" (before W_O) or "block_output" (after it).
        loss_scale, mse_reduction: layer_mse: see `layerwise_mse`.
        temperature, kl_reduction: logit_kl: see `logit_kl`.
        mask: positions that count: "all" (padding too), "non_pad" or "answer".
        keep_attention: layers that get the teacher's attention back before this stage; None = leave the student be.
    """

    name: str
    loss: str
    trainable: tuple[str, ...]
    lr: float
    warmup_steps: int
    stable_steps: int
    decay_steps: int
    global_batch: int
    micro_batch: int
    max_steps: int | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.05
    max_grad_norm: float = 5.0
    target: str = "block_output"
    loss_scale: float = 1000.0
    mse_reduction: str = "element_mean"
    temperature: float = 1.0
    kl_reduction: str = "sequence_sum"
    mask: str = "non_pad"
    keep_attention: str | tuple[int, ...] | None = None

    @property
    def steps(self) -> int:
        """Optimizer steps of the stage."""
        return self.max_steps if self.max_steps is not None else self.schedule_steps

    @property
    def schedule_steps(self) -> int:
        """Optimizer steps until the schedule reaches learning rate 0."""
        return self.warmup_steps + self.stable_steps + self.decay_steps

    def __post_init__(self) -> None:
        where = f"StageConfig {self.name!r}"
        one_of(where, "loss", self.loss, LOSSES)
        one_of(where, "target", self.target, TARGETS)
        one_of(where, "mse_reduction", self.mse_reduction, MSE_REDUCTIONS)
        one_of(where, "kl_reduction", self.kl_reduction, KL_REDUCTIONS)
        one_of(where, "mask", self.mask, MASKS)
        require(where, "trainable", self.trainable, bool(self.trainable), "name at least one set of parameters")
        for name in ("lr", "eps", "loss_scale", "temperature"):
            require(where, name, getattr(self, name), getattr(self, name) > 0, "be positive")
        for name in ("warmup_steps", "stable_steps", "decay_steps", "weight_decay", "max_grad_norm"):
            require(where, name, getattr(self, name), getattr(self, name) >= 0, "be 0 or more")
        for name in ("global_batch", "micro_batch"):
            require(where, name, getattr(self, name), getattr(self, name) >= 1, "be at least 1")
        whole = self.global_batch % self.micro_batch == 0
        require(where, "global_batch", self.global_batch, whole, f"be a multiple of micro_batch {self.micro_batch}")
        require(where, "betas", self.betas, all(0 <= b < 1 for b in self.betas), "lie in [0, 1)")
        fits = 1 <= self.steps <= self.schedule_steps
        wanted = (
            f"lie between 1 and the {self.schedule_steps} steps of the schedule (after them the learning rate is 0)"
        )
        require(where, "max_steps", self.steps, fits, wanted)
        if isinstance(self.keep_attention, str):
            parse_keep_attention(self.keep_attention, _ANY_DEPTH)


@dataclass(frozen=True)
class DistillRecipe:
    """A chain of stages and what they share.

    Args:
        name: of the recipe; part of what a checkpoint remembers.
        stages: run in this order, each from where the one before ended.
        seed: seeds the student's new parameters and the trainer's random state.
        seeding: how mixers are seeded when the student is made from the teacher: see `seed_mixer`.
        keep_attention: layers that keep attention from the first stage on, see `parse_keep_attention`.
        precision: "fp32", or "bf16" autocast with float32 parameters and optimizer states.
        max_length: refuse longer sequences (leave them out in the data); None = any.
        log_every, checkpoint_every, eval_every: in optimizer steps; 0 = only at the end of a stage.
        keep_checkpoints: how many of the latest to keep.
        about: a sentence on where the numbers come from.
    """

    name: str
    stages: tuple[StageConfig, ...]
    seed: int = 0
    seeding: str = "inherit_mimic"
    keep_attention: str | tuple[int, ...] = ()
    precision: str = "fp32"
    max_length: int | None = None
    log_every: int = 10
    checkpoint_every: int = 500
    eval_every: int = 0
    keep_checkpoints: int = 2
    about: str = ""

    def __post_init__(self) -> None:
        where = f"DistillRecipe {self.name!r}"
        one_of(where, "seeding", self.seeding, STRATEGIES)
        one_of(where, "precision", self.precision, PRECISIONS)
        names = [stage.name for stage in self.stages]
        require(where, "stages", names, bool(names) and len(set(names)) == len(names), "be one or more, named apart")
        for name in ("log_every", "checkpoint_every", "eval_every", "seed"):
            require(where, name, getattr(self, name), getattr(self, name) >= 0, "be 0 or more")
        require(where, "keep_checkpoints", self.keep_checkpoints, self.keep_checkpoints >= 1, "be at least 1")
        require(where, "max_length", self.max_length, self.max_length is None or self.max_length >= 1, "be at least 1")
        if isinstance(self.keep_attention, str):
            parse_keep_attention(self.keep_attention, _ANY_DEPTH)

    def only(self, *names: str) -> "DistillRecipe":
        """The recipe with some of its stages, in the recipe's order.

        Raises:
            ConfigError: no name, or an unknown stage.
        """
        known = [stage.name for stage in self.stages]
        for name in names:
            one_of(f"DistillRecipe {self.name!r}", "stage", name, known)
        return dataclasses.replace(self, stages=tuple(stage for stage in self.stages if stage.name in names))

    def scaled(self, factor: float) -> "DistillRecipe":
        """The recipe with every stage's steps multiplied by `factor` and rounded, one step at least: for smoke tests.

        Raises:
            ConfigError: factor is not positive.
        """
        require(f"DistillRecipe {self.name!r}", "factor", factor, factor > 0, "be positive")

        def scale(stage: StageConfig) -> StageConfig:
            warmup, stable, decay = (
                round(n * factor) for n in (stage.warmup_steps, stage.stable_steps, stage.decay_steps)
            )
            stable = max(stable, 1 - warmup - decay)
            steps = (
                None
                if stage.max_steps is None
                else max(1, min(round(stage.max_steps * factor), warmup + stable + decay))
            )
            return dataclasses.replace(
                stage, warmup_steps=warmup, stable_steps=stable, decay_steps=decay, max_steps=steps
            )

        return dataclasses.replace(self, stages=tuple(scale(stage) for stage in self.stages))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as a YAML or JSON file holds them; `from_dict` reads them back to an equal recipe."""
        return plain(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DistillRecipe":
        """Strictly: unknown fields, wrong types and values out of range are errors that name the nearest valid one.

        Raises:
            ConfigError: see above.
        """
        return read_fields(cls, values, "recipe")


def load_recipe(source: str | Path) -> DistillRecipe:
    """Reads a recipe from a YAML file, or one that comes with the package by its name ("paper", "official", "demo").

    Raises:
        ConfigError: no such file or name, not YAML, or not a valid recipe.

    Example:
        >>> load_recipe("paper").stages[0].lr
        0.001
    """
    bundled = {item.name[:-5]: item for item in _bundled() if item.name.endswith(".yaml")}
    return DistillRecipe.from_dict(read_yaml("load_recipe", source, bundled))


def _bundled() -> list[Any]:
    return list(resources.files("mmkernels.models.mmmamba").joinpath("recipes").iterdir())
