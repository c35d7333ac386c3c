"""The demo's report; the comparison of connectors: table, findings, learning curves; all figures in results.json."""

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from mmkernels.demo.ml_mamba.arms import ARMS, Arm
from mmkernels.demo.mma.report import spread

_COLUMNS = 4  # points of the curve that the table shows
_LAST = 20  # training steps whose mean loss is given as the final one
_SMOOTH = 0.9  # of the loss curves in the picture
_SAME = 0.02  # accuracies closer than this are called equal: two standard errors of 2000 questions


def demo_report(results: dict[str, Any], arm: Arm) -> str:
    """report.md of the demo."""
    settings, facts = results["settings"], results["machine"]
    asked = "\n".join(f"| {a['question']} | {a['answer']} | {a['truth']} |" for a in results["asked"])
    curve = ", ".join(f"{point['accuracy']:.3f} (step {point['step']})" for point in results["points"])
    return f"""# A tiny ML-Mamba on real scans

{results["parameters"]:,} parameters; connector: {arm.label}. The language model learned from canvases told in
words until it answered {results["told_in_words"]:.3f} of the questions; then {settings["steps"]} steps of aligning in
front of it, frozen, and {settings["finetune_steps"]} of training both: {results["seconds"]:.0f} s.

Accuracy on {settings["questions"]:,} questions about canvases of scans that no training canvas shows:
**{results["accuracy"]:.3f}**; always giving the most common answer scores {results["majority"]:.3f}.
On the way: {curve}.

![canvas](canvas.png)

| asked about canvas.png | answer | truth |
|---|---|---|
{asked}

- machine: {facts["processor"]}, {facts["cores"]} cores; {results["load"]}
- versions: {", ".join(f"{name} {facts[name]}" for name in ("python", "torch", "transformers", "mmkernels"))}
- command: `{results["command"]}`
"""


def write_comparison(results: dict[str, Any], out: Path) -> None:
    """results.json and curves.png, whole or as far as the runs have come."""
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    plot_connectors(results, out / "curves.png")


