"""Kernels read nothing outside their tensors: surrounded by NaN, the answer is the same to the last bit."""

import pytest
import torch

from mmkernels import _triton
from mmkernels._dispatch import registered
from mmkernels.testing import CASES
from mmkernels.testing.contract import forward_backward

DEVICE = "cpu" if _triton.interpreting() else "cuda"
OPS = [op for op, entry in registered().items() if "triton" in entry.entries]


def surrounded(tensor):
    """The same tensor as the inside of a larger one full of NaN, dense along its last axis."""
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point() or tensor.numel() == 0:
        return tensor
    around = torch.full([size + 2 for size in tensor.shape], float("nan"), dtype=tensor.dtype, device=tensor.device)
    inside = around[tuple(slice(1, -1) for _ in tensor.shape)]
    inside.copy_(tensor)
    return inside


@pytest.mark.parametrize("op", OPS)
def test_nothing_outside_is_read(op, monkeypatch):
    # The two largest of the small cases stand for all: odd sizes, most options.
    small = [case for case in CASES[op] if case.small and not case.heavy]
    small.sort(key=lambda case: sum(v.numel() for v in case.args().values() if isinstance(v, torch.Tensor)))
    for case in small[-2:]:
        values = case.args(torch.float64)
        plain = forward_backward(case, "triton", torch.float32, values, DEVICE)
        run = type(case).run

        def guarded(self, args, backend, run=run):
            return run(self, {k: surrounded(v) for k, v in args.items()}, backend)

        with monkeypatch.context() as patch:
            patch.setattr(type(case), "run", guarded)
            inside = forward_backward(case, "triton", torch.float32, values, DEVICE)
        for a, b in zip((*plain[0], *plain[1].values()), (*inside[0], *inside[1].values()), strict=True):
            assert torch.equal(a, b), case.id
