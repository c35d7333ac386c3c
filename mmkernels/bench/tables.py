"""results.json as Markdown: one table per op, direction, dtype and thread count; nobody who is missing goes unnamed."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mmkernels.bench import limits
from mmkernels.bench.harness import FOREIGN_SHARE, WIDE_SPREAD, Timing
from mmkernels.bench.ops import OPS, OURS
from mmkernels.bench.plans import DECODE
from mmkernels.bench.shapes import SHAPES, Cell

Races = Mapping[str, Mapping[str, Any]]
_MIB = 1 << 20
_NOT_A_PEER = OURS  # entries whose name starts so are this package
TITLES = {
    "ssd_scan": "ssd_scan: the state-space scan of a layer",
    "causal_conv1d": "causal_conv1d with SiLU",
    "gated_rms_norm": "gated_rms_norm",
    "ssd_update": "ssd_update: one token, the states of all layers in rotation, per call",
    "causal_conv1d_update": "causal_conv1d_update: one token, the states of all layers in rotation, per call",
    "mma_attention": "mma_attention: an image and the question it reads (aki), a bidirectional image (bidir)",
    "mma_attention_decode": "mma_attention: one token over a cache of keys and values, its length behind",
    "prune_tokens": "prune_tokens: 1/9 of the patches of CLIP ViT-L/14-336, chosen by score and gathered",
    "cls_attention_scores": "cls_attention_scores: the row of [CLS] in a layer of CLIP ViT-L/14-336",
    "attention_column_scores": "attention_column_scores: the mean of every column in a layer of CLIP ViT-L/14-336",
    "merge_tokens": "bipartite_soft_matching, merge_tokens: 1/25 of the tokens of CLIP ViT-L/14-336 merged",
    "scan2d_bidirectional": "A grid read along its rows both ways, between a mixer's two projections",
    "scan2d_cross": "A grid read along rows and columns both ways, between a mixer's two projections",
    "mixer": "A Mamba-2 mixer between its two projections: convolution, scan, gate, norm",
}


def report(content: Mapping[str, Any]) -> str:
    """The whole report of a results.json."""
    parts = [_head(content)]
    for op in OPS:
        races = {key: found for key, found in content["races"].items() if found["cell"]["op"] == op}
        if races:
            parts.append(f"## {TITLES[op]}")
            parts += [group_table(cells, races) for cells in _groups(races)]
            parts.append(scaling_table(races))
    if content["memory"]:
        parts += ["## Peak memory of a call, MiB", memory_table(content["memory"])]
    if content["first_call"]:
        parts += ["## First call in a fresh process, milliseconds", first_call_table(content["first_call"])]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(content: Mapping[str, Any]) -> str:
    machine = content["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    dates = sorted({f["date"] for section in ("races", "memory", "first_call") for f in content[section].values()})
    commands = "\n".join(f"    {command}" for command in content["commands"])
    when = " to ".join(dict.fromkeys(dates[:1] + dates[-1:]))
    layers = "; ".join(
        f"{name} H={s.nheads} P={s.headdim} N={s.dstate} G={s.ngroups}" for name, s in SHAPES.items() if not s.mask
    )
    attention = "; ".join(f"{n} H={s.nheads}/{s.ngroups} D={s.headdim}" for n, s in SHAPES.items() if s.mask)
    return f"""# The ops on a CPU, raced

{machine["processor"]}, {machine["processors"]} processors; {versions}; {when}.

{commands}

Medians of interleaved samples in one process.  Every contestant was checked against a float64 reference first (its
result, or its gradients) and one that is wrong is not timed.  Samples during which other processes used more than
{FOREIGN_SHARE:.0%} of a processor that the contestant needed are dropped.  Marks: `!` no clean sample, `~` half the
range over {WIDE_SPREAD:.0%} of the median, `?` a single sample (one call took its whole share of the time).
Layers: {layers}; {attention}."""


def _groups(races: Races) -> list[list[Cell]]:
    """Cells that share direction, dtype and threads, in a stable order."""
    found: dict[tuple[bool, str, int], list[Cell]] = {}
    for race in races.values():
        cell = Cell(**race["cell"])
        found.setdefault((cell.backward, cell.dtype, cell.threads), []).append(cell)
    order = list(SHAPES)
    keys = sorted(found, key=lambda key: (key[0], -key[2], key[1] != "float32"))
    return [sorted(found[key], key=lambda c: (order.index(c.shape), c.seqlen)) for key in keys]


def group_table(cells: Sequence[Cell], races: Races) -> str:
    """Contestants down, cells across; then what this package's figures are worth."""
    first, op = cells[0], OPS[cells[0].op]
    unit, scale = ("microseconds", 1e6) if first.op in DECODE else ("milliseconds", 1e3)
    heading = ", ".join(
        (
            "forward and backward" if first.backward else "forward",
            first.dtype,
            f"{first.threads} thread{'s' * (first.threads > 1)}",
            unit,
        )
    )
    notes: dict[str, str] = {}
    rows = []
    for contestant in op.contestants:
        entries = [races[c.id]["entries"].get(contestant.name) for c in cells]
        if any(entries):
            rows.append([contestant.name, *_entries(entries, scale, notes)])
    rows += _worth(cells, races)
    return "\n".join([f"**{heading}**", "", table(["", *map(_column, cells)], rows), *_notes(notes)])


def _column(cell: Cell) -> str:
    return cell.shape if cell.op in DECODE else f"{cell.shape}, {cell.seqlen}"


