"""Argument checks shared by every op: shapes bound to named sizes, dtypes, devices.  No data is read, nothing syncs."""

from typing import Any

import torch

from mmkernels.errors import DeviceError, DtypeError, ShapeError

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Sizes:
    """Named sizes, bound by the first tensor that mentions them and checked against every later one.

    Example:
        >>> sizes = Sizes("ssd_scan")
        >>> sizes.bind("x", torch.zeros(2, 8, 4, 16), "batch seqlen nheads headdim")
        >>> sizes["nheads"]
        4
    """

    def __init__(self, function: str):
        self.function = function
        self.known: dict[str, int] = {}

    def __getitem__(self, name: str) -> int:
        return self.known[name]

    def set(self, **sizes: int) -> None:
        """Bind sizes that no tensor spells out, e.g. width - 1."""
        self.known.update(sizes)

    def bind(self, argument: str, value: Any, layout: str, remedy: str = "") -> None:
        """Check that `value` is a tensor of the given layout, e.g. "batch seqlen nheads"; digits are literal sizes.

        Raises:
            DtypeError: not a tensor.
            ShapeError: another number of dimensions, or a size that contradicts an earlier tensor.
        """
        if not isinstance(value, torch.Tensor):
            raise DtypeError(
                f"{self.function}: {argument} must be a tensor; got {type(value).__name__}. {remedy}".strip()
            )
        names = layout.split()
        shape = value.shape
        good = len(names) == len(shape)
        if good:
            for name, size in zip(names, shape, strict=True):
                want = int(name) if name.isdigit() else self.known.setdefault(name, size)
                if size != want:
                    good = False
                    break
        if not good:
            wanted = ", ".join(n if n.isdigit() or n not in self.known else f"{n}={self.known[n]}" for n in names)
            raise ShapeError(
                f"{self.function}: {argument} must have shape ({wanted}); got {tuple(shape)}. "
                f"{remedy or 'Every tensor of the call must agree on these sizes.'}"
            )

    def divides(self, small: str, large: str, remedy: str) -> None:
        """Check that size `small` divides size `large`."""
        if self.known[small] == 0 or self.known[large] % self.known[small] != 0:
            raise ShapeError(
                f"{self.function}: {small} must divide {large}; got {small}={self.known[small]}, "
                f"{large}={self.known[large]}. {remedy}"
            )


class Verified:
    """Signatures of calls that passed their checks: decoding repeats a call for every token, and checking it anew would
    take longer than the call.

    Only for checks of shapes, dtypes, devices and plain options, which a signature holds completely.

    Example:
        >>> verified = Verified()
        >>> seen = verified.signature(torch.zeros(2), None, 0.5)
        >>> verified.add(seen)
        >>> verified.signature(torch.ones(2), None, 0.5) in verified
        True
    """

    LIMIT = 1024  # then it starts anew: shapes that never end must not fill the memory

    def __init__(self) -> None:
        self._known: set[tuple[Any, ...]] = set()

    def signature(self, *values: Any) -> tuple[Any, ...] | None:
        """What the checks read of tensors and options; None if that cannot be kept (tracing, subclasses, lists)."""
        if torch.compiler.is_compiling():
            return None
        made: list[Any] = []
        for value in values:
            kind = type(value)
            if kind is torch.Tensor or kind is torch.nn.Parameter:
                made.append((value.shape, value.dtype, value.device))
            elif value is None or kind is bool or kind is str or kind is float or kind is int:
                made.append(value if kind is not bool else (kind, value))  # True == 1, but is no number
            elif kind is tuple and all(type(item) is float or type(item) is int for item in value):
                made.append(value)
            else:
                return None
        return tuple(made)

    def __contains__(self, signature: tuple[Any, ...] | None) -> bool:
        return signature in self._known

    def add(self, signature: tuple[Any, ...] | None) -> None:
        """Remember a call that passed; None is not remembered."""
        if signature is None:
            return
        if len(self._known) >= self.LIMIT:
            self._known.clear()
        self._known.add(signature)


def floating(function: str, **tensors: torch.Tensor | None) -> None:
    """Check that every given tensor is float32, bfloat16, float16 or float64."""
    for name, value in tensors.items():
        if value is not None and value.dtype not in FLOATS:
            raise DtypeError(
                f"{function}: {name} must be float32, bfloat16, float16 or float64; got {value.dtype}. "
                f"Convert it with {name}.float()."
            )


def integer(function: str, **tensors: torch.Tensor | None) -> None:
    """Check that every given tensor is int32 or int64."""
    for name, value in tensors.items():
        if value is not None and value.dtype not in (torch.int32, torch.int64):
            raise DtypeError(
                f"{function}: {name} must be int32 or int64; got {value.dtype}. Convert it with {name}.int()."
            )


def same_dtype(function: str, **tensors: torch.Tensor | None) -> None:
    """Check that every given tensor has the dtype of the first."""
    given = {name: value for name, value in tensors.items() if value is not None}
    first = next(iter(given))
    for name, value in given.items():
        if value.dtype != given[first].dtype:
            raise DtypeError(
                f"{function}: {name} must have the dtype of {first} ({given[first].dtype}); got {value.dtype}. "
                f"Convert it with {name}.to({first}.dtype)."
            )


def same_device(function: str, **tensors: torch.Tensor | None) -> None:
    """Check that every given tensor lives on the device of the first."""
    given = {name: value for name, value in tensors.items() if value is not None}
    first = next(iter(given))
    for name, value in given.items():
        if value.device != given[first].device:
            raise DeviceError(
                f"{function}: {name} must be on {given[first].device} like {first}; got {value.device}. "
                f"Move it with {name}.to({first}.device)."
            )
