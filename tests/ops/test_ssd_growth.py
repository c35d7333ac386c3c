"""The error of ssd_scan must not grow with the sequence: 131072 tokens against float64."""

import runpy
from pathlib import Path

import pytest
import torch

import mmkernels

GROWTH = runpy.run_path(str(Path(__file__).resolve().parents[2] / "benchmarks" / "ops" / "error_growth.py"))
LENGTH = 131072


@pytest.mark.slow
@pytest.mark.parametrize("memory", GROWTH["MEMORIES"])
def test_error_at_131072_tokens(memory):
    # 64 float32 roundings of a typical output.  A chunk's contribution is rounded into the state once: a random walk of
    # 2048 half roundings, 23 of them wide, even where the state keeps everything.
    bar = 64 * torch.finfo(torch.float32).eps
    found = GROWTH["errors"](LENGTH, memory)
    assert max(found.values()) < bar, found


@pytest.mark.slow
def test_the_float64_truth_is_the_recurrence():
    # In one number a head, so that 131072 steps of Python stay a few seconds.
    args = GROWTH["inputs"](LENGTH, "hardly forgets")
    args = {name: value[..., :1] if name in ("B", "C") else value for name, value in args.items()}
    args = {**args, "x": args["x"][..., :1]}
    state, scale = torch.zeros(args["x"].shape[2], dtype=torch.float64), torch.exp(args["A"] * args["dt"][0])
    steps = args["dt"][0] * args["x"][0, :, :, 0] * args["B"][0, :, :, 0]
    for decay, step in zip(scale, steps, strict=True):
        state = state * decay + step
    _, final = mmkernels.ssd_scan(**args, return_final_states=True, backend="native")
    torch.testing.assert_close(final[0, :, 0, 0], state, rtol=1e-11, atol=1e-12)
