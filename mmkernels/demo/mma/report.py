"""The comparison as a table, learning curves and pictures of the masks; every figure also in results.json."""

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from mmkernels.data import CanvasTask
from mmkernels.demo.mma.arms import ARMS, Arm
from mmkernels.demo.mma.train import training_batch

_COLUMNS = 4  # points of the curve that the table shows
_LAST = 20  # training steps whose mean loss is given as the final one: one batch of 48 is noisy
_SMOOTH = 0.9  # of the loss curves in the picture


def write_report(results: dict[str, Any], task: CanvasTask, out: Path) -> None:
    """Write results.json, report.md, curves.png and masks.png into `out`."""
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    plot_curves(results, out / "curves.png")
    plot_masks(task, [arm for arm in ARMS if arm.key in results["runs"]], out / "masks.png")
    (out / "report.md").write_text(markdown(results, "curves.png", "masks.png"))


def final_loss(run: dict[str, Any]) -> float:
    """Mean training loss of the answer over the last steps."""
    return fmean(run["answer_loss"][-_LAST:])


def spread(values: list[float], digits: int = 3) -> str:
    """The mean, and with several seeds the smallest and the largest."""
    mean = f"{fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def table(results: dict[str, Any]) -> str:
    """One row per arm: accuracy on unseen canvases after so many steps, training loss, recognition."""
    runs = results["runs"]
    points = next(iter(next(iter(runs.values())).values()))["points"]
    every = max(1, len(points) // _COLUMNS)
    shown = list(range(len(points) - 1, -1, -every))[::-1]
    steps = [points[i]["step"] for i in shown]
    lines = ["| arm | " + " | ".join(f"step {step}" for step in steps) + " | training loss | cells read |"]
    lines.append("|---" * (len(steps) + 3) + "|")
    for arm in ARMS:
        if arm.key in runs:
            of_seed = list(runs[arm.key].values())
            cells = [spread([run["points"][i]["accuracy"] for run in of_seed]) for i in shown]
            cells += [spread([final_loss(run) for run in of_seed]), spread([run["cells_read"] for run in of_seed])]
            lines.append(f"| {arm.label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def findings(results: dict[str, Any]) -> list[tuple[str, bool]]:
    """What the comparison sets out to show, and whether this run showed it."""
    runs, steps = results["runs"], results["settings"]["steps"]
    score = {key: fmean(run["accuracy"] for run in of_seed.values()) for key, of_seed in runs.items()}
    found = []
    if {"mma", "causal"} <= score.keys():
        text = f"after {steps} steps MMA answers {score['mma']:.1%}, causal attention {score['causal']:.1%}"
        found.append((f"{text}: ahead by 30 points or more", score["mma"] - score["causal"] >= 0.3))
    if {"mma", "question_first"} <= score.keys():
        text = f"MMA is within 5 points of moving the question in front of the image ({score['question_first']:.1%})"
        found.append((text, abs(score["mma"] - score["question_first"]) <= 0.05))
    if {"mma", "bidirectional"} <= score.keys():
        text = f"a bidirectional image alone does not do it ({score['bidirectional']:.1%})"
        found.append((text, score["mma"] - score["bidirectional"] >= 0.3))
    if "leak" in score:
        loss = max(final_loss(run) for run in runs["leak"].values())
        text = f"the planted leak drives the training loss to 0 ({loss:.4f}) and evaluation collapses"
        # below half of what an honest model knows; guessing the most common answer is the floor
        honest = max(score.values())
        found.append((f"{text} ({score['leak']:.1%})", loss < 0.01 and score["leak"] < honest / 2))
        found.append(("check_no_label_leak refuses the planted mask", bool(results["leak_refused_with"])))
    return found


def markdown(results: dict[str, Any], curves: str, masks: str) -> str:
    """report.md: the table, the pictures, what they show and how they were made."""
    facts, settings = results["machine"], results["settings"]
    goals = "\n".join(f"- {'shown' if met else 'NOT SHOWN'}: {text}" for text, met in findings(results))
    last = settings["seed"] + settings["seeds"] - 1
    seeds = f"seed {last}" if settings["seeds"] == 1 else f"seeds {settings['seed']}-{last}, mean (smallest-largest)"
    return f"""# Modality-mutual attention: learning speed at a fixed budget

Questions like "what is in the topleft ?" about canvases of real scans, asked **after** the image. Every arm has the
same {results["parameters"]:,} parameters, initial weights, batches, steps and schedule; only the mask and the order of
the sequence differ. Accuracy is over {settings["questions"]:,} questions about canvases made of scans that no training
canvas shows (a quarter of them before the last column); always giving the most common answer scores
{results["majority"]:.3f}. Figures of {seeds}.

{table(results)}

{goals}

![learning curves]({curves})

This is speed of learning within {settings["steps"]} steps; nothing here says that a causal model cannot learn the task
with more of them. *training loss* is the answer's cross-entropy on training canvases (last {_LAST} steps), *cells read*
the share of occupied cells whose own patch token names them right. Dual order trains the first half of the steps with
the question first and the second half with the image first, where it is tested.

![masks]({masks})

check_no_label_leak on the planted leak: "{results["leak_refused_with"]}"

- machine: {facts["processor"]}, {facts["cores"]} cores; {results["workers"]} processes of one thread; {results["load"]}
- {results["seconds"]:.0f} s; `mma_attention` ran on: {results["backend"]}
- versions: {", ".join(f"{name} {facts[name]}" for name in ("python", "torch", "mmkernels"))}
- data: {settings["source"]}; batch {settings["batch_size"]}, peak learning rate {settings["learning_rate"]}
- command: `{results["command"]}`
"""


def _smooth(values: list[float]) -> list[float]:
    # Exponential average, corrected for its start.
    total, weight, out = 0.0, 0.0, []
    for value in values:
        total, weight = _SMOOTH * total + value, _SMOOTH * weight + 1
        out.append(total / weight)
    return out


def plot_curves(results: dict[str, Any], path: Path) -> None:
    """Accuracy on unseen canvases and training loss of the answer against steps; a band spans the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for arm in ARMS:
        of_seed = list(results["runs"].get(arm.key, {}).values())
        if not of_seed:
            continue
        steps = [point["step"] for point in of_seed[0]["points"]]
        scores = torch.tensor([[point["accuracy"] for point in run["points"]] for run in of_seed])
        losses = torch.tensor([_smooth(run["answer_loss"]) for run in of_seed])
        style = {"color": arm.colour, "label": arm.label, "linestyle": "--" if arm.key == "leak" else "-"}
        left.plot(steps, scores.mean(0).tolist(), marker="o", markersize=3, **style)
        right.plot(range(1, losses.shape[1] + 1), losses.mean(0).clamp(min=1e-4).tolist(), **style)
        if len(of_seed) > 1:
            low, high = scores.amin(0).tolist(), scores.amax(0).tolist()
            left.fill_between(steps, low, high, color=arm.colour, alpha=0.15, linewidth=0)
    left.axhline(results["majority"], color="#c0c5ce", linestyle=":", linewidth=1)
    left.text(2, results["majority"] - 0.01, "most common answer", color="#7a828e", fontsize=7, va="top")
    left.set(ylim=(0, 1.02), ylabel="accuracy on unseen canvases")
    right.set(yscale="log", ylabel="training loss of the answer")
    for axis in (left, right):
        axis.set_xlim(left=0)
        axis.set_xlabel("training steps")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def plot_masks(task: CanvasTask, arms: list[Arm], path: Path) -> None:
    """The masks of the arms in training, a row and a column for every token of one sequence."""
    from matplotlib.figure import Figure

    batch = task.batch(0, 1)
    drawn = [(arm, order, *training_batch(task, arm, order, batch)) for arm in arms for order in arm.orders]
    columns = min(4, len(drawn))
    rows = -(-len(drawn) // columns)
    figure = Figure(figsize=(3.2 * columns, 3.5 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes[len(drawn) :]:
        axis.set_axis_off()
    for axis, (arm, order, ids, _, mask) in zip(axes, drawn, strict=False):
        names = _names(task, ids[0])
        keep = mask.dense()[0]
        shade = keep.float() * torch.where(torch.ones_like(keep).tril(), 0.45, 1.0)  # what is beyond causal stands out
        axis.imshow(shade.numpy(), cmap="Greens", vmin=0, vmax=1.15, interpolation="nearest")
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
        axis.set_yticks(range(len(names)), names, fontsize=6)
        part = "" if len(arm.orders) == 1 else f", {order.replace('_', ' ')}"
        axis.set_title(f"{arm.label}{part}", fontsize=8)
    figure.savefig(path, dpi=130)


def _names(task: CanvasTask, ids: Tensor) -> list[str]:
    words, patch = [], 0
    for token in ids[:-1].tolist():
        patch += token == task.image_id
        words.append(f"patch {patch}" if token == task.image_id else task.vocab[token])
    return [*words, f"answer: {task.vocab[int(ids[-1])]}"]
