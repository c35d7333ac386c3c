"""causal_conv1d and causal_conv1d_update against their peers, as pytest-benchmark tests; `mmkernels bench` races them.

Shapes: the prefill of a mamba2-130m and of an mmMamba layer, a training batch of a small model, one decode step.
"""

import pytest
import torch

from mmkernels.bench.plans import entrants

THREADS = torch.get_num_threads()


@pytest.mark.parametrize(
    ("cell", "name"), entrants("causal_conv1d", ("130m", "mmmamba"), (2048,), threads=THREADS), ids=str
)
def bench_forward(measure, cell, name):
    measure(cell, name)


@pytest.mark.parametrize(
    ("cell", "name"),
    [
        *entrants("causal_conv1d", ("130m",), (2048,), threads=THREADS, dtypes=("float32",), backward=True),
        *entrants("causal_conv1d", ("training",), (20,), threads=THREADS, dtypes=("float32",), backward=True),
    ],
    ids=str,
)
def bench_forward_backward(measure, cell, name):
    measure(cell, name)


@pytest.mark.parametrize(
    ("cell", "name"), entrants("causal_conv1d_update", ("130m", "training"), (1,), threads=THREADS), ids=str
)
def bench_update(measure, cell, name):
    """The states of all layers in rotation: a figure is extra_info's `calls` calls."""
    measure(cell, name)
