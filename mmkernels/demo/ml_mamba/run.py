"""The demo: one tiny ML-Mamba trained, saved and asked about a picture; the comparison: every connector, every seed."""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from PIL import Image

from mmkernels._progress import progress_bar
from mmkernels.demo.jobs import train_all
from mmkernels.demo.ml_mamba.arms import Arm
from mmkernels.demo.ml_mamba.report import connector_table, demo_report, write_comparison
from mmkernels.demo.ml_mamba.settings import MLMambaSettings
from mmkernels.demo.ml_mamba.talk import CanvasTalk
from mmkernels.demo.ml_mamba.train import learn_words, majority, train_arm
from mmkernels.demo.report import machine_facts

_ZOOM = 6  # of the picture: a canvas is 32 pixels wide


def run_ml_mamba_demo(settings: MLMambaSettings) -> dict[str, Any]:
    """Train a tiny ML-Mamba in its stages, save it, and ask it about a picture that it writes.

    Args:
        settings: the first of its arms is trained.

    Returns:
        What results.json holds; `settings.out` also gets report.md, canvas.png and model/.

    Raises:
        ConfigError, DataError: bad settings or data, before anything is trained.
    """
    arm, seed = settings.chosen()[0], settings.seed
    talk = CanvasTalk(settings.task(seed), settings.turns)
    settings.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with progress_bar(settings.words_steps + settings.steps + settings.finetune_steps, "training") as bar:
        words = learn_words(talk, settings, seed, bar.update)
        model, run = train_arm(arm, settings, seed, words, on_step=bar.update)
    seconds = time.perf_counter() - started
    model.save_pretrained(settings.out / "model")
    from mmkernels.demo.ml_mamba.model import processor_of

    processor_of(talk, model).save_pretrained(settings.out / "model")
    asked = ask_about_a_picture(talk, settings.out)
    results = {
        **run,
        "arm": arm.key,
        "seconds": seconds,
        "majority": majority(talk, settings.questions),
        "parameters": sum(p.numel() for p in model.parameters()),
        "asked": asked,
        **_circumstances(settings, "mmkernels"),
    }
    (settings.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (settings.out / "report.md").write_text(demo_report(results, arm))
    print(f"\naccuracy on unseen canvases {run['accuracy']:.3f} (most common answer {results['majority']:.3f})")
    for line in asked:
        print(
            f"{line['question']}  {line['answer']}  ({'right' if line['answer'] == line['truth'] else line['truth']})"
        )
    print(f"\n{seconds:.0f} s.  {settings.out / 'report.md'}; canvas.png, results.json and model/ beside it.")
    return results


def ask_about_a_picture(talk: CanvasTalk, out: Path) -> list[dict[str, str]]:
    """Write an unseen canvas as canvas.png, load the saved model again, and ask about every cell of the file."""
    from mmkernels.models.ml_mamba import MLMambaForConditionalGeneration, MLMambaProcessor

    batch = talk.batch(7, 1, split="test", turns=talk.task.grid**2)
    pixels = (batch["images"][0, 0] * 255).round().to(torch.uint8).numpy()
    picture = Image.fromarray(pixels)
    picture.resize((picture.width * _ZOOM, picture.height * _ZOOM), Image.Resampling.NEAREST).save(out / "canvas.png")
    model = MLMambaForConditionalGeneration.from_pretrained(out / "model").eval()
    processor = MLMambaProcessor.from_pretrained(out / "model")
    lines = []
    for cell, truth in sorted(zip(batch["cells"][0].tolist(), batch["answers"][0].tolist(), strict=True)):
        question = talk.question(cell)
        inputs = processor(question, images=out / "canvas.png")
        new = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        answer = processor.tokenizer.decode(new, skip_special_tokens=True).strip()
        lines.append({"question": question, "answer": answer, "truth": talk.words[truth]})
    return lines


def compare_connectors(settings: MLMambaSettings, on_results: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Train every arm with every seed in front of the seed's one frozen language model.

    Args:
        settings: arms, seeds, amounts.
        on_results: called with what there is after every arm and seed.

    Returns:
        The results; also in `settings.out` / results.json, beside curves.png, as far as they have come.
    """
    settings.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    for seed in settings.all_seeds():
        talk = CanvasTalk(settings.task(seed), settings.turns)
        torch.save(learn_words(talk, settings, seed), _words_file(settings, seed))
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    results = {
        "runs": runs,
        "majority": fmean(
            majority(CanvasTalk(settings.task(seed), settings.turns), settings.questions)
            for seed in settings.all_seeds()
        ),
        **_circumstances(settings, "python benchmarks/models/ml_mamba_connectors.py"),
    }

    def done(arm: Arm, seed: int, run: dict[str, Any]) -> None:
        runs.setdefault(arm.key, {})[seed] = run
        results["seconds"] = time.perf_counter() - started
        write_comparison(results, settings.out)
        on_results(results)
        print(f"{arm.label:<31} seed {seed}  accuracy {run['accuracy']:.3f}", flush=True)

    train_all(settings, train_one, settings.steps, done)
    print(f"\n{connector_table(results)}\n")
    return results


def train_one(settings: MLMambaSettings, arm: Arm, seed: int, on_step: Callable[[], None]) -> dict[str, Any]:
    """`train_arm` as a job: the language model comes from its file, and only figures go back."""
    words = torch.load(_words_file(settings, seed), weights_only=True)
    started = time.thread_time()
    _, run = train_arm(arm, settings, seed, words, on_step=on_step)
    return {**run, "cpu_seconds": time.thread_time() - started}


def _words_file(settings: MLMambaSettings, seed: int) -> Path:
    return settings.out / f"words-{seed}.pt"


def _circumstances(settings: MLMambaSettings, program: str) -> dict[str, Any]:
    load = f"load average {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else "load unknown"
    return {
        "load": load,
        "machine": machine_facts(),
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(settings).items()},
        "command": " ".join([program, *sys.argv[1:]]),
    }
