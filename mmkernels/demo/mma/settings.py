"""What the comparison trains and how much of it."""

from dataclasses import dataclass
from pathlib import Path

from mmkernels.data import CanvasTask
from mmkernels.demo.mma.arms import ARMS, Arm
from mmkernels.errors import ConfigError, nearest


@dataclass(frozen=True)
class MMASettings:
    """One run of the comparison.

    Args:
        out: folder for the table, the pictures and results.json.
        source: "digits", or a folder of MNIST-format idx files.
        label_words: names of the labels: "digits" or "fashion".
        seed: the first seed; seeds the initial weights and the data, the same for every arm.
        seeds: how many seeds: seed, seed + 1, ...
        steps: optimiser steps of every arm.
        batch_size: canvases a step.
        learning_rate: peak of the cosine schedule, the same for every arm.
        questions: unseen questions asked at the end; the points of the curve before it ask a quarter of them.
        points: of the learning curve.
        arms: keys of `ARMS`, in the order of the table.
        workers: processes of one thread each; None: as many as torch has threads.
    """

    out: Path = Path("out/mma")
    source: str = "digits"
    label_words: str = "digits"
    seed: int = 0
    seeds: int = 1
    steps: int = 400
    batch_size: int = 48
    learning_rate: float = 2e-3
    questions: int = 2000
    points: int = 8
    arms: tuple[str, ...] = tuple(arm.key for arm in ARMS)
    workers: int | None = None

    def __post_init__(self) -> None:
        for name in ("seeds", "steps", "batch_size", "questions", "points"):
            if getattr(self, name) < 1:
                raise ConfigError(f"MMASettings: {name} must be at least 1; got {getattr(self, name)}. Raise it.")
        if self.learning_rate <= 0:
            raise ConfigError(f"MMASettings: learning_rate must be above 0; got {self.learning_rate}. Try 2e-3.")
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"MMASettings: workers must be at least 1; got {self.workers}. None chooses.")
        known = [arm.key for arm in ARMS]
        for key in self.arms:
            if key not in known:
                raise ConfigError(f"MMASettings: arms must be known; got {key!r}. {nearest(key, known)}")
        if not self.arms or len(set(self.arms)) != len(self.arms):
            raise ConfigError(f"MMASettings: arms must name one arm at least, each once; got {self.arms}.")

    def chosen(self) -> list[Arm]:
        """The arms of this run."""
        by_key = {arm.key: arm for arm in ARMS}
        return [by_key[key] for key in self.arms]

    def all_seeds(self) -> range:
        """seed, seed + 1, ..., as many as wanted."""
        return range(self.seed, self.seed + self.seeds)

    def task(self, seed: int) -> CanvasTask:
        """The data of a seed: "what is in the topleft ?", asked after the image."""
        return CanvasTask(
            self.source,
            kinds=("pos",),
            order="image_first",
            channels=1,
            label_words=self.label_words,
            seed=seed,
        )
