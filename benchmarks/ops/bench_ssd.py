"""ssd_scan and ssd_update against their peers, as pytest-benchmark tests; `mmkernels bench` races them.

Shapes: a layer of mamba2-130m at two prompt lengths, of mmMamba at one, a training batch of a small model, one token.
"""

import pytest
import torch

from mmkernels.bench.limits import limit
from mmkernels.bench.plans import entrants

THREADS = torch.get_num_threads()


@pytest.mark.parametrize(
    ("cell", "name"),
    [
        *entrants("ssd_scan", ("130m",), (512, 2048), threads=THREADS),
        *entrants("ssd_scan", ("mmmamba",), (512,), threads=THREADS),
    ],
    ids=str,
)
def bench_forward(measure, cell, name):
    measure(cell, name)


@pytest.mark.parametrize(
    ("cell", "name"),
    [
        *entrants("ssd_scan", ("130m",), (512,), threads=THREADS, dtypes=("float32",), backward=True),
        *entrants("ssd_scan", ("training",), (20,), threads=THREADS, dtypes=("float32",), backward=True),
    ],
    ids=str,
)
def bench_forward_backward(measure, cell, name):
    measure(cell, name)


@pytest.mark.parametrize(("cell", "name"), entrants("ssd_update", ("130m", "training"), (1,), threads=THREADS), ids=str)
def bench_update(measure, cell, name):
    """The states of all layers in rotation: a figure is extra_info's `calls` calls."""
    measure(cell, name)


@pytest.mark.parametrize("name", ["gemm", "read", "copy"])
def bench_limit(benchmark, name):
    """What the machine can do at best: a float32 2048^3 matrix product (17.2 GFLOP), a read, a copy."""
    benchmark.group = "limits of the machine"
    benchmark(limit(name))
