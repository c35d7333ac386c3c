"""decode_linear against torch's linear, on weights that come from memory, not from a cache, and placed alike.

Shapes: the two projections of mamba2-130m and of mamba2-1.3b, and the head of mamba2-130m.  One call walks through so
many different matrices that all of them together are larger than any cache; the figure is per walk, and
extra_info["GB/s"] the rate at which weights were read.  Pages: as malloc gives them, and placed by place_for_decode.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmkernels import decode_linear
from mmkernels.layers import place_for_decode

SHAPES = {
    "130m-in": (768, 3352),
    "130m-out": (1536, 768),
    "130m-head": (768, 50288),
    "1.3b-in": (2048, 8512),
    "1.3b-out": (4096, 2048),
}
DTYPES = [torch.bfloat16, torch.float32]
COLD = 256 << 20  # bytes: several times the last-level caches of today's servers' cores
# Both round once to the output's type; sums of a few thousand products in float32 differ by their order.
TOLERANCE = {torch.float32: {"rtol": 1e-4, "atol": 1e-4}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}


def matrices(inner, out, dtype, placed):
    torch.manual_seed(0)
    size = inner * out * dtype.itemsize
    layers = nn.ModuleList(nn.Linear(inner, out, bias=False, dtype=dtype) for _ in range(max(2, COLD // size)))
    layers.requires_grad_(False)
    if placed:
        place_for_decode(layers)
    return [layer.weight for layer in layers]


def walk(function, x, weights):
    for weight in weights:
        function(x, weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("who", [decode_linear, F.linear], ids=["mmkernels", "torch"])
@pytest.mark.parametrize(
    ("rows", "placed"),
    [(1, False), *((rows, True) for rows in (1, 2, 4, 8, 16))],
    ids=lambda v: {False: "small-pages", True: "large-pages"}[v] if isinstance(v, bool) else f"{v}-rows",
)
@pytest.mark.parametrize("shape", SHAPES)
def bench_forward(benchmark, shape, rows, placed, who, dtype):
    inner, out = SHAPES[shape]
    weights = matrices(inner, out, dtype, placed)
    x = torch.randn(rows, inner).to(dtype)
    benchmark.group = f"decode_linear {shape} rows {rows} {'large' if placed else 'small'} pages {dtype}"
    with torch.no_grad():
        torch.testing.assert_close(decode_linear(x, weights[0]), F.linear(x, weights[0]), **TOLERANCE[dtype])
        benchmark(walk, who, x, weights)
    if benchmark.stats is not None:
        read = sum(weight.numel() * weight.element_size() for weight in weights)
        benchmark.extra_info["GB/s"] = round(read / benchmark.stats.stats.median / 1e9, 1)