def connector_table(results: dict[str, Any]) -> str:
    """One row per arm: accuracy on unseen canvases along the way, training loss, parameters, processor time."""
    runs = results["runs"]
    points = next(iter(next(iter(runs.values())).values()))["points"]
    every = max(1, len(points) // _COLUMNS)
    shown = list(range(len(points) - 1, -1, -every))[::-1]
    head = [f"step {points[i]['step']}" for i in shown]
    lines = [f"| connector | seeds | {' | '.join(head)} | training loss | trained parameters | CPU s a run |"]
    lines.append("|---" * (len(shown) + 5) + "|")
    for arm in ARMS:
        if arm.key in runs:
            found = list(runs[arm.key].values())
            cells = [spread([run["points"][i]["accuracy"] for run in found]) for i in shown]
            cells.append(spread([fmean(run["loss"][-_LAST:]) for run in found]))
            cells += [f"{found[0]['trained']:,}", f"{fmean(run['cpu_seconds'] for run in found):.0f}"]
            lines.append(f"| {arm.label} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def findings(results: dict[str, Any]) -> list[tuple[str, bool]]:
    """What the paper's tables say about connectors, and whether these runs show it."""
    runs = results["runs"]
    score = {key: fmean(run["accuracy"] for run in found.values()) for key, found in runs.items()}
    low = {key: min(run["accuracy"] for run in found.values()) for key, found in runs.items()}
    high = {key: max(run["accuracy"] for run in found.values()) for key, found in runs.items()}

    def above(better: str, worse: str) -> tuple[str, bool]:
        clear = low[better] > high[worse]
        apart = "every seed of one above every seed of the other" if clear else "seeds overlap"
        text = f"{better} {score[better]:.3f} > {worse} {score[worse]:.3f} ({apart})"
        return text, clear and score[better] > score[worse] + _SAME

    found = []
    for better, worse in (("basic", "mlp"), ("advanced", "basic"), ("advanced", "raster")):
        if {better, worse} <= score.keys():
            found.append(above(better, worse))
    if {"advanced", "cross"} <= score.keys():
        near = abs(score["advanced"] - score["cross"]) <= _SAME
        text = f"cross scan (CSM) {score['cross']:.3f} is within {_SAME} of bidirectional (BSM) {score['advanced']:.3f}"
        found.append((text, near))
    return found


def comparison_report(results: dict[str, Any], curves: str) -> str:
    """The table, the picture, what they show and how they were made."""
    settings, facts = results["settings"], results["machine"]
    last = settings["seed"] + settings["seeds"] - 1
    goals = "\n".join(f"- {'shown' if met else 'NOT SHOWN'}: {text}" for text, met in findings(results))
    words = spread([run["told_in_words"] for found in results["runs"].values() for run in found.values()])
    return f"""# Connectors of ML-Mamba: what a scan of the patches is worth

Canvases of {settings["grid"]} x {settings["grid"]} cells with real scans; a cell is cut into
{settings["patches"]} x {settings["patches"]} patches, so that no patch shows a whole scan, and a patch is embedded
linearly, without positions. A Mamba-2 language model has learned the questions ("what is in row1 column2 ?") from
canvases told in words, of which it answers {words}, and is frozen. Patches and connector are trained for
{settings["steps"]} steps in front of it, with the same canvases, questions, schedule and language model for every
connector of a seed. Accuracy is over
{settings["questions"]:,} questions about scans that no training canvas shows (a quarter of them before the last
column); always giving the most common answer scores {results["majority"]:.3f}. Seeds {settings["seed"]}-{last}:
mean (smallest-largest).

{connector_table(results)}

What the paper's tables 6 and 7 say, and what came out here:

{goals}

![learning curves]({curves})

Connectors differ in parameters as well as in what they see; steps are the same, processor time is not (last two
columns). One tiny task: this says nothing about the size of the effect at 2.7 billion parameters.

- machine: {facts["processor"]}, {facts["cores"]} cores; {results["load"]}; {results["seconds"]:.0f} s
- versions: {", ".join(f"{name} {facts[name]}" for name in ("python", "torch", "transformers", "mmkernels"))}
- data: {settings["source"]}; batches of {settings["batch_size"]} canvases with {settings["turns"]} questions each
- command: `{results["command"]}`
"""


def _smooth(values: list[float]) -> list[float]:
    total, weight, out = 0.0, 0.0, []
    for value in values:
        total, weight = _SMOOTH * total + value, _SMOOTH * weight + 1
        out.append(total / weight)
    return out


def plot_connectors(results: dict[str, Any], path: Path) -> None:
    """Accuracy on unseen canvases and training loss against steps; a band spans the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for arm in ARMS:
        found = list(results["runs"].get(arm.key, {}).values())
        if not found:
            continue
        steps = [point["step"] for point in found[0]["points"]]
        scores = torch.tensor([[point["accuracy"] for point in run["points"]] for run in found])
        losses = torch.tensor([_smooth(run["loss"]) for run in found]).mean(0)
        left.plot(steps, scores.mean(0).tolist(), marker="o", markersize=3, color=arm.colour, label=arm.label)
        right.plot(range(1, len(losses) + 1), losses.tolist(), color=arm.colour, label=arm.label)
        if len(found) > 1:
            low, high = scores.amin(0).tolist(), scores.amax(0).tolist()
            left.fill_between(steps, low, high, color=arm.colour, alpha=0.15, linewidth=0)
    left.axhline(results["majority"], color="#c0c5ce", linestyle=":", linewidth=1)
    left.set(ylabel="accuracy on unseen canvases")
    right.set(yscale="log", ylabel="training loss")
    for axis in (left, right):
        axis.set_xlim(left=0)
        axis.set_xlabel("training steps in front of the frozen language model")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
