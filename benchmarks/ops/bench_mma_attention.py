"""mma_attention against its peers, as pytest-benchmark tests; `mmkernels bench --ops mma_attention` races them.

Shapes: AKI's prompt (an image, then the question it reads), a bidirectional image, decoding over a cache of keys.
"""

import pytest
import torch

from mmkernels.bench.plans import entrants

THREADS = torch.get_num_threads()
NOBODY = frozenset()  # flex_attention is left out of quick looks because it compiles; here it takes part


@pytest.mark.parametrize(
    ("cell", "name"),
    [
        *entrants("mma_attention", ("aki", "aki-d128", "bidir"), (1024,), threads=THREADS, without=NOBODY),
        *entrants("mma_attention", ("aki-d128", "aki-short-d128"), (4096,), threads=THREADS, dtypes=("float32",)),
    ],
    ids=str,
)
def bench_forward(measure, cell, name):
    measure(cell, name)


@pytest.mark.parametrize(
    ("cell", "name"),
    entrants("mma_attention", ("aki", "aki-d128"), (1024,), threads=THREADS, dtypes=("float32",), backward=True),
    ids=str,
)
def bench_forward_backward(measure, cell, name):
    measure(cell, name)


@pytest.mark.parametrize(
    ("cell", "name"),
    entrants("mma_attention_decode", ("kv-cache",), (8192, 32768), threads=THREADS, dtypes=("bfloat16",)),
    ids=str,
)
def bench_decode(measure, cell, name):
    measure(cell, name)
