"""What the demo of pruning trains and measures, and how much of it."""

from dataclasses import dataclass
from pathlib import Path

from mmkernels.errors import ConfigError


@dataclass(frozen=True)
class PruningSettings:
    """One run.

    Args:
        out: folder for the table, the pictures, results.json and the model.
        source: "digits", or a folder of MNIST-format idx files.
        label_words: names of the labels: "digits" or "fashion".
        seed: of weights and data.
        steps: optimiser steps.
        batch_size: questions a step.
        learning_rate: peak of the cosine schedule.
        questions: unseen questions of each kind.
        kept: numbers of tokens to prune to.
        random_seeds: draws of the random control.
    """

    out: Path = Path("out/pruning")
    source: str = "digits"
    label_words: str = "digits"
    seed: int = 0
    steps: int = 1200
    batch_size: int = 36
    learning_rate: float = 3e-3
    questions: int = 800
    kept: tuple[int, ...] = (18, 12, 9, 6, 4, 2)
    random_seeds: int = 3

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "questions", "random_seeds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"PruningSettings: {name} must be at least 1; got {getattr(self, name)}. Raise it.")
        if self.learning_rate <= 0:
            raise ConfigError(f"PruningSettings: learning_rate must be above 0; got {self.learning_rate}. Try 3e-3.")
        if not self.kept or not all(1 <= k < 36 for k in self.kept) or len(set(self.kept)) != len(self.kept):
            raise ConfigError(f"PruningSettings: kept must be different numbers in 1 .. 35; got {self.kept}.")
