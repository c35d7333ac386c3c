"""The errors users see.  Each message names the argument, the expectation, what came, and the remedy."""

import difflib
from collections.abc import Iterable


class MMKernelsError(Exception):
    """Base of every error raised on purpose by this package."""


class ShapeError(MMKernelsError, ValueError):
    """A tensor or number has a size that the operation is not defined for."""


class DtypeError(MMKernelsError, TypeError):
    """A tensor has a dtype (or an argument a type) that the operation is not defined for."""


class DeviceError(MMKernelsError, ValueError):
    """Tensors that must live on one device do not."""


class BackendError(MMKernelsError, RuntimeError):
    """No backend, or not the requested one, can run a call.  Carries every backend's reasons."""


class ConfigError(MMKernelsError, ValueError):
    """A configuration, recipe or command-line value is not valid."""


class CheckpointError(MMKernelsError, RuntimeError):
    """A checkpoint is incomplete, damaged, or not of the expected layout."""


class DataError(MMKernelsError, ValueError):
    """An image, question or data file cannot be used."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint for error messages: the closest known words, or all of them when nothing is close.

    >>> nearest("tripton", ["torch", "triton"])
    "Did you mean 'triton'? Known: torch, triton."
    """
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(names)}."
