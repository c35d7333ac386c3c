"""results.json as pictures: tokens a second against length, and times faster than what a user has without us."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmkernels.bench.ops import OPS, OURS
from mmkernels.bench.plans import DECODE
from mmkernels.bench.shapes import SHAPES, Cell
from mmkernels.bench.tables import ratios, timing

Races = Mapping[str, Mapping[str, Any]]
_OURS, _BASELINE, _FASTEST = "#0b7a75", "#8a8f98", "#d1813c"
_CURVES = ("#d1813c", "#4c6ef5", "#8a8f98", "#b54f6f", "#7a9e3f", "#9b7ede", "#c2a83e", "#5fa8d3")


def draw(content: Mapping[str, Any], folder: Path) -> list[Path]:
    """Every picture these results allow, as PNG files in a folder.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    pictures = []
    if _lengths(content["races"]):
        pictures.append(folder / "scan.png")
        draw_lengths(content, pictures[-1])
    if _bars(content["races"]):
        pictures.append(folder / "ratios.png")
        draw_ratios(content, pictures[-1])
    return pictures


def _pyplot() -> Any:
    from mmkernels.errors import ConfigError

    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError(
            f"bench: matplotlib must be installed to draw; got {error}. Install mmkernels[bench]."
        ) from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _lengths(races: Races) -> list[Cell]:
    """The forward float32 scans of one layer at the largest number of threads, if there are several lengths."""
    cells = [Cell(**race["cell"]) for race in races.values()]
    cells = [c for c in cells if (c.op, c.dtype, c.backward) == ("ssd_scan", "float32", False)]
    best: list[Cell] = []
    for shape in SHAPES:
        for threads in {c.threads for c in cells}:
            same = sorted((c for c in cells if (c.shape, c.threads) == (shape, threads)), key=lambda c: c.seqlen)
            if len(same) > 1 and (len(same), threads) > (len(best), best[0].threads if best else 0):
                best = same
    return best


def draw_lengths(content: Mapping[str, Any], path: Path) -> None:
    """Tokens a second of one layer's scan against the length of the sequence, both axes logarithmic."""
    plt = _pyplot()
    races, cells = content["races"], _lengths(content["races"])
    figure, axis = plt.subplots(figsize=(8.5, 5), layout="constrained")
    looks = iter([(colour, line) for line in ("-", "--", ":") for colour in _CURVES])
    for contestant in OPS["ssd_scan"].contestants:
        points = [
            (c.seqlen, c.seqlen / races[c.id]["entries"][contestant.name]["seconds"])
            for c in cells
            if "seconds" in races[c.id]["entries"].get(contestant.name, {})
        ]
        if points:
            mine = contestant.name == OURS
            colour, line = (_OURS, "-") if mine else next(looks)
            axis.plot(
                *zip(*points, strict=True),
                marker="o",
                markersize=6 if mine else 4,
                color=colour,
                linestyle=line,
                linewidth=3 if mine else 1.3,
                zorder=3 if mine else 2,
                label=contestant.name,
            )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks([c.seqlen for c in cells], [f"{c.seqlen:,}" for c in cells])
    axis.minorticks_off()
    axis.set_xlabel("tokens in the sequence")
    axis.set_ylabel("tokens a second through one layer")
    first = cells[0]
    axis.set_title(
        f"ssd_scan, {first.shape} layer, {first.dtype}, {first.threads} threads\n{_where(content)}", fontsize=10
    )
    axis.grid(alpha=0.25, which="major")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _save(figure, path)


def _bars(races: Races) -> list[tuple[Cell, dict[str, Any]]]:
    """The cells at the largest number of threads in which there is a baseline."""
    cells = [Cell(**race["cell"]) for race in races.values()]
    most = max((c.threads for c in cells), default=1)
    order = list(OPS)
    cells = sorted(
        (c for c in cells if c.threads == most and c.seqlen in (1, _usual_length(cells, c))),
        key=lambda c: (order.index(c.op), c.backward, list(SHAPES).index(c.shape), c.dtype != "float32"),
    )
    found = [(c, ratios(races[c.id], OPS[c.op].baseline)) for c in cells]
    return [(c, r) for c, r in found if r["baseline"] is not None]


def _usual_length(cells: list[Cell], like: Cell) -> int:
    lengths = sorted({c.seqlen for c in cells if (c.op, c.shape, c.backward) == (like.op, like.shape, like.backward)})
    return 2048 if 2048 in lengths else lengths[-1]


def draw_ratios(content: Mapping[str, Any], path: Path) -> None:
    """Two bars for each cell: times faster than the baseline, and than the fastest peer."""
    plt = _pyplot()
    bars = _bars(content["races"])
    figure, axis = plt.subplots(figsize=(10, 0.36 * len(bars) + 1.8), layout="constrained")
    axis.set_ylim(-0.6, len(bars) - 0.4)
    for i, (cell, found) in enumerate(reversed(bars)):
        marks = timing(content["races"][cell.id]["entries"][OURS]).marks
        for offset, value, colour in ((0.2, found["baseline"], _BASELINE), (-0.2, found["fastest"], _FASTEST)):
            axis.barh(i + offset, value, height=0.38, color=colour)
            axis.text(value * 1.03, i + offset, f"{value:.1f}x{marks}", va="center", fontsize=8)
    axis.axvline(1.0, color="black", linewidth=1)
    axis.set_yticks(range(len(bars)), [_label(cell) for cell, _ in reversed(bars)], fontsize=8)
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    axis.set_xlim(min(low, 0.8), high * 1.6)
    axis.xaxis.set_major_formatter("{x:g}x")
    axis.set_xlabel(
        "times faster than the usual way (grey)\nand than the fastest peer (orange)\n"
        "! on a busy machine   ~ samples far apart   ? a single sample",
        fontsize=9,
    )
    axis.set_title(f"mmkernels against its peers, {bars[0][0].threads} threads\n{_where(content)}", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _label(cell: Cell) -> str:
    where = cell.shape if cell.op in DECODE else f"{cell.shape}, {cell.seqlen} tokens"
    return f"{cell.op}, {where}, {cell.dtype}{', with backward' * cell.backward}"


def _where(content: Mapping[str, Any]) -> str:
    machine = content["machine"]
    return f"{machine['processor']}, {machine['processors']} processors"


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    _pyplot().close(figure)
