"""What the demo does and how much of it."""

from dataclasses import dataclass, field
from pathlib import Path

from mmkernels.errors import ConfigError


@dataclass(frozen=True)
class DemoSettings:
    """One run of the demo.

    Args:
        out: folder for the report, the pictures and the models.
        source: "digits", or a folder of MNIST-format idx files.
        label_words: names of the labels: "digits" or "fashion".
        seed: of data, initial weights and question sets.
        teacher_steps: optimiser steps of the teacher (batches of `batch_size` canvases).
        batch_size: canvases a step of the teacher (a stage's batch is in the recipe).
        stage_scale: multiplies the number of steps of every distillation stage.
        questions: size of the test set.
        contexts: context lengths at which decoding is timed.
        controls: also train the two controls (scratch seeding, no teacher), in a second process.
    """

    out: Path = Path("out")
    source: str = "digits"
    label_words: str = "digits"
    seed: int = 0
    teacher_steps: int = 1400
    batch_size: int = 32
    stage_scale: float = 1.0
    questions: int = 2000
    contexts: tuple[int, ...] = field(default=(1024, 4096, 16384, 65536, 103_000))
    controls: bool = True

    def __post_init__(self) -> None:
        for name in ("teacher_steps", "batch_size", "questions"):
            if getattr(self, name) < 1:
                raise ConfigError(f"DemoSettings: {name} must be at least 1; got {getattr(self, name)}. Raise it.")
        if self.stage_scale <= 0:
            raise ConfigError(f"DemoSettings: stage_scale must be above 0; got {self.stage_scale}. 1 is the default.")
        if not self.contexts or min(self.contexts) < 1:
            raise ConfigError(f"DemoSettings: contexts must be positive lengths; got {self.contexts}.")
