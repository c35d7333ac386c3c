"""The only reader of the process environment: every variable the package understands is listed here.

MMKERNELS_BACKEND   force one backend for every op (read once, at import); unset or "auto" = automatic order
MMKERNELS_BUILD     "off" forbids compiling native code, at install and at first use
MMKERNELS_CACHE     folder for native code compiled at first use (default: the user's cache folder)
CXX                 the C++ compiler to use (default: the first of c++, g++, clang++ on PATH)
"""

import os
from pathlib import Path


def forced_backend() -> str | None:
    """The backend named by MMKERNELS_BACKEND, or None for the automatic order."""
    name = os.environ.get("MMKERNELS_BACKEND", "").strip()
    return None if name in ("", "auto") else name


def build_allowed() -> bool:
    """Whether native code may be compiled on this machine (MMKERNELS_BUILD is not "off")."""
    return os.environ.get("MMKERNELS_BUILD", "auto").strip().lower() not in ("off", "0", "no")


def cache_dir() -> Path:
    """Where native code compiled at first use is kept; the folder need not exist yet."""
    explicit = os.environ.get("MMKERNELS_CACHE")
    if explicit:
        return Path(explicit).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mmkernels"


def triton_interpreted() -> bool:
    """Whether Triton runs its kernels in the Python interpreter (TRITON_INTERPRET=1), as tests on a CPU do."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def running_in_ci() -> bool:
    """Whether progress bars should stay silent because nobody watches."""
    return os.environ.get("CI", "").lower() in ("1", "true")


def compiler_path() -> str | None:
    """PATH as the compiler search sees it; None when the variable is unset."""
    return os.environ.get("PATH")


def compiler_override() -> str | None:
    """The C++ compiler named by CXX, if any."""
    return os.environ.get("CXX") or None


def child_environment(**changes: str) -> dict[str, str]:
    """The environment of a child process: this one's, with some variables set."""
    return {**os.environ, **changes}
