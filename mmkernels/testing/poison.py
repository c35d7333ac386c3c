"""Fresh memory full of NaN: an output element that nobody wrote cannot pass a test unnoticed."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmkernels import _native

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

    A dispatch mode does not see what a C++ op allocates inside: our own have a switch, torch's are filled by the one
    for deterministic results.  The scratch memory of the kernels is poisoned by the sanitizer build.
    """
    native = _native.poison(True)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with _Poison():
            yield
    finally:
        _native.poison(native)
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
