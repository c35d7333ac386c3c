"""Fresh memory full of NaN: an output element that nobody wrote cannot pass a test unnoticed."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_EMPTY = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}


class _Poison(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if func in _EMPTY and out.is_floating_point():
            out.fill_(float("nan"))
        return out


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Fill every uninitialised floating tensor allocated inside the block with NaN (torch.empty and its relatives).

    Native C++ kernels allocate through the same ATen calls; the sanitizer build watches their
    own scratch memory.
    """
    with _Poison():
        yield
