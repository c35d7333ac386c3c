"""A Mamba-2 mixer between its projections against transformers' same part; `mmkernels bench` races it."""

import pytest
import torch

from mmkernels.bench.plans import entrants


@pytest.mark.parametrize(
    ("cell", "name"), entrants("mixer", ("130m",), (512, 2048), threads=torch.get_num_threads()), ids=str
)
def bench_forward(measure, cell, name):
    measure(cell, name)
