"""How far ssd_scan drifts from float64 as sequences grow: writes a markdown table.

    python benchmarks/ops/error_growth.py [--out benchmarks/results/ssd_error_growth.md]

Two kinds of memory: Mamba-2's initialisation (A from -1 to -16, steps of 0.001 to 0.1), and a state that hardly forgets
(A = -0.001, so that the last output still holds the first tokens).  The truth is the float64 native scan, which a
test holds against the token-by-token recurrence (tests/ops/test_ssd_growth.py).
"""

import argparse
from pathlib import Path

import torch

import mmkernels

LENGTHS = (1024, 8192, 32768, 131072)
HEADS, HEADDIM, DSTATE = 4, 64, 64
MEMORIES = {"as initialised": (-1.0, -16.0), "hardly forgets": (-0.001, -0.001)}


def inputs(seqlen: int, memory: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Arguments of ssd_scan in float64, representable in float32 so that their rounding is not counted."""
    generator = torch.Generator().manual_seed(seed)
    dt = torch.empty(1, seqlen, HEADS).uniform_(-6.9, -2.3, generator=generator).exp()
    made = {
        "x": torch.randn(1, seqlen, HEADS, HEADDIM, generator=generator),
        "dt": dt,
        "A": torch.linspace(*MEMORIES[memory], HEADS),
        "B": torch.randn(1, seqlen, 1, DSTATE, generator=generator),
        "C": torch.randn(1, seqlen, 1, DSTATE, generator=generator),
    }
    return {name: value.float().double() for name, value in made.items()}


def relative_error(actual: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest error in units of the truth's root mean square, which is what a next layer sees."""
    return ((actual.double() - truth).abs().max() / truth.square().mean().sqrt()).item()


def errors(seqlen: int, memory: str) -> dict[str, float]:
    """Of y over the last 1024 tokens, where the most has been added up, and of the state that leaves."""
    exact = inputs(seqlen, memory)
    truth, state = mmkernels.ssd_scan(**exact, return_final_states=True, backend="native")
    found = {}
    for name, dtype, backend in (("native", torch.float32, "native"), ("torch", torch.float32, "torch")):
        args = {key: value.to(dtype) for key, value in exact.items()}
        y, final = mmkernels.ssd_scan(**args, return_final_states=True, backend=backend)
        found[f"y, {name}"] = relative_error(y[:, -1024:], truth[:, -1024:])
        found[f"state, {name}"] = relative_error(final, state)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/ssd_error_growth.md"))
    lines = ["# ssd_scan: error against float64 as the sequence grows", ""]
    lines += [
        "Largest error of the last 1024 outputs and of the final state, in units of the truth's root mean square;"
    ]
    lines += [f"{HEADS} heads of {HEADDIM}, state {DSTATE}.  `python benchmarks/ops/error_growth.py`."]
    out = parser.parse_args().out
    for memory in MEMORIES:
        rows = {seqlen: errors(seqlen, memory) for seqlen in LENGTHS}
        names = list(rows[LENGTHS[0]])
        lines += ["", f"## {memory}", "", "| tokens | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        lines += [f"| {n} | " + " | ".join(f"{row[name]:.1e}" for name in names) + " |" for n, row in rows.items()]
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
