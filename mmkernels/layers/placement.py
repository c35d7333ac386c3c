"""Where a module's weights lie in memory: on 2 MiB pages, so that decoding reads them as fast as memory delivers.

Reading a weight matrix once per token misses the translation cache at every 4 KiB page; Linux has pages of 2 MiB for
whoever asks (`madvise(2)`, MADV_HUGEPAGE; Documentation/admin-guide/mm/transhuge.rst of the kernel).
"""

import mmap
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

_LARGE_PAGE = 2 << 20
_ALIGNMENT = 4096  # of a tensor inside the region


@dataclass(frozen=True)
class Placement:
    """What `place_for_decode` did.

    Args:
        tensors: parameters and buffers moved.
        moved_bytes: their size.
        large_page_bytes: how much of it the system put on 2 MiB pages, counted by the system itself.
        left: names of tensors that stayed where they were.
        reason: why nothing was asked for, or nothing granted; empty when large pages are in use.
    """

    tensors: int
    moved_bytes: int
    large_page_bytes: int
    left: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        found = f"{self.large_page_bytes / 2**20:.1f} MiB are on 2 MiB pages"
        done = f"moved {self.moved_bytes / 1e6:.1f} MB in {self.tensors} tensors; {found}"
        return f"{done} ({self.reason})" if self.reason else done


def place_for_decode(module: nn.Module) -> Placement:
    """Move a module's weights, in place, into one region of memory on 2 MiB pages where the system grants them.

    Parameters and buffers stay the same objects, tied ones stay tied, and optimizers go on working; only the memory
    behind them changes.  Call it once, after the weights are loaded and cast: `module.to(...)` moves them away again.
    The region is released when its last tensor is.

    Args:
        module: any module; tensors on other devices, of other classes than plain ones, or that share part of their
            memory with another, stay where they are and are listed in the result.

    Returns:
        A Placement: bytes moved, bytes on large pages, and the reason if there are none.

    Example:
        >>> from torch import nn
        >>> from mmkernels.layers import place_for_decode
        >>> place_for_decode(nn.Linear(8, 8)).moved_bytes
        288
    """
    groups, left = _groups(module)
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return Placement(0, 0, 0, tuple(left), "this system has no transparent large pages")
    size = sum(_room(tensors[0]) for tensors in groups)
    if size == 0:
        return Placement(0, 0, 0, tuple(left), "there is nothing to move")
    # Private: shared anonymous memory is governed by another switch.  Never written before the request below.
    region = mmap.mmap(-1, size + _LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    refused = ""
    try:
        region.madvise(mmap.MADV_HUGEPAGE)
    except OSError as error:  # a kernel built without them
        refused = f"the system refused: {error.strerror}"
    start = torch.frombuffer(region, dtype=torch.uint8, count=1).data_ptr()
    at = first = -start % _LARGE_PAGE
    moved = count = 0
    with torch.no_grad():
        for tensors in groups:
            one = tensors[0]
            # A storage of its own for each, so that saving sees no shared memory.
            flat = torch.frombuffer(region, dtype=one.dtype, count=one.numel(), offset=at)
            flat.copy_(one.detach().reshape(-1))
            for tensor in tensors:
                tensor.data = flat.view(one.shape)
            at += _room(one)
            moved += one.numel() * one.element_size()
            count += len(tensors)
    large = _large_page_bytes(start + first, start + at)
    return Placement(count, moved, large, tuple(left), refused or ("" if large else _why_none()))


def _room(tensor: torch.Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT


def _groups(module: nn.Module) -> tuple[list[list[torch.Tensor]], list[str]]:
    """Tensors to move, tied ones (the same memory, seen the same way) together; names of those that stay."""
    named = [*module.named_parameters(), *module.named_buffers()]
    views: dict[int, set[tuple[object, ...]]] = {}
    groups: dict[tuple[object, ...], list[torch.Tensor]] = {}
    left, movable = [], []
    for name, tensor in named:
        plain = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout == torch.strided
        if not plain or tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.numel() == 0:
            left.append(name)
            continue
        storage = tensor.untyped_storage().data_ptr()
        view = (storage, tensor.data_ptr(), tuple(tensor.shape), tensor.dtype)
        views.setdefault(storage, set()).add(view)
        movable.append((name, tensor, view))
    for name, tensor, view in movable:
        if len(views[tensor.untyped_storage().data_ptr()]) > 1:
            left.append(name)  # two different views of one memory: moving one would part them
        else:
            groups.setdefault(view, []).append(tensor)
    return list(groups.values()), left


def _large_page_bytes(begin: int, end: int) -> int:
    """Bytes of [begin, end) on large pages, as the kernel counts them; its counts are of whole mappings."""
    smaps = Path("/proc/self/smaps")
    if not smaps.exists():
        return 0
    counted, inside = 0, False
    for line in smaps.read_text(encoding="ascii", errors="replace").splitlines():
        head = line.split(None, 1)[0]
        if not head.endswith(":") and "-" in head:
            low, high = (int(part, 16) for part in head.split("-"))
            inside = low < end and begin < high
        elif inside and head == "AnonHugePages:":
            counted += int(line.split()[1]) * 1024
    return min(counted, end - begin)


def _why_none() -> str:
    switch = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not switch.exists():
        return "the kernel has no transparent large pages"
    setting = switch.read_text(encoding="ascii").strip()
    if "[never]" in setting:
        return f"{switch} is switched to never"
    return "the kernel granted none: less than 2 MiB of weights, or memory is fragmented"
