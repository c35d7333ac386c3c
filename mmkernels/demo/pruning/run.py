"""The run itself: train one model on all tokens, prune it in every way, write tables, pictures and the model."""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from mmkernels._progress import progress_bar
from mmkernels.demo.pruning.arms import ARMS
from mmkernels.demo.pruning.measure import by_answer, cls_mass, measure, unseen
from mmkernels.demo.pruning.model import save
from mmkernels.demo.pruning.pictures import TITLES, plot_curves, plot_lit, save_canvases
from mmkernels.demo.pruning.report import QUARTER, findings, markdown, mass_table, table
from mmkernels.demo.pruning.settings import PruningSettings
from mmkernels.demo.pruning.task import KINDS, PruningTask
from mmkernels.demo.pruning.train import train
from mmkernels.demo.report import machine_facts


def run_pruning_demo(settings: PruningSettings) -> dict[str, Any]:
    """Train, prune, and write `settings.out`: table.md, curves.png, lit.png, results.json, model, canvases.

    Returns:
        The figures of results.json.

    Raises:
        ConfigError, DataError: bad settings or data, before anything is trained.
    """
    task = PruningTask(settings.source, label_words=settings.label_words, seed=settings.seed)
    settings.out.mkdir(parents=True, exist_ok=True)
    load, started = _load(), time.perf_counter()
    with progress_bar(settings.steps, "training") as bar:
        model, losses = train(task, settings, bar.update)
    trained = time.perf_counter() - started
    save(model, task, settings.out / "model")
    canvases = save_canvases(task, settings.out)
    with progress_bar(len(ARMS) * len(settings.kept), "pruning") as bar:
        results = measure(model, task, settings, bar.update)
    vision = model.model.vision_tower
    results |= {
        "guess": {kind: most_common(task, kind, settings.questions) for kind in KINDS},
        "by_answer": by_answer(model, task, settings.questions, QUARTER),
        "cls_mass": cls_mass(model, task, settings.questions),
        "answer_loss": losses,
        "parameters": sum(p.numel() for p in model.parameters()),
        "vision_parameters": sum(p.numel() for p in vision.parameters()),
        "training_seconds": trained,
        "seconds": time.perf_counter() - started,
        "threads": torch.get_num_threads(),
        "load": load,
        "machine": machine_facts(),
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(settings).items()},
        "command": " ".join(["mmkernels", *sys.argv[1:]]),
    }
    write(results, model, task, settings)
    print("\n" + "\n\n".join(table(results, kind) for kind in TITLES) + f"\n\n{mass_table(results)}\n")
    for text, met in findings(results):
        print(f"{'shown    ' if met else 'NOT SHOWN'}  {text}")
    print(
        f"\n{results['seconds']:.0f} s.  {settings.out / 'table.md'}; curves.png, lit.png, results.json, model beside "
        f"it.  Try: mmkernels prune --model {settings.out / 'model'} --image {canvases[0]} --show lit.png"
    )
    return results


def write(results: dict[str, Any], model: Any, task: PruningTask, settings: PruningSettings) -> None:
    """Tables, pictures and figures."""
    plot_curves(results, settings.out / "curves.png")
    plot_lit(model, task, QUARTER if QUARTER in settings.kept else max(settings.kept), settings.out / "lit.png")
    (settings.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (settings.out / "table.md").write_text(markdown(results, "curves.png", "lit.png"))


def most_common(task: PruningTask, kind: str, questions: int) -> float:
    """Accuracy of always giving the most common answer."""
    batches = unseen(task, kind, questions)
    if batches[0].answer_ids[0] >= 0:
        answers = torch.cat([batch.answer_ids for batch in batches])
        return int(answers.bincount().max()) / len(answers)
    sets = torch.cat([batch.present for batch in batches])
    return int(sets.unique(dim=0, return_counts=True)[1].max()) / len(sets)


def _load() -> str:
    # what else the machine was doing when the clock started; accuracies do not depend on it, seconds do
    return f"load average {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else "load unknown"
