"""The steps of the demo that the main run and its controls share: the data, the teacher, the stages."""

import dataclasses
from typing import Any

import torch

from mmkernels._progress import progress_bar
from mmkernels.data import CanvasTask
from mmkernels.demo.settings import DemoSettings
from mmkernels.demo.teacher import accuracy, teacher_config, train_on_answers


def canvas_task(settings: DemoSettings) -> CanvasTask:
    """The data of a run."""
    return CanvasTask(settings.source, label_words=settings.label_words, seed=settings.seed)


def demo_recipe(settings: DemoSettings) -> Any:
    """The packaged recipe `demo`, with the run's seed and amount of steps."""
    from mmkernels.distill import load_recipe

    recipe = dataclasses.replace(load_recipe("demo"), seed=settings.seed)
    return recipe if settings.stage_scale == 1.0 else recipe.scaled(settings.stage_scale)


def train_teacher(settings: DemoSettings, task: CanvasTask) -> Any:
    """A fresh teacher, trained with a progress bar."""
    from mmkernels.models.mmmamba import MMMambaForConditionalGeneration

    torch.manual_seed(settings.seed)
    teacher = MMMambaForConditionalGeneration(teacher_config(task))
    with progress_bar(settings.teacher_steps, "teacher") as bar:

        def on_step(step: int, loss: float) -> None:
            bar.update()
            if step % 20 == 0:
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)

        train_on_answers(teacher, task, steps=settings.teacher_steps, batch_size=settings.batch_size, on_step=on_step)
    return teacher


def distil(
    settings: DemoSettings, task: CanvasTask, teacher: Any, *, seeding: str, prefix: str, progress: bool = True
) -> tuple[Any, dict[str, dict[str, float]]]:
    """Seed a linear student and take it through stages 1 and 2; accuracy before and after each.

    Returns:
        The student after stage 2 and {"<prefix>_seeded", "<prefix>_stage1", "<prefix>_stage2"}.
    """
    from mmkernels.distill import linearize, run

    recipe = dataclasses.replace(demo_recipe(settings), seeding=seeding)
    student = linearize(teacher, seeding=seeding, seed=settings.seed)
    scores = {f"{prefix}_seeded": accuracy(student, task, settings.questions)}
    data = task.source(start=settings.teacher_steps)
    for name in ("stage1", "stage2"):
        student = run(recipe.only(name), teacher, student, data, progress=progress).student
        scores[f"{prefix}_{name}"] = accuracy(student, task, settings.questions)
    return student, scores


def finish(settings: DemoSettings, task: CanvasTask, teacher: Any, student: Any, *, progress: bool = True) -> Any:
    """Stage 3: the student (linear or hybrid) imitates the teacher's words end to end."""
    from mmkernels.distill import run

    data = task.source(start=settings.teacher_steps)
    return run(demo_recipe(settings).only("stage3"), teacher, student, data, progress=progress).student
