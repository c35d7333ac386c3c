"""What this machine can do at best, raced in the same run as the ops: a matrix product, a read, a copy."""

import functools
import mmap
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_SIDE = 2048
_MEBIBYTE = 1 << 20
_READ = 256 * _MEBIBYTE  # many times any last-level cache of the machines this runs on
_COPY = 128 * _MEBIBYTE

# name -> (unit, amount of work in one call in units of 1e9)
WORK = {"gemm": 2 * _SIDE**3 / 1e9, "read": _READ / 1e9, "copy": 2 * _COPY / 1e9}
TITLES = {
    "gemm": "torch's float32 2048^3 matrix product, GFLOP/s",
    "read": "reading 256 MiB in 2 MiB pages, GB/s",
    "copy": "copying 128 MiB in 2 MiB pages, read and written bytes, GB/s",
}


def huge_pages(size: int) -> Tensor:
    """A float32 tensor in memory of 2 MiB pages, where the system has them."""
    memory = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32).fill_(1.0)


@functools.cache
def _buffers(name: str) -> tuple[Tensor, ...]:
    if name == "gemm":
        return tuple(torch.randn(3, _SIDE, _SIDE))
    return (huge_pages(_READ),) if name == "read" else (huge_pages(_COPY), huge_pages(_COPY))


def limit(name: str) -> Callable[[], Any]:
    """A function that does the work of one limit."""
    first, *rest = _buffers(name)
    if name == "gemm":
        return lambda: torch.mm(first, rest[0], out=rest[1])
    return first.sum if name == "read" else lambda: rest[0].copy_(first)
