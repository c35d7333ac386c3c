"""The demo's results as report.json (every figure under a plain name), report.md, accuracy.png and scaling.png."""

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

TEACHER, LINEAR, HYBRID, CONTROL, PLAIN = "#4c566a", "#1b9e77", "#2b6cb0", "#c0c5ce", "#d08770"

# Row key, label, colour: the order of the table and of the picture.
ROWS = (
    ("teacher", "teacher (attention)", TEACHER),
    ("linear_seeded", "linear: seeded, untrained", LINEAR),
    ("linear_stage1", "linear: after stage 1", LINEAR),
    ("linear_stage2", "linear: after stage 2", LINEAR),
    ("linear_stage3", "linear: after stage 3", LINEAR),
    ("hybrid_seeded", "hybrid: from stage 2, untrained", HYBRID),
    ("hybrid_stage3", "hybrid: after stage 3", HYBRID),
    ("scratch_seeding_stage3", "control: scratch seeding, same stages", CONTROL),
    ("trained_from_scratch", "control: no teacher, same steps", PLAIN),
)


def machine_facts() -> dict[str, Any]:
    """Processor, cores, memory and versions: what a reader needs to judge the times."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    import transformers

    from mmkernels import __version__

    return {
        "processor": model,
        "cores": os.cpu_count(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "mmkernels": __version__,
    }


def write_report(results: dict[str, Any], out: Path) -> None:
    """Write report.json, report.md, accuracy.png and scaling.png into `out`."""
    (out / "report.json").write_text(json.dumps(results, indent=2) + "\n")
    plot_accuracy(results["accuracy"], out / "accuracy.png")
    plot_scaling(results["decode"], out / "scaling.png")
    (out / "report.md").write_text(markdown(results))


def accuracy_table(accuracy: dict[str, dict[str, float]]) -> str:
    """One row per model: accuracy over all questions and per kind, and the share of the teacher's."""
    kinds = [kind for kind in accuracy["teacher"] if kind != "all"]
    lines = ["| model | all | " + " | ".join(kinds) + " | of the teacher |", "|---|---" + "|---" * len(kinds) + "|---|"]
    for key, label, _ in ROWS:
        if key in accuracy:
            row = accuracy[key]
            cells = [f"{row['all']:.3f}", *(f"{row[k]:.3f}" for k in kinds)]
            share = row["all"] / accuracy["teacher"]["all"] if accuracy["teacher"]["all"] else float("nan")
            lines.append(f"| {label} | {' | '.join(cells)} | {share:.1%} |")
    return "\n".join(lines)


def decode_table(decode: dict[str, Any]) -> str:
    """One row per context length: milliseconds a token and cache size of each model."""
    names = list(decode["models"])
    lines = ["| context | " + " | ".join(f"{n} ms | {n} cache" for n in names) + " | linear is faster by |"]
    lines.append("|---" * (2 * len(names) + 2) + "|")
    for i, context in enumerate(decode["contexts"]):
        cells = []
        for name in names:
            cells.append(f"{decode['models'][name]['milliseconds'][i]:.2f}")
            cells.append(human_bytes(decode["models"][name]["cache_bytes"][i]))
        ratio = decode["models"]["teacher"]["milliseconds"][i] / decode["models"]["linear"]["milliseconds"][i]
        lines.append(f"| {context:,} | {' | '.join(cells)} | {ratio:.1f}x |")
    return "\n".join(lines)


