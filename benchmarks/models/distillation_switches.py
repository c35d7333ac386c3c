"""Where the paper and the official code disagree: each switch of the recipe, alone, on the demo's teacher.

    mmkernels demo --out out && python benchmarks/models/distillation_switches.py out/teacher

Prints a table of accuracy after each stage (2,000 unseen questions, one seed); about a minute an arm on one core.
"""

import argparse
import dataclasses
from pathlib import Path

import torch

from mmkernels.data import CanvasTask
from mmkernels.demo import DemoSettings
from mmkernels.demo.answer import load
from mmkernels.demo.teacher import accuracy
from mmkernels.distill import DistillRecipe, linearize, load_recipe, run


def stages(recipe: DistillRecipe, loss: str, **changes) -> DistillRecipe:
    """The recipe with fields of its layer_mse or logit_kl stages changed."""
    return dataclasses.replace(
        recipe, stages=tuple(dataclasses.replace(s, **changes) if s.loss == loss else s for s in recipe.stages)
    )


def arms() -> dict[str, DistillRecipe]:
    """The packaged demo recipe, and one change each."""
    demo = load_recipe("demo")
    return {
        "demo": demo,
        "target: context (before W_O)": stages(demo, "layer_mse", target="context"),
        "seeding: inherit": dataclasses.replace(demo, seeding="inherit"),
        "seeding: scratch": dataclasses.replace(demo, seeding="scratch"),
        "dt, A frozen in stage 3": stages(demo, "logit_kl", trainable=("mixer_new", "qkv")),
        "KL over every real token": stages(demo, "logit_kl", mask="non_pad"),
        "KL summed over the sequence": stages(demo, "logit_kl", mask="non_pad", kl_reduction="sequence_sum"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher", type=Path)
    parser.add_argument("--only", help="run the arms whose name contains this")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    teacher, _ = load(arguments.teacher)
    task, settings = CanvasTask(), DemoSettings()
    print("| arm | stage 1 | stage 2 | stage 3 |\n|---|---|---|---|")
    for name, recipe in arms().items():
        if arguments.only and arguments.only not in name:
            continue
        student, row = linearize(teacher, seeding=recipe.seeding), []
        for stage in recipe.stages:
            data = task.source(start=settings.teacher_steps)
            student = run(recipe.only(stage.name), teacher, student, data, progress=False).student
            row.append(f"{accuracy(student, task, settings.questions)['all']:.3f}")
        print(f"| {name} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
