"""gated_rms_norm against its peers, as pytest-benchmark tests; `mmkernels bench` races them.

Shapes: the closing norm of mamba2-130m (gate first) and of an mmMamba layer (per head, gate afterwards), a training
batch of a small model, one token.
"""

import pytest
import torch

from mmkernels.bench.plans import entrants

THREADS = torch.get_num_threads()


@pytest.mark.parametrize(
    ("cell", "name"), entrants("gated_rms_norm", ("130m", "mmmamba"), (1, 2048), threads=THREADS), ids=str
)
def bench_forward(measure, cell, name):
    measure(cell, name)


@pytest.mark.parametrize(
    ("cell", "name"),
    [
        *entrants("gated_rms_norm", ("130m",), (2048,), threads=THREADS, dtypes=("float32",), backward=True),
        *entrants("gated_rms_norm", ("training",), (20,), threads=THREADS, dtypes=("float32",), backward=True),
    ],
    ids=str,
)
def bench_forward_backward(measure, cell, name):
    measure(cell, name)
