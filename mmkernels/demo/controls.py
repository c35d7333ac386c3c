"""The two control models, trained in a second process beside the main one.

"trained_from_scratch": the linear student without a teacher, on the questions themselves, for as many steps as the
distillation takes.  "scratch_seeding": the same three stages, mixers seeded at random instead of from attention.
"""

import json
import multiprocessing
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from mmkernels.demo.settings import DemoSettings
from mmkernels.demo.steps import canvas_task, demo_recipe, distil, finish
from mmkernels.demo.teacher import accuracy, teacher_config, train_on_answers
from mmkernels.errors import MMKernelsError


class Controls:
    """A context in which the controls train; leaving it early stops them.

    With settings.controls off there is no second process and no control.
    """

    def __init__(self, settings: DemoSettings):
        self.settings = settings
        self.folder = settings.out / "controls"
        self.process: Any = None
        self.ready: Any = None

    def __enter__(self) -> "Controls":
        if self.settings.controls:
            self.folder.mkdir(parents=True, exist_ok=True)
            for stale in self.folder.iterdir():
                stale.unlink()
            # The two processes share the cores instead of fighting for them.
            mine = max(1, torch.get_num_threads() // 2)
            torch.set_num_threads(mine)
            context = multiprocessing.get_context("spawn")
            self.ready = context.Event()
            self.process = context.Process(target=_train_controls, args=(self.settings, mine, self.ready), daemon=True)
            self.process.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process is not None and self.process.is_alive():
            self.process.terminate()

    def teacher_is_ready(self) -> None:
        """Tell the second process that the teacher has been saved."""
        if self.ready is not None:
            self.ready.set()

    def results(self) -> dict[str, dict[str, float]]:
        """Wait for the controls; accuracy by name, empty when they are off.

        Raises:
            MMKernelsError: the second process failed; its traceback is in the message.
        """
        if self.process is None:
            return {}
        self.process.join()
        failure = self.folder / "failure.txt"
        if self.process.exitcode != 0:
            detail = failure.read_text() if failure.exists() else f"exit code {self.process.exitcode}"
            raise MMKernelsError(
                f"demo: the process that trains the controls failed. Run with --no-controls.\n{detail}"
            )
        return {p.stem: json.loads(p.read_text()) for p in sorted(self.folder.glob("*.json"))}


def _train_controls(settings: DemoSettings, threads: int, ready: Any) -> None:
    folder = settings.out / "controls"
    torch.set_num_threads(threads)
    try:
        (folder / "trained_from_scratch.json").write_text(json.dumps(_without_teacher(settings)))
        ready.wait()
        (folder / "scratch_seeding_stage3.json").write_text(json.dumps(_scratch_seeding(settings, settings.out)))
    except BaseException:  # whatever it was, the main process shows it; then it goes on its way
        (folder / "failure.txt").write_text(traceback.format_exc())
        raise


def _without_teacher(settings: DemoSettings) -> dict[str, float]:
    from mmkernels.models.mmmamba import MMMambaForConditionalGeneration

    task = canvas_task(settings)
    stages = demo_recipe(settings).stages
    config = teacher_config(task)
    config.layer_types = ["linear_attention"] * config.total_layers
    torch.manual_seed(settings.seed)
    student = MMMambaForConditionalGeneration(config)
    steps = sum(stage.steps for stage in stages)
    train_on_answers(student, task, steps=steps, batch_size=stages[0].global_batch)
    return accuracy(student, task, settings.questions)


def _scratch_seeding(settings: DemoSettings, out: Path) -> dict[str, float]:
    from mmkernels.models.mmmamba import MMMambaForConditionalGeneration

    task = canvas_task(settings)
    teacher = MMMambaForConditionalGeneration.from_pretrained(out / "teacher")
    student, _ = distil(settings, task, teacher, seeding="scratch", prefix="scratch", progress=False)
    student = finish(settings, task, teacher, student, progress=False)
    return accuracy(student, task, settings.questions)
