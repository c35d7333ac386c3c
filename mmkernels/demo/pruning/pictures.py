"""Accuracy against kept tokens, and images with the kept patches lit."""

from pathlib import Path
from typing import Any

import torch

from mmkernels.demo.pruning.arms import ARMS
from mmkernels.demo.pruning.measure import PATCHES, kept_patches
from mmkernels.demo.pruning.task import FIRST, GRID, PruningTask, Questions

_SHOWN = 3  # images in the picture
TITLES = {"present": '"is there a .."', "which": '"which things are there"', "count": '"how many of .."'}


def plot_curves(results: dict[str, Any], path: Path) -> None:
    """One panel a kind of question, one line a pruner."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.4), layout="constrained")
    axes = figure.subplots(1, len(TITLES))
    for axis, (kind, title) in zip(axes, TITLES.items(), strict=True):
        whole = results["unpruned"][kind]
        for arm in ARMS:
            points = {int(k): v for k, v in results["pruned"][arm.key][kind].items() if v is not None}
            counts = [PATCHES, *sorted(points, reverse=True)]
            values = [whole, *(points[k] for k in counts[1:])]
            bold = arm.key == "vtc_cls"
            axis.plot(
                counts, values, marker="o", markersize=3, color=arm.colour, label=arm.label,
                linewidth=2.4 if bold else 1.3, zorder=3 if bold else 2,
                linestyle="--" if arm.key in ("random", "uniform", "least_cls") else "-",
            )  # fmt: skip
        axis.axhline(results["guess"][kind], color="#c0c5ce", linestyle=":", linewidth=1)
        axis.set(xscale="log", xlabel="visual tokens kept of 36", title=title, ylim=(0, 1.02))
        counts = [PATCHES, *(int(k) for k in results["pruned"]["vtc_cls"][kind])]
        axis.set_xticks(counts, [str(k) for k in counts])
        axis.minorticks_off()
        axis.invert_xaxis()
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("accuracy on unseen canvases")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def plot_lit(model: Any, task: PruningTask, kept: int, path: Path) -> None:
    """Rows: unseen images; columns: the image, then each pruner with the patches it keeps lit."""
    from matplotlib.figure import Figure

    from mmkernels.interop.prune_show import light

    batch = task.batch("present", 0, 250, split="test")
    batch = Questions(**{name: value[:_SHOWN] for name, value in vars(batch).items()})
    arms = [arm for arm in ARMS if kept >= arm.least]
    figure = Figure(figsize=(1.55 * (len(arms) + 1), 1.75 * _SHOWN), layout="constrained")
    axes = figure.subplots(_SHOWN, len(arms) + 1)
    columns = [("image", [list(range(PATCHES))] * _SHOWN)]
    columns += [(arm.label, kept_patches(model, batch, arm.pruner(kept))) for arm in arms]
    for column, (label, chosen) in enumerate(columns):
        for row in range(_SHOWN):
            axis, image = axes[row, column], batch.images[row]
            picture = image if column == 0 else light(image, chosen[row], (GRID, GRID))
            axis.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            if row == 0:
                axis.set_title(label.replace(", ", ",\n").replace(" [", "\n["), fontsize=8)
    for row in range(_SHOWN):
        asked = " ".join(task.vocab[int(i)] for i in batch.input_ids[row, FIRST + PATCHES :])
        axes[row, 0].set_ylabel(f"{asked} ?", fontsize=7)
    figure.savefig(path, dpi=130)


def save_canvases(task: PruningTask, folder: Path, count: int = _SHOWN) -> list[Path]:
    """Some unseen canvases as PNG files, to try `mmkernels prune` on."""
    from PIL import Image

    images = task.batch("present", 0, 250, split="test").images[:count]
    paths = []
    for i, image in enumerate(images):
        pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        paths.append(folder / f"canvas_{i}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths
