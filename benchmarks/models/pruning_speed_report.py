"""Table and plot of pruning_speed.py."""

import json
import tempfile
from pathlib import Path
from typing import Any

from mmkernels.bench.harness import Timing
from mmkernels.bench.run import processor

__all__ = ["markdown", "peak_of_trace", "processor", "targets", "write"]
MIB = 2**20
NAMES = {
    "official": "eager, every attention map and hidden state (the official way)",
    "plain": "SDPA, all layers, every hidden state (nothing pruned)",
    "stopped": "SDPA, up to the feature layer (nothing pruned)",
    "ours": "mmkernels.prune's tower, VTC-CLS with K = 3, and the choice",
}


def peak_of_trace(profiler: Any, folder: Path) -> int:
    """Most bytes allocated at one time above the level at the start, from a profile with memory events."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        path = Path(place) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    memory = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    level = peak = 0
    for event in memory:
        level += int(event["args"]["Bytes"])
        peak = max(peak, level)
    return peak


def milliseconds(timing: Timing) -> str:
    """The median, and its marks."""
    value = timing.seconds * 1e3
    return f"{value:.{3 if value < 1 else 1 if value < 1000 else 0}f} ms{timing.marks}"


def encoder_part(facts: dict[str, Any]) -> str:
    """Table of the towers."""
    time, peak = facts["time"], facts["peak"]
    lines = ["| tower, one image | time | against ours | peak of tensors |", "|---|---|---|---|"]
    for name, text in NAMES.items():
        ratio = time[name].seconds / time["ours"].seconds
        lines.append(f"| {text} | {milliseconds(time[name])} | {ratio:.2f} | {peak[name] / MIB:.1f} MiB |")
    scores, checks = facts["scores"], facts["checks"]
    count = facts["score_layers"]
    lines += [
        "",
        f"| from ready queries and keys of {count} layers | time |",
        "|---|---|",
        f"| rows of [CLS] (cls_attention_scores) | {milliseconds(scores['rows'])} |",
        f"| the same, and the choice of {facts['keep']} tokens | {milliseconds(scores['rows and choice'])} |",
        f"| whole softmax maps of those layers, and the row | {milliseconds(scores['maps of those layers'])} |",
        "",
        f"All maps together: {facts['map_bytes'] / MIB:.0f} MiB in float32. Scores of the two ways differ by at most "
        f"{checks['scores_error']:.0e}; kept sets overlap to {checks['jaccard']:.3f} (Jaccard; random weights leave "
        "the scores within rounding of each other). Kept tokens are those of the plain tower, bit for bit.",
    ]
    return "\n".join(lines)


def decoder_part(facts: dict[str, Any]) -> str:
    """Table of the decoder."""
    full = max(facts["kv"])
    lines = [
        "| visual tokens | prefill | speed-up | FLOP ratio | FLOPs, visual + text | visual only, true | visual only, "
        "FastV's | KV cache, visual + text | a token: attention | a token: layer |",
        "|---" * 10 + "|",
    ]
    layers = facts["layers"]
    for visual in facts["kv"]:
        prefill = facts["prefill"][visual]
        lines.append(
            f"| {visual} | {prefill.seconds * layers:.2f} s{prefill.marks} "
            f"| {facts['prefill'][full].seconds / prefill.seconds:.2f} "
            f"| {facts['true'][full] / facts['true'][visual]:.2f} "
            f"| {facts['true'][visual] / 1e12:.2f} T | {facts['true_visual'][visual] / 1e12:.2f} T "
            f"| {facts['fastv_visual'][visual] / 1e12:.2f} T | {facts['kv'][visual] / MIB:.0f} MiB "
            f"| {milliseconds(scaled(facts['attention'][visual], layers))} "
            f"| {milliseconds(scaled(facts['step'][visual], layers))} |"
        )
    return "\n".join(lines)


def scaled(timing: Timing, times: int) -> Timing:
    """A layer's timing, as often as there are layers."""
    return Timing(
        timing.seconds * times, timing.spread, timing.samples, timing.dropped, timing.clean, timing.watched
    )  # fmt: skip


def targets(results: dict[str, Any]) -> list[tuple[str, bool]]:
    """What was aimed at, and whether this run reached it."""
    found = []
    if "encoder" in results:
        found += _memory_targets(results["encoder"]) + _time_targets(results["encoder"])
    if "decoder" in results:
        facts = results["decoder"]
        full, least = max(facts["kv"]), min(facts["kv"])
        speed = facts["prefill"][full].seconds / facts["prefill"][least].seconds
        ratio = facts["true"][full] / facts["true"][least]
        text = f"prefill with {least} visual tokens is {speed:.2f} times as fast; the FLOP ratio is {ratio:.2f}"
        found.append((f"{text} (within 10 %)", abs(speed / ratio - 1) <= 0.1))
    return found


