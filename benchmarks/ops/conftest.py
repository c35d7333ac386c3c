"""The pytest-benchmark front end of mmkernels.bench: its cells, contestants and checks as tests (`make bench`)."""

import pytest
import torch

from mmkernels.bench.ops import OPS, OURS, prepare
from mmkernels.bench.problems import PEER_ERRORS, Unavailable, failure


@pytest.fixture
def measure(benchmark):
    """Check a contestant of a cell, then let pytest-benchmark time it; skip it with its reason if it cannot run."""

    def run(cell, name):
        try:
            with torch.set_grad_enabled(cell.backward):
                prepared, error = prepare(cell, OPS[cell.op].contestant(name))
        except Unavailable as why:
            pytest.skip(f"{name}: {why}")
        except PEER_ERRORS as error:
            if name.startswith(OURS):
                raise
            pytest.skip(f"{name}: {failure(error)}")
        benchmark.group = cell.id
        benchmark.extra_info.update(error=error, calls=prepared.calls)
        with torch.set_grad_enabled(cell.backward):
            benchmark(prepared.run)

    return run