def human_bytes(count: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def targets(accuracy: dict[str, dict[str, float]]) -> list[tuple[str, bool]]:
    """What the demo sets out to show, and whether this run showed it."""

    def score(key: str) -> float:
        return accuracy[key]["all"] if key in accuracy else float("nan")

    teacher = score("teacher")
    return [
        (f"the teacher answers at least 95 % of unseen canvases ({teacher:.1%})", teacher >= 0.95),
        (
            f"the distilled linear student keeps at least 97 % of that ({score('linear_stage3') / teacher:.1%})",
            score("linear_stage3") >= 0.97 * teacher,
        ),
        (
            "every stage helps",
            score("linear_seeded") < score("linear_stage1") < score("linear_stage2") < score("linear_stage3"),
        ),
        (
            "seeding from attention (inherit_mimic) beats scratch seeding at equal steps",
            score("linear_stage3") > score("scratch_seeding_stage3"),
        ),
    ]


def markdown(results: dict[str, Any]) -> str:
    """report.md."""
    facts, accuracy, settings = results["machine"], results["accuracy"], results["settings"]
    goals = "\n".join(f"- {'met' if met else 'NOT MET'}: {text}" for text, met in targets(accuracy))
    seconds = "\n".join(f"| {name.replace('_', ' ')} | {value:.0f} |" for name, value in results["seconds"].items())
    return f"""# From quadratic to linear: what this run measured

A vision-language model with attention in every layer was trained on canvases of real handwritten digits, then turned
into a Mamba-2 model by three stages of distillation. Accuracy is over {settings["questions"]} questions about canvases
made of scans that no training canvas shows.

![accuracy](accuracy.png)

{accuracy_table(accuracy)}

{goals}

## Decoding one token after a long context

![scaling](scaling.png)

{decode_table(results["decode"])}

Every model is served alike: a preallocated static cache, {results["decode"]["threads"]} threads, batch 1, eager
mode, median of {results["decode"]["repeats"]} single-token steps. The contexts are synthetic (caches filled with
noise): the latency does not depend on what was said.

## How it was run

| | seconds |
|---|---|
{seconds}

- machine: {facts["processor"]}, {facts["cores"]} cores, {facts["system"]}
- versions: {", ".join(f"{name} {facts[name]}" for name in ("python", "torch", "transformers", "mmkernels"))}
- seed {settings["seed"]}; source {settings["source"]}
- parameters: {", ".join(f"{name} {count:,}" for name, count in results["parameters"].items())}
- backends: {", ".join(f"{op}: {name}" for op, name in results["backends"].items())}
- command: `{results["command"]}`
"""


def plot_accuracy(accuracy: dict[str, dict[str, float]], path: Path) -> None:
    """Horizontal bars, the teacher's level as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in ROWS if row[0] in accuracy]
    figure, axis = plt.subplots(figsize=(8, 0.45 * len(rows) + 1.2), layout="constrained")
    for i, (key, _, colour) in enumerate(reversed(rows)):
        value = accuracy[key]["all"]
        axis.barh(i, value, color=colour, alpha=1.0 if key == "teacher" or key.endswith(("3", "scratch")) else 0.55)
        axis.text(value + 0.01, i, f"{value:.3f}", va="center", fontsize=9, bbox={"color": "white", "pad": 1})
    axis.axvline(accuracy["teacher"]["all"], color=TEACHER, linestyle=":", linewidth=1)
    axis.set_yticks(range(len(rows)), [label for _, label, _ in reversed(rows)], fontsize=9)
    axis.set_xlim(0, 1.1)
    axis.set_xlabel("accuracy on unseen canvases")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_scaling(decode: dict[str, Any], path: Path) -> None:
    """Latency and cache size against context length, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {"teacher": TEACHER, "hybrid": HYBRID, "linear": LINEAR}
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for name, series in decode["models"].items():
        style = {"marker": "o", "markersize": 4, "color": colours.get(name), "label": name}
        left.plot(decode["contexts"], series["milliseconds"], **style)
        right.plot(decode["contexts"], [b / 2**20 for b in series["cache_bytes"]], **style)
    left.set_ylabel("milliseconds a token")
    right.set_ylabel("cache, MiB")
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2 if axis is left else 10)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_xticks(
            decode["contexts"], [f"{c // 1024}K" if c % 1024 == 0 else f"{c // 1000}K" for c in decode["contexts"]]
        )
        axis.minorticks_off()
        axis.set_xlabel("context, tokens")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    left.legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