def _memory_targets(facts: dict[str, Any]) -> list[tuple[str, bool]]:
    peak, maps = facts["peak"], facts["map_bytes"]
    more, beyond = peak["ours"] - peak["stopped"], peak["ours"] - peak["plain"]
    part = maps / peak["ours"]
    return [
        (f"scores and choice add {more / MIB:.2f} MiB to the peak of the tower (at most 1)", more <= MIB),
        (
            f"the peak is {beyond / MIB:+.1f} MiB on the plain tower's (at most 1/20 of the bytes of the maps)",
            beyond <= maps / 20,
        ),
        (f"the whole peak, the tower's own MLP in it, is 1/{part:.1f} of the maps (at most 1/20)", part >= 20),
    ]


def _time_targets(facts: dict[str, Any]) -> list[tuple[str, bool]]:
    time, scores = facts["time"], facts["scores"]
    share = scores["rows and choice"].seconds / time["stopped"].seconds
    faster = time["official"].seconds / time["ours"].seconds
    skipped, expected = time["plain"].seconds / time["ours"].seconds, facts["layers"] / (facts["layers"] - 1)
    same = scores["maps of those layers"].seconds / scores["rows"].seconds
    cheaper = same / facts["score_layers"] * facts["layers"]
    return [
        (f"scores and choice take {share:.2%} of the tower's time (at most 1 %)", share <= 0.01),
        (f"{faster:.2f} times as fast as the official way (at least 1.13)", faster >= 1.13),
        (
            f"{skipped:.3f} times as fast as the plain tower, which runs a last layer that nobody reads "
            f"({expected:.3f} by the number of layers)",
            skipped > 1,
        ),
        (
            f"rows of ready queries and keys are {cheaper:.0f} times cheaper than the maps of all {facts['layers']} "
            f"layers (at least 200), {same:.0f} times than those of the same layers",
            cheaper >= 200,
        ),
    ]


def markdown(results: dict[str, Any]) -> str:
    """pruning_speed.md."""
    shapes = results["shapes"]
    text = f"""# What pruning visual tokens saves

Random weights in the shapes of CLIP ViT-L/14-336 and of LLaVA-1.5-7B, float32, batch 1: width {shapes.width},
{shapes.layers} layers, {shapes.side} x {shapes.side} patches, {shapes.keep} kept; decoder {shapes.decoder_width} wide,
{shapes.decoder_layers} layers, MLP {shapes.decoder_mlp}.

"""
    if "encoder" in results:
        text += f"## Encoder\n\n{encoder_part(results['encoder'])}\n\n"
    if "decoder" in results:
        text += f"""## Decoder

One layer, timed, times {results["decoder"]["layers"]}; {results["decoder"]["text"]} text tokens besides.

{decoder_part(results["decoder"])}

FLOPs: *true* counts 2 for a multiply-add, the gated MLP's three matrices and the whole square of attention; *FastV's*
convention counts 4 n d^2 + 2 n^2 d + 2 n d m a layer. Ratios are of true FLOPs over visual and text tokens. KV bytes in
half precision, from the shapes of the cache. *a token: attention* is the attention of one decoded token over the cache,
*layer* the whole step, which reads every weight whatever the length.

"""
    lines = "\n".join(f"- {'met' if met else 'NOT MET'}: {what}" for what, met in targets(results))
    return (
        text
        + f"""## Targets

{lines}

![time and memory of the tower, prefill against kept tokens](pruning_speed.png)

Medians of interleaved samples; `!`: others used the processors meanwhile, `~`: wide spread, `?`: a single sample.
Peaks are of torch's allocator, above what was there before the call: weights and the image are not in them.

- machine: {results["machine"]}; {results["threads"]} threads; {results["seconds"]:.0f} s
- command: `{results["command"]}`
"""
    )


def plot(results: dict[str, Any], path: Path) -> None:
    """Bars of the tower's time and peak; prefill's speed-up against kept tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    labels = {"official": "official", "plain": "SDPA", "stopped": "SDPA, stopped", "ours": "with VTC-CLS"}
    colours = ["#c0392b", "#8f96a3", "#8f96a3", "#1b9e77"]
    if "encoder" in results:
        facts = results["encoder"]
        left.barh(list(labels.values()), [facts["time"][n].seconds for n in labels], color=colours)
        middle.barh(list(labels.values()), [facts["peak"][n] / MIB for n in labels], color=colours)
        left.set(xlabel="seconds an image", title="vision tower: time")
        middle.set(xlabel="MiB", title="vision tower: peak of tensors")
        for axis in (left, middle):
            axis.invert_yaxis()
    if "decoder" in results:
        facts = results["decoder"]
        full, counts = max(facts["kv"]), list(facts["kv"])
        speed = [facts["prefill"][full].seconds / facts["prefill"][v].seconds for v in counts]
        right.plot(counts, speed, marker="o", color="#1b9e77", label="prefill, measured")
        ratio = [facts["true"][full] / facts["true"][v] for v in counts]
        right.plot(counts, ratio, marker=".", linestyle="--", color="#8f96a3", label="FLOP ratio")
        right.set(
            xlabel=f"visual tokens, {facts['text']} text tokens besides", title="decoder: speed-up", xticks=counts
        )
        right.legend(frameon=False)
    for axis in (left, middle, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    figure.savefig(path, dpi=130)


def write(results: dict[str, Any], folder: Path) -> None:
    """Write table and plot of what there is so far."""
    plot(results, folder / "pruning_speed.png")
    (folder / "pruning_speed.md").write_text(markdown(results))
