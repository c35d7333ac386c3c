"""The run itself: teacher, linear student in three stages, hybrid, controls beside them, measurements, report."""

import dataclasses
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mmkernels.data import CanvasTask
from mmkernels.demo.controls import Controls
from mmkernels.demo.data import canvas_processor, save_canvases
from mmkernels.demo.report import accuracy_table, decode_table, machine_facts, targets, write_report
from mmkernels.demo.scaling import decode_series
from mmkernels.demo.settings import DemoSettings
from mmkernels.demo.steps import canvas_task, distil, finish, train_teacher
from mmkernels.demo.teacher import accuracy

HYBRID = "head_interleaved:4"


class Stopwatch:
    """Seconds of each part of the run, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time the block under a name; a name used twice adds up."""
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


def run_demo(settings: DemoSettings) -> dict[str, Any]:
    """Run everything and write `settings.out`: report.md, report.json, two pictures, canvases, three models.

    Returns:
        The figures of report.json.

    Raises:
        ConfigError, DataError: bad settings or data, before anything is trained.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # saving a small model needs no bar
    out, watch = settings.out, Stopwatch()
    task = canvas_task(settings)
    out.mkdir(parents=True, exist_ok=True)
    canvases = save_canvases(task, out / "canvases")
    cores = torch.get_num_threads()
    scores: dict[str, dict[str, float]] = {}
    with watch.part("everything"):
        with Controls(settings) as controls:
            models = _train(settings, task, controls, scores, watch)
            with watch.part("waiting for the controls"):
                scores.update(controls.results())
        torch.set_num_threads(cores)
        with watch.part("decode measurements"):
            decode = decode_series(models, settings.contexts)
    results = {
        "accuracy": scores,
        "decode": decode,
        "seconds": watch.seconds,
        "parameters": {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()},
        "backends": _backends_in_use(),
        "machine": machine_facts(),
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(settings).items()},
        "command": " ".join(["mmkernels", *sys.argv[1:]]),
    }
    write_report(results, out)
    _say(results, out, canvases)
    return results


def _train(
    settings: DemoSettings, task: CanvasTask, controls: Controls, scores: dict[str, dict[str, float]], watch: Stopwatch
) -> dict[str, Any]:
    """Teacher, linear and hybrid, each saved with its processor as soon as it is ready."""
    from mmkernels.distill import restore_attention

    with watch.part("teacher"):
        teacher = train_teacher(settings, task)
        _save(teacher, task, settings.out / "teacher")
        controls.teacher_is_ready()
        scores["teacher"] = accuracy(teacher, task, settings.questions)
    _print_score("teacher", scores)
    with watch.part("linear: stages 1 and 2"):
        student, new = distil(settings, task, teacher, seeding="inherit_mimic", prefix="linear")
        scores.update(new)
    for key in new:
        _print_score(key, scores)
    with watch.part("hybrid: stage 3"):
        hybrid = restore_attention(student, teacher, HYBRID)
        scores["hybrid_seeded"] = accuracy(hybrid, task, settings.questions)
        hybrid = finish(settings, task, teacher, hybrid)
        scores["hybrid_stage3"] = accuracy(hybrid, task, settings.questions)
    _print_score("hybrid_stage3", scores)
    with watch.part("linear: stage 3"):
        linear = finish(settings, task, teacher, student)
        scores["linear_stage3"] = accuracy(linear, task, settings.questions)
    _print_score("linear_stage3", scores)
    _save(hybrid, task, settings.out / "hybrid")
    _save(linear, task, settings.out / "linear")
    return {"teacher": teacher, "hybrid": hybrid.eval(), "linear": linear.eval()}


def _save(model: Any, task: CanvasTask, folder: Path) -> None:
    model.generation_config.max_new_tokens = 1  # answers are one word
    model.save_pretrained(folder)
    canvas_processor(task, model.config).save_pretrained(folder)


def _backends_in_use() -> dict[str, str]:
    """What each op of the models runs on here, asked of the dispatcher itself."""
    from mmkernels import explain

    x, dt, decay, b = torch.zeros(1, 2, 2, 4), torch.zeros(1, 2, 2), -torch.ones(2), torch.zeros(1, 2, 2, 4)
    calls: dict[str, tuple[Any, ...]] = {
        "ssd_scan": (x, dt, decay, b, b),
        "causal_conv1d": (torch.zeros(1, 2, 4), torch.zeros(4, 2)),
        "gated_rms_norm": (torch.zeros(2, 4), torch.ones(4)),
    }
    return {op: str(explain(op, *arguments).chosen) for op, arguments in calls.items()}


def _print_score(key: str, scores: dict[str, dict[str, float]]) -> None:
    kinds = "  ".join(f"{kind} {value:.3f}" for kind, value in scores[key].items() if kind != "all")
    print(f"{key.replace('_', ' '):<18} accuracy {scores[key]['all']:.3f}   ({kinds})", flush=True)


def _say(results: dict[str, Any], out: Path, canvases: list[tuple[str, str, str]]) -> None:
    print(f"\n{accuracy_table(results['accuracy'])}\n\n{decode_table(results['decode'])}\n")
    for text, met in targets(results["accuracy"]):
        print(f"{'met    ' if met else 'NOT MET'}  {text}")
    name, question, truth = canvases[0]
    print(
        f"\n{results['seconds']['everything']:.0f} s.  Report: {out / 'report.md'}, pictures beside it.  Ask the model:"
    )
    picture = out / "canvases" / name
    print(f'  mmkernels generate --model {out / "linear"} --image {picture} --question "{question}"')
    print(f"  (the truth is: {truth})")
