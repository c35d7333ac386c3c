"""Scans of a grid in several directions against copies of the tokens in each order, and transformers' CPU scan.

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
from mmkernels.layers import Mamba2ScanConnector, MultiDirectionalMamba2

SCANS = {"bidirectional": ("raster", "raster_rev"), "cross": ("raster", "column", "raster_rev", "column_rev")}
GRIDS = {729: (27, 27), 2916: (54, 54)}
D_MODEL = 2560


def in_place(mixer, projected, grid):
    """Convolution, scan, norm and merge of all directions, reading through the orders: what the layer does."""
    z, xBC, dt = projected.split([mixer.d_inner, mixer.conv_dim, mixer.nheads], dim=-1)
    y = mmkernels.conv_ssd_scan_2d(
        xBC,
        dt,
        mixer.conv_weight,
        -mixer.A_log.exp(),
        conv_bias=mixer.conv_bias,
        headdim=mixer.headdim,
        scans=mixer.scans,
        height=grid[0],
        width=grid[1],
        D=mixer.D,
        dt_bias=mixer.dt_bias,
        dt_softplus=True,
    )
    return mmkernels.merged_gated_rms_norm(y.flatten(-2), mixer.norm.weight, z=z)


def with_copies(mixer, projected, grid):
    """The same on the one-dimensional native ops: each direction's tokens are copied in its order, the result back."""
    merged = None
    for k, scan in enumerate(mixer.scans):
        order, inverse = mmkernels.scan_permutation(scan, *grid)
        z, xBC, dt = permuted(projected, scan, order).split([mixer.d_inner, mixer.conv_dim, mixer.nheads], dim=-1)
        xBC = mmkernels.causal_conv1d(xBC, mixer.conv_weight[k], mixer.conv_bias[k], activation="silu")
        x, B, C = heads(mixer, xBC)
        A = -mixer.A_log[k].exp()
        y = mmkernels.ssd_scan(x, dt, A, B, C, D=mixer.D[k], dt_bias=mixer.dt_bias[k], dt_softplus=True)
        out = permuted(mmkernels.gated_rms_norm(y.flatten(-2), mixer.norm.weight, z=z), scan, inverse)
        merged = out if merged is None else merged.add_(out)
    return merged.div_(len(mixer.scans))


def on_transformers(mixer, projected, grid):
    """The same on transformers' Mamba2Mixer without its projections, at chunks of 64.

    Its own default, 256, takes over 8 GB here: it multiplies B and C out for every pair of tokens, head and state.
    """
    merged = None
    for k, scan in enumerate(mixer.scans):
        order, inverse = mmkernels.scan_permutation(scan, *grid)
        out = transformers_direction(mixer, k)(permuted(projected, scan, order))
        out = permuted(out, scan, inverse)
        merged = out if merged is None else merged.add_(out)
    return merged.div_(len(mixer.scans))


def transformers_direction(mixer, k):
    """transformers' mixer with the parameters of direction k."""
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = Mamba2Config(
        hidden_size=mixer.d_model,
        num_heads=mixer.nheads,
        head_dim=mixer.headdim,
        state_size=mixer.d_state,
        n_groups=mixer.ngroups,
        expand=2,
        chunk_size=64,
        time_step_limit=(0.0, float("inf")),
    )
    with torch.device("meta"):
        peer = Mamba2Mixer(config, layer_idx=0)
    peer.in_proj = peer.out_proj = torch.nn.Identity()
    parameters = {
        "conv1d.weight": mixer.conv_weight[k][:, None],
        "conv1d.bias": mixer.conv_bias[k],
        "dt_bias": mixer.dt_bias[k],
        "A_log": mixer.A_log[k],
        "D": mixer.D[k],
        "norm.weight": mixer.norm.weight,
    }
    peer.load_state_dict(parameters, assign=True)
    return peer.eval()  # in training it would look for a fused kernel first


def permuted(tokens, scan, order):
    """A copy in another order, made the fastest way torch has."""
    if scan == "raster":
        return tokens
    return tokens.flip(1) if scan == "raster_rev" else tokens.index_select(1, order)


def heads(mixer, xBC):
    """The x, B and C of a convolved projection."""
    keys = mixer.ngroups * mixer.d_state
    x, B, C = xBC.split([mixer.d_inner, keys, keys], dim=-1)
    groups = (mixer.ngroups, mixer.d_state)
    return x.unflatten(-1, (mixer.nheads, mixer.headdim)), B.unflatten(-1, groups), C.unflatten(-1, groups)


def whole(mixing, mixer, u, grid):
    """A mixer with its projections."""
    return mixer.out_proj(mixing(mixer, mixer.in_proj(u), grid))


def twice(mixer, u, grid):
    """A mixer called on the tokens in each order, projections and all: what a one-dimensional layer offers."""
    merged = 0.0
    for k, scan in enumerate(mixer.scans):
        order, inverse = mmkernels.scan_permutation(scan, *grid)
        z, xBC, dt = mixer.in_proj(permuted(u, scan, order)).split(
            [mixer.d_inner, mixer.conv_dim, mixer.nheads], dim=-1
        )
        xBC = mmkernels.causal_conv1d(xBC, mixer.conv_weight[k], mixer.conv_bias[k], activation="silu")
        x, B, C = heads(mixer, xBC)
        A = -mixer.A_log[k].exp()
        y = mmkernels.ssd_scan(x, dt, A, B, C, D=mixer.D[k], dt_bias=mixer.dt_bias[k], dt_softplus=True)
        out = mixer.out_proj(mmkernels.gated_rms_norm(y.flatten(-2), mixer.norm.weight, z=z))
        merged = merged + permuted(out, scan, inverse)
    return merged / len(mixer.scans)


