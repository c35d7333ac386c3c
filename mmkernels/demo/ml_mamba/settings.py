"""What the demo and the comparison of connectors train, and how much of it."""

from dataclasses import dataclass
from pathlib import Path

from mmkernels.data import CanvasTask
from mmkernels.demo.ml_mamba.arms import ARMS, Arm
from mmkernels.errors import ConfigError, nearest


@dataclass(frozen=True)
class MLMambaSettings:
    """One run.

    Args:
        out: folder for the model, tables, pictures and results.json.
        source: "digits", or a folder of MNIST-format idx files.
        label_words: names of the labels: "digits" or "fashion".
        seed: the first seed, of weights and data.
        seeds: how many seeds: seed, seed + 1, ...
        grid: cells along a side of a canvas.
        patches: patches along a side of a cell; with more than one, no patch shows a whole scan.
        words_steps: most steps in which the language model learns the questions from words, before it sees an image.
        steps: steps of the align stage: patches and connector are trained, the language model is frozen.
        finetune_steps: steps in which the language model is trained, too (the demo; the comparison has none).
        batch_size: canvases a step.
        turns: questions about each canvas of a batch.
        words_rate, align_rate, finetune_rate: peaks of the cosine schedules.
        questions: unseen questions asked at the end; the points of the curve before it ask a quarter of them.
        points: of the learning curve.
        arms: keys of `ARMS`, in the order of the table; the demo trains the first.
        workers: processes of one thread each; None: as many as torch has threads.
    """

    out: Path = Path("out/ml_mamba")
    source: str = "digits"
    label_words: str = "digits"
    seed: int = 0
    seeds: int = 1
    grid: int = 2
    patches: int = 2
    words_steps: int = 2000
    steps: int = 200
    finetune_steps: int = 0
    batch_size: int = 48
    turns: int = 4
    words_rate: float = 3e-3
    align_rate: float = 2e-3
    finetune_rate: float = 1e-3
    questions: int = 2000
    points: int = 8
    arms: tuple[str, ...] = tuple(arm.key for arm in ARMS)
    workers: int | None = None

    def __post_init__(self) -> None:
        for name in ("seeds", "grid", "patches", "words_steps", "steps", "batch_size", "turns", "questions", "points"):
            if getattr(self, name) < 1:
                raise ConfigError(f"MLMambaSettings: {name} must be at least 1; got {getattr(self, name)}. Raise it.")
        for name in ("words_rate", "align_rate", "finetune_rate"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"MLMambaSettings: {name} must be above 0; got {getattr(self, name)}. Try 2e-3.")
        if self.finetune_steps < 0:
            raise ConfigError(f"MLMambaSettings: finetune_steps must be 0 or more; got {self.finetune_steps}.")
        if self.turns > self.grid**2:
            raise ConfigError(
                f"MLMambaSettings: turns must be at most the {self.grid**2} cells of a canvas; got {self.turns}."
            )
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"MLMambaSettings: workers must be at least 1; got {self.workers}. None chooses.")
        known = [arm.key for arm in ARMS]
        for key in self.arms:
            if key not in known:
                raise ConfigError(f"MLMambaSettings: arms must be known; got {key!r}. {nearest(key, known)}")
        if not self.arms or len(set(self.arms)) != len(self.arms):
            raise ConfigError(f"MLMambaSettings: arms must name one arm at least, each once; got {self.arms}.")

    def chosen(self) -> list[Arm]:
        """The arms of this run."""
        by_key = {arm.key: arm for arm in ARMS}
        return [by_key[key] for key in self.arms]

    def all_seeds(self) -> range:
        """seed, seed + 1, ..., as many as wanted."""
        return range(self.seed, self.seed + self.seeds)

    def task(self, seed: int) -> CanvasTask:
        """The canvases of a seed."""
        return CanvasTask(
            self.source,
            grid=self.grid,
            kinds=("pos",),
            order="image_first",
            tokens_per_cell=self.patches,
            channels=1,
            label_words=self.label_words,
            seed=seed,
        )


DEMO = MLMambaSettings(arms=("advanced",), finetune_steps=300)
