"""Scans of a grid in several directions against copies of the tokens in each order, and transformers' CPU scan.

The ways are those that `mmkernels bench --ops scan2d_bidirectional,scan2d_cross` races; here they are in the layers of
ML-Mamba, with projections, peaks of memory and the connector around them.

pytest benchmarks/ops/bench_scan2d.py
python benchmarks/ops/bench_scan2d.py > benchmarks/results/scan2d_cpu.md     # the table, one thread, float32
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import mmkernels
from mmkernels.bench.peers.scan2d import (
    SCANS,
    in_place,
    merged_copies,
    own_direction,
    permuted,
    transformers_layers,
    with_copies,
)
from mmkernels.bench.shapes import SHAPES
from mmkernels.layers import Mamba2ScanConnector, MultiDirectionalMamba2

GRIDS = {729: (27, 27), 2916: (54, 54)}
D_MODEL = 2560
OPTIONS = {"scans", "height", "width"}


def args_of(mixer, projected, grid):
    """What a mixer does between its projections, as the peers take it."""
    parameters = {name: getattr(mixer, name) for name in ("conv_weight", "conv_bias", "A_log", "D", "dt_bias")}
    where = {"scans": mixer.scans, "height": grid[0], "width": grid[1]}
    return {"zxbcdt": projected, "norm_weight": mixer.norm.weight, **parameters, **where}


def made(scan, tokens):
    """A mixer with random projections of that many tokens."""
    torch.manual_seed(0)
    mixer, grid = MultiDirectionalMamba2(D_MODEL, scans=SCANS.get(scan, (scan,))), GRIDS[tokens]
    projected = torch.randn(1, tokens, mixer.in_proj.out_features) / 2
    return mixer, grid, args_of(mixer, projected, grid)


def on_transformers(args):
    """Transformers' mixer for every direction, at chunks of 64.

    Its own default, 256, takes over 8 GB here: it multiplies B and C out for every pair of tokens, head and state.
    """
    layers = transformers_layers(args, SHAPES["2.7b"], 64)
    return lambda changed: merged_copies(changed, layers)


def whole(mixing, mixer, u, grid):
    """A mixer with its projections."""
    return mixer.out_proj(mixing(args_of(mixer, mixer.in_proj(u), grid)))


def twice(mixer, u, grid):
    """A mixer called on the tokens in each order, projections and all: what a one-dimensional layer offers."""
    merged = 0.0
    for k, scan in enumerate(mixer.scans):
        order, inverse = mmkernels.scan_permutation(scan, *grid)
        projected = mixer.in_proj(permuted(u, scan, order))
        out = mixer.out_proj(own_direction(args_of(mixer, projected, grid), k, projected))
        merged = merged + permuted(out, scan, inverse)
    return merged / len(mixer.scans)


def gradients(way, args):
    """Forward and backward: gradients of the sum of squares with respect to the projection and all parameters."""
    leaves = {name: v.detach().requires_grad_() for name, v in args.items() if name not in OPTIONS}
    with torch.enable_grad():
        out = way({**args, **leaves})
        return torch.autograd.grad(out, list(leaves.values()), out.detach())


# ---- pytest ----


@pytest.mark.parametrize("way", [in_place, with_copies], ids=lambda f: f.__name__)
@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("tokens", GRIDS)
def bench_directions(benchmark, tokens, scan, way):
    _, _, args = made(scan, tokens)
    benchmark.group = f"scan2d {tokens} {scan}"
    with torch.no_grad():
        require_close(way(args), with_copies(args))
        benchmark(way, args)


@pytest.mark.parametrize("way", [in_place, with_copies], ids=lambda f: f.__name__)
@pytest.mark.parametrize("scan", SCANS)
def bench_gradients(benchmark, scan, way):
    _, _, args = made(scan, 729)
    benchmark.group = f"scan2d 729 {scan}, forward and backward"
    for found, expected in zip(gradients(way, args), gradients(with_copies, args), strict=True):
        require_close(found / expected.abs().max(), expected / expected.abs().max())
    benchmark(gradients, way, args)


def require_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


# ---- the table ----


def interleaved(calls, samples):
    """Least CPU milliseconds of each call, one after the other in turn: neighbours on the machine only ever add."""
    taken = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(samples):
        for name, call in calls.items():
            start = time.thread_time()
            call()
            taken[name].append(time.thread_time() - start)
    return {name: min(times) * 1e3 for name, times in taken.items()}


def peak_megabytes(who, scan, tokens):
    """Peak memory of one call beyond its input and parameters, measured in a process of its own."""
    command = [sys.executable, __file__, "--peak", who, scan, str(tokens)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def print_peak(who, scan, tokens):
    _, grid, args = made(scan, tokens)
    way, row = globals()[who], grid[1]
    with torch.no_grad():
        way({**args, "zxbcdt": args["zxbcdt"][:, :row], "height": 1})  # what loads on first use is not counted
        before = most_memory(reset=True)
        way(args)
    print(most_memory() - before)


def most_memory(reset=False):
    """MiB this process has held at once, since the last reset (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def row(*cells):
    print("| " + " | ".join(cell if isinstance(cell, str) else f"{cell:,.1f}" for cell in cells) + " |", flush=True)


def heading(text, *columns):
    print(f"\n## {text}\n")
    row(*columns)
    row(*["---"] * len(columns))


def mixing_table(samples):
    heading(
        "Without projections: convolution, scan, gate, norm and merge of d_model 2560",
        "tokens", "scans", "read in place, ms", "flipped or gathered copies, ms", "ratio", "peak MiB",
        "peak MiB, copies",
    )  # fmt: skip
    for tokens in GRIDS:
        for scan in ("raster", *SCANS):
            _, _, args = made(scan, tokens)
            require_close(in_place(args), with_copies(args))
            ms = interleaved({"a": lambda a=args: in_place(a), "b": lambda a=args: with_copies(a)}, samples)
            peaks = [peak_megabytes(who, scan, tokens) for who in ("in_place", "with_copies")]
            row(str(tokens), scan, ms["a"], ms["b"], f"{ms['b'] / ms['a']:.2f}", *peaks)


def gradient_table(samples):
    heading(
        "The same, forward and backward", "tokens", "scans", "read in place, ms", "copies, ms", "ratio",
        "of a forward",
    )  # fmt: skip
    for tokens, scan in ((729, "bidirectional"), (729, "cross"), (2916, "bidirectional")):
        _, _, args = made(scan, tokens)
        calls = {way.__name__: lambda w=way, a=args: gradients(w, a) for way in (in_place, with_copies)}
        ms = interleaved({**calls, "forward": lambda a=args: in_place(a)}, samples)
        ours, copied = ms["in_place"], ms["with_copies"]
        row(str(tokens), scan, ours, copied, f"{copied / ours:.2f}", f"{ours / ms['forward']:.2f}")


def scan_table(samples):
    heading("`conv_ssd_scan_2d` alone", "tokens", "one direction, ms", "four, ms", "four / one")
    for tokens in GRIDS:
        calls = {}
        for scan in ("raster", "cross"):
            mixer, (height, width), args = made(scan, tokens)
            _, xBC, dt = args["zxbcdt"].split([mixer.d_inner, mixer.conv_dim, mixer.nheads], dim=-1)
            calls[scan] = lambda m=mixer, xBC=xBC, dt=dt, height=height, width=width: mmkernels.conv_ssd_scan_2d(
                xBC, dt, m.conv_weight, -m.A_log.exp(), conv_bias=m.conv_bias, headdim=m.headdim, scans=m.scans,
                height=height, width=width, D=m.D, dt_bias=m.dt_bias, dt_softplus=True,
            )  # fmt: skip
        ms = interleaved(calls, 2 * samples)
        row(str(tokens), ms["raster"], ms["cross"], f"{ms['cross'] / ms['raster']:.2f}")


def mixer_table(samples):
    heading(
        "Bidirectional, 729 tokens, with and without projections", "way", "mixing only, ms", "whole mixer, ms",
        "against ours",
    )  # fmt: skip
    mixer, grid, args = made("bidirectional", 729)
    u = torch.randn(1, 729, D_MODEL)
    theirs = on_transformers(args)
    torch.testing.assert_close(in_place(args), theirs(args), rtol=1e-2, atol=1e-3)
    ways = {"read in place": in_place, "copies, one projection": with_copies, "transformers' scan": theirs}
    mixing = interleaved({n: lambda f=f: f(args) for n, f in ways.items()}, samples)
    calls = {n: lambda f=f: whole(f, mixer, u, grid) for n, f in ways.items()}
    calls["one mixer call a direction, native kernels"] = lambda: twice(mixer, u, grid)
    torch.testing.assert_close(twice(mixer, u, grid), mixer(u, grid), rtol=1e-2, atol=1e-3)
    together = interleaved(calls, samples)
    for name, ms in together.items():
        ours = together["read in place"]
        part = f"{mixing[name]:,.1f}" if name in mixing else "-"
        ratio = f"{ms / ours:.2f}x" + (
            f" (mixing {mixing[name] / mixing['read in place']:.2f}x)" if name in mixing else ""
        )
        row(name, part, ms, ratio)


def connector_table(samples):
    names = ("mlp", "msc_basic", "msc_advanced", "msc_advanced, cross")
    heading("Connector, 2176 -> 2560, two layers, ms", "tokens", *names)
    for tokens, grid in GRIDS.items():
        features = torch.randn(1, tokens, 2176)
        cells = []
        for name in names:
            variant, scan = name.split(", ") if ", " in name else (name, "bidirectional")
            connector = Mamba2ScanConnector(2176, D_MODEL, variant=variant, scan=scan)
            cells.append(interleaved({"a": lambda c=connector, f=features, g=grid: c(f, g)}, max(1, samples // 3))["a"])
            del connector
        row(str(tokens), *cells)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peak", nargs=3, metavar=("WHO", "SCAN", "TOKENS"), help="print one peak and stop")
    parser.add_argument("--samples", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        return print_peak(options.peak[0], options.peak[1], int(options.peak[2]))
    print("# Scans of a grid on a CPU\n")
    print(
        "`python benchmarks/ops/bench_scan2d.py`: float32, one thread, batch 1; forward without gradients if not said."
    )
    print(f"Times are the least of {options.samples} interleaved samples of CPU time (whole mixers 3, connectors 1),")
    print(
        "results checked against each other first. Peaks are beyond inputs and parameters, in a process of their own."
    )
    with torch.no_grad():
        mixing_table(options.samples)
        gradient_table(max(3, options.samples // 2))
        scan_table(options.samples)
        mixer_table(max(3, options.samples // 3))
        connector_table(options.samples)
    return None


if __name__ == "__main__":
    main()
