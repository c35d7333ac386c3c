"""The run itself: every arm trained beside the others, one table, two pictures, results.json."""

import dataclasses
import os
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from mmkernels.data import CanvasTask
from mmkernels.demo.jobs import train_all
from mmkernels.demo.mma.arms import ARMS, Arm
from mmkernels.demo.mma.report import final_loss, findings, table, write_report
from mmkernels.demo.mma.settings import MMASettings
from mmkernels.demo.mma.train import check_arm, fresh_model, majority, train_one
from mmkernels.demo.report import machine_facts
from mmkernels.errors import DataError


def run_mma_demo(settings: MMASettings) -> dict[str, Any]:
    """Train every arm and write `settings.out`: report.md, results.json, curves.png, masks.png.

    Returns:
        The figures of results.json.

    Raises:
        ConfigError, DataError: bad settings or data, before anything is trained.
    """
    from mmkernels import explain

    task = settings.task(settings.seed)
    settings.out.mkdir(parents=True, exist_ok=True)
    q = torch.zeros(1, 2, 4, 32)
    backend = str(explain("mma_attention", q, q, q).chosen)  # builds the native library once, before the workers start
    load, started = _load(), time.perf_counter()
    runs = train_all(settings, train_one, settings.steps, _say_one)
    results = {
        "runs": runs,
        "majority": fmean(majority(settings.task(seed), settings.questions) for seed in settings.all_seeds()),
        "leak_refused_with": leak_refusal(task),
        "parameters": sum(p.numel() for p in fresh_model(task, settings.seed).parameters()),
        "seconds": time.perf_counter() - started,
        "workers": min(settings.workers or torch.get_num_threads(), settings.seeds * len(settings.arms)),
        "load": load,
        "backend": backend,
        "machine": machine_facts(),
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(settings).items()},
        "command": " ".join(["mmkernels", *sys.argv[1:]]),
    }
    write_report(results, task, settings.out)
    print(f"\n{table(results)}\n")
    for text, met in findings(results):
        print(f"{'shown    ' if met else 'NOT SHOWN'}  {text}")
    print(
        f"\n{results['seconds']:.0f} s.  {settings.out / 'report.md'}; curves.png, masks.png, results.json beside it."
    )
    return results


def leak_refusal(task: CanvasTask) -> str:
    """What check_no_label_leak says to the planted leak; empty if it lets it pass."""
    try:
        check_arm(task, next(arm for arm in ARMS if arm.opens == "answer"))
    except DataError as error:
        return str(error)
    return ""


def _load() -> str:
    # What else the machine was doing when the clock started; the accuracies do not depend on it, the seconds do.
    return f"load average {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else "load unknown"


def _say_one(arm: Arm, seed: int, result: dict[str, Any]) -> None:
    print(
        f"{arm.label:<31} seed {seed}  accuracy {result['accuracy']:.3f}  training loss {final_loss(result):.4f}  "
        f"cells read {result['cells_read']:.3f}",
        flush=True,
    )