# ---- pytest ----


@pytest.mark.parametrize("who", [in_place, with_copies], ids=lambda f: f.__name__)
@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("tokens", GRIDS)
def bench_directions(benchmark, tokens, scan, who):
    mixer, projected, grid = made(scan, tokens)
    benchmark.group = f"scan2d {tokens} {scan}"
    with torch.no_grad():
        torch.testing.assert_close(
            who(mixer, projected, grid), with_copies(mixer, projected, grid), rtol=1e-3, atol=1e-4
        )
        benchmark(who, mixer, projected, grid)


# ---- the table ----


def made(scan, tokens):
    """A mixer with random projections of that many tokens."""
    torch.manual_seed(0)
    mixer = MultiDirectionalMamba2(D_MODEL, scans=SCANS.get(scan, (scan,)))
    return mixer, torch.randn(1, tokens, mixer.in_proj.out_features) / 2, GRIDS[tokens]


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
    mixer, projected, grid = made(scan, tokens)
    with torch.no_grad():
        globals()[who](mixer, projected[:, : grid[1]], (1, grid[1]))  # what loads on first use is not counted
        before = most_memory(reset=True)
        globals()[who](mixer, projected, grid)
    print(most_memory() - before)


def most_memory(reset=False):
    """MiB this process has held at once, since the last reset (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def row(*cells):
    print("| " + " | ".join(cell if isinstance(cell, str) else f"{cell:,.1f}" for cell in cells) + " |", flush=True)


def mixing_table(samples):
    print("## Without projections: convolution, scan, gate, norm and merge of d_model 2560\n")
    row(
        "tokens",
        "scans",
        "read in place, ms",
        "flipped or gathered copies, ms",
        "ratio",
        "peak MiB",
        "peak MiB, copies",
    )
    row(*["---"] * 7)
    for tokens in GRIDS:
        for scan in ("raster", *SCANS):
            mixer, projected, grid = made(scan, tokens)
            arguments = (mixer, projected, grid)
            torch.testing.assert_close(in_place(*arguments), with_copies(*arguments), rtol=1e-3, atol=1e-4)
            ms = interleaved({"a": lambda a=arguments: in_place(*a), "b": lambda a=arguments: with_copies(*a)}, samples)
            peaks = [peak_megabytes(who, scan, tokens) for who in ("in_place", "with_copies")]
            row(str(tokens), scan, ms["a"], ms["b"], f"{ms['b'] / ms['a']:.2f}", *peaks)


def scan_table(samples):
    print("\n## `conv_ssd_scan_2d` alone\n")
    row("tokens", "one direction, ms", "four, ms", "four / one")
    row(*["---"] * 4)
    for tokens in GRIDS:
        calls = {}
        for scan in ("raster", "cross"):
            mixer, projected, (height, width) = made(scan, tokens)
            xBC, dt = projected[..., mixer.d_inner : -mixer.nheads], projected[..., -mixer.nheads :]
            calls[scan] = lambda m=mixer, xBC=xBC, dt=dt, height=height, width=width: mmkernels.conv_ssd_scan_2d(
                xBC, dt, m.conv_weight, -m.A_log.exp(), conv_bias=m.conv_bias, headdim=m.headdim, scans=m.scans,
                height=height, width=width, D=m.D, dt_bias=m.dt_bias, dt_softplus=True,
            )  # fmt: skip
        ms = interleaved(calls, 2 * samples)
        row(str(tokens), ms["raster"], ms["cross"], f"{ms['cross'] / ms['raster']:.2f}")


def mixer_table(samples):
    print("\n## Bidirectional, 729 tokens, with and without projections\n")
    row("way", "mixing only, ms", "whole mixer, ms", "against ours")
    row(*["---"] * 4)
    mixer, projected, grid = made("bidirectional", 729)
    u = torch.randn(1, 729, D_MODEL)
    theirs = on_transformers(mixer, projected, grid)
    torch.testing.assert_close(in_place(mixer, projected, grid), theirs, rtol=1e-2, atol=1e-3)
    ways = {"read in place": in_place, "copies, one projection": with_copies, "transformers' scan": on_transformers}
    mixing = interleaved({n: lambda f=f: f(mixer, projected, grid) for n, f in ways.items()}, samples)
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
    print("\n## Connector, 2176 -> 2560, two layers, ms\n")
    row("tokens", "mlp", "msc_basic", "msc_advanced", "msc_advanced, cross")
    row(*["---"] * 5)
    for tokens, grid in GRIDS.items():
        features = torch.randn(1, tokens, 2176)
        cells = []
        for name in ("mlp", "msc_basic", "msc_advanced", "msc_advanced, cross"):
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
    print("`python benchmarks/ops/bench_scan2d.py`: float32, one thread, batch 1, forward without gradients.")
    print(f"Times are the least of {options.samples} interleaved samples of CPU time (whole mixers 3, connectors 1),")
    print(
        "results checked against each other first. Peaks are beyond inputs and parameters, in a process of their own.\n"
    )
    with torch.no_grad():
        mixing_table(options.samples)
        scan_table(options.samples)
        mixer_table(max(3, options.samples // 3))
        connector_table(options.samples)
    return None


if __name__ == "__main__":
    main()