def _entries(entries: Sequence[Mapping[str, Any] | None], scale: float, notes: dict[str, str]) -> list[str]:
    """One row: times, or why there is none - in words when there is none at all, else by a note."""
    reasons = [e["why"] if e and "why" in e else None for e in entries]
    if len(set(reasons)) == 1 and reasons[0]:
        return [f"not run: {reasons[0]}", *[""] * (len(entries) - 1)]
    shown = []
    for entry, reason in zip(entries, reasons, strict=True):
        if entry is None:
            shown.append("")
        elif reason:
            note = notes.setdefault(reason, chr(ord("a") + len(notes)))
            shown.append(f"- ({note})")
        else:
            shown.append(number(entry["seconds"] * scale) + timing(entry).marks)
    return shown


def _notes(notes: Mapping[str, str]) -> list[str]:
    return [""] + [f"({letter}) {reason}" for reason, letter in notes.items()] if notes else []


def timing(entry: Mapping[str, Any]) -> Timing:
    """The timing an entry of results.json holds."""
    return Timing(**{name: entry[name] for name in Timing.__dataclass_fields__})


def number(value: float) -> str:
    """Three significant digits, without exponents."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 1 else f"{value:.2g}"


def _worth(cells: Sequence[Cell], races: Races) -> list[list[str]]:
    op = OPS[cells[0].op]
    rows = [[f"**faster than {op.baseline}**"], ["**faster than the fastest peer**"]]
    for cell in cells:
        found = ratios(races[cell.id], op.baseline)
        rows[0].append("" if found["baseline"] is None else f"**{found['baseline']:.1f}x**")
        rows[1].append("" if found["fastest"] is None else f"**{found['fastest']:.1f}x** ({found['peer']})")
    if cells[0].backward:
        return rows  # useful work is counted for the forward only
    per_second = [("useful GFLOP/s", op.flops, "gemm"), ("GB/s that must move", op.bytes, "copy")]
    for title, amount, name in per_second:
        if amount is None:
            continue
        rates = [_rate(amount(cell), races[cell.id]) for cell in cells]
        rows.append([f"mmkernels, {title}", *("" if r is None else number(r) for r in rates)])
        name = name if name in op.limits else op.limits[0]
        rows += [_share(rates, cells, races, name)]
    rows += [_limit_row(cells, races, name) for name in op.limits]
    return rows


def _rate(amount: float, race: Mapping[str, Any]) -> float | None:
    entry = race["entries"].get(OURS, {})
    return amount / entry["seconds"] / 1e9 if "seconds" in entry else None


def _share(rates: Iterable[float | None], cells: Sequence[Cell], races: Races, name: str) -> list[str]:
    known = {"gemm": "share of the matrix product's rate", "copy": "share of the copy's rate",
             "read": "share of the read's rate"}  # fmt: skip
    shares = [None if r is None else r / races[c.id]["limits"][name]["rate"] for r, c in zip(rates, cells, strict=True)]
    return [f"mmkernels, {known[name]}", *("" if s is None else f"{s:.0%}" for s in shares)]


def _limit_row(cells: Sequence[Cell], races: Races, name: str) -> list[str]:
    found = [races[c.id]["limits"][name] for c in cells]
    return [f"limit: {limits.TITLES[name]}", *(number(f["rate"]) + timing(f).marks for f in found)]


def ratios(race: Mapping[str, Any], baseline: str) -> dict[str, Any]:
    """How many times this package is faster than the baseline, and than the fastest peer, and who that is."""
    times = {name: e["seconds"] for name, e in race["entries"].items() if "seconds" in e}
    peers = {name: seconds for name, seconds in times.items() if not name.startswith(_NOT_A_PEER)}
    ours, peer = times.get(OURS), min(peers, key=peers.__getitem__, default=None)
    return {
        "baseline": peers[baseline] / ours if ours and baseline in peers else None,
        "fastest": peers[peer] / ours if ours and peer else None,
        "peer": peer,
    }


def scaling_table(races: Races) -> str:
    """How much faster this package is with more threads, for cells that were raced with one thread as well."""
    rows = []
    for race in races.values():
        cell = Cell(**race["cell"])
        alone = races.get(cell.id.replace(f"/{cell.threads}T/", "/1T/"))
        times = [r["entries"].get(OURS, {}).get("seconds") for r in (alone, race) if r]
        if cell.threads > 1 and len(times) == 2 and all(times):
            direction = "forward and backward" if cell.backward else "forward"
            name = f"{_column(cell)}, {cell.dtype}, {direction}"
            rows.append([name, f"1 to {cell.threads}", f"{times[0] / times[1]:.2f}x"])
    return "\n".join(["**mmkernels, scaling**", "", table(["", "threads", "faster"], rows)]) if rows else ""


def memory_table(section: Races) -> str:
    """Contestants down, cells across: bytes beyond the inputs and the process, output included."""
    cells = [Cell(**found["cell"]) for found in section.values()]
    names = list(dict.fromkeys(name for found in section.values() for name in found["entries"]))
    notes: dict[str, str] = {}
    rows = []
    for name in names:
        shown = []
        for found in section.values():
            entry = found["entries"].get(name)
            if entry is None:
                shown.append("")
            elif "why" in entry:
                shown.append(f"- ({notes.setdefault(entry['why'], chr(ord('a') + len(notes)))})")
            else:
                shown.append(number(entry["bytes"] / _MIB))
        rows.append([name, *shown])
    heads = [f"{c.op} {_column(c)}{', with backward' * c.backward}" for c in cells]
    return "\n".join([table(["", *heads], rows), *_notes(notes)])


def first_call_table(section: Races) -> str:
    """First and second call of each op; the library was compiled before."""
    rows = []
    for found in section.values():
        op = found["cell"]["op"]
        times = [number(1e3 * found[name]) for name in ("first", "processor", "second") if name in found]
        rows.append([op, *(times or ["not run: " + found["why"], "", ""])])
    return table(["", "first", "processor time of the first", "second"], rows)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; a bar inside a cell stays a bar."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
