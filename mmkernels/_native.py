"""The native library: loaded from the package, or compiled once per machine into the user's cache; why not, remembered.

require()   load it, compiling if need be, or raise BackendUnavailable with the reason
probe()     the reason it would not work, found without compiling; None if it would
status()    everything `mmkernels info` shows about it
"""

import contextlib
import dataclasses
import errno
import json
import logging
import os
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mmkernels import _build, _env
from mmkernels._build import BuildError
from mmkernels._dispatch import BackendUnavailable

_PACKAGE = Path(__file__).resolve().parent
ISA_LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16")  # csrc/common/isa.h
_LOCK_TIMEOUT = 1800  # seconds to wait for another process that compiles
_FAILURE_LIFETIME = 3600  # seconds for which a failed compilation is not tried again
_UNUSED_LIFETIME = 30 * 86400  # seconds after which unused files leave the cache
_log = logging.getLogger("mmkernels")
_guard = threading.Lock()


@dataclasses.dataclass
class _State:
    library: Path | None = None  # what is loaded
    origin: str = ""
    report: dict[str, Any] = dataclasses.field(default_factory=dict)
    reason: str | None = None  # why nothing is
    output: str = ""  # what the compiler said
    remarks: list[str] = dataclasses.field(default_factory=list)


_state = _State()


def require() -> None:
    """Load the native library once.

    Raises:
        BackendUnavailable: it cannot be had here; the same reason at every later call, without another try.
    """
    with _guard:
        if _state.library is not None:
            return
        if _state.reason is None:
            try:
                if not _load_packaged():
                    _load_compiled()
            except BuildError as error:
                _state.reason, _state.output = str(error), error.output
        if _state.reason is not None:
            raise BackendUnavailable(_state.reason)


def probe() -> str | None:
    """Why native ops would not work here, without compiling; None when they work or would be compiled at first use."""
    if _state.library is not None or _state.reason is not None:
        return _state.reason
    if (_PACKAGE / _build.LIBRARY).is_file():
        return None
    try:
        root = _source_root()
        if not _cached_libraries(_build.source_key(root)):
            _check_allowed()
            plan = _build.make_plan(root)
            _check_failure(_cache_folder(), plan)
    except BuildError as error:
        return str(error)
    return None


def status() -> dict[str, Any]:
    """The state of the native library, for people: where it is, how it was made, what it runs with, what went wrong."""
    waiting = probe()
    facts: dict[str, Any] = {"state": "loaded" if _state.library else "unavailable" if waiting else "not used yet"}
    if _state.library is not None:
        facts |= {"library": str(_state.library), "origin": _state.origin, **_state.report}
        facts |= {"isa": torch.ops.mmkernels.isa(), "best_isa": torch.ops.mmkernels.best_isa()}
    facts["threads"] = torch.get_num_threads()
    facts["install"] = build_info()
    if waiting:
        facts["reason"] = waiting
    if _state.output:
        facts["compiler_output"] = _state.output
    if _state.remarks:
        facts["remarks"] = list(_state.remarks)
    return facts


def build_info() -> dict[str, Any]:
    """What setup.py recorded when this package was installed; empty in a checkout."""
    try:
        return json.loads((_PACKAGE / "_build_info.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


@contextlib.contextmanager
def use_isa(level: str) -> Iterator[None]:
    """Run native CPU kernels at another ISA level inside a `with` block, in the whole process (tests, benchmarks)."""
    require()
    before = torch.ops.mmkernels.isa()
    torch.ops.mmkernels.set_isa(level)
    try:
        yield
    finally:
        torch.ops.mmkernels.set_isa(before)


def poison(on: bool) -> bool:
    """Fill outputs of native ops with NaN before they are written, or stop that (tests); whether it was on before."""
    try:
        require()
    except BackendUnavailable:
        return False  # nothing native will run
    before: bool = torch.ops.mmkernels.poison(on)
    return before


def isa_levels() -> list[str]:
    """The levels this CPU can run, lowest first; torch.ops.mmkernels.best_isa() is the one chosen by itself."""
    require()
    return [level for level in ISA_LEVELS if torch.ops.mmkernels.runs_isa(level)]


def _load_packaged() -> bool:
    library = _PACKAGE / _build.LIBRARY
    if not library.is_file():
        return False
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        _state.remarks.append(f"the library in the package does not load ({error}); compiling one instead")
        return False
    _state.library, _state.origin, _state.report = library, "compiled when the package was installed", build_info()
    return True


def _load_compiled() -> None:
    root = _source_root()
    for library in _cached_libraries(_build.source_key(root)):
        if _load_cached(library):
            return
    _check_allowed()
    plan = _build.make_plan(root)
    folder = _cache_folder()
    library = _compile_once(plan, folder)
    if not _load_cached(library):
        raise BuildError(f"the library just compiled does not load: {_state.remarks[-1]}")


def _load_cached(library: Path) -> bool:
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        # Damaged, or made on another machine that shares this cache: out of the way, so that it is compiled anew.
        _state.remarks.append(f"{library} did not load and was removed ({error})")
        library.unlink(missing_ok=True)
        return False
    with contextlib.suppress(OSError):
        os.utime(library)  # in use: not to be swept out
    with contextlib.suppress(FileNotFoundError):
        _state.report = json.loads(library.with_suffix(".json").read_text(encoding="utf-8"))
    _state.library, _state.origin = library, "compiled at first use"
    return True


def _compile_once(plan: _build.Plan, folder: Path) -> Path:
    """Compile under a lock; a second process waits and finds the first one's library."""
    name = "-".join(plan.keys)
    library = folder / f"{name}.so"
    with _file_lock(folder / f"{name}.lock") as locked:
        if library.is_file():
            return library
        _check_failure(folder, plan)
        if locked:  # whoever left these died
            for stale in folder.glob(f"{name}.tmp.*"):
                shutil.rmtree(stale, ignore_errors=True)
        workspace = Path(tempfile.mkdtemp(prefix=f"{name}.tmp.", dir=folder))
        try:
            _log.warning("compiling the native kernels once, about a minute of one core, into %s", folder)
            report = _build.compile_library(plan, workspace, _kept_objects(plan, folder))
            (workspace / "report").write_text(json.dumps(report), encoding="utf-8")
            os.replace(workspace / "report", library.with_suffix(".json"))
            os.replace(workspace / _build.LIBRARY, library)
        except BuildError as error:
            failure = {"reason": str(error), "output": error.output}
            with contextlib.suppress(OSError):  # a full disk: the next process will try again
                library.with_suffix(".failed").write_text(json.dumps(failure), encoding="utf-8")
            raise
        except OSError as error:
            raise BuildError(f"the library could not be written to {folder} ({error.strerror})") from error
        finally:
            shutil.rmtree(workspace, ignore_errors=True)
    _sweep(folder)
    return library


def _kept_objects(plan: _build.Plan, folder: Path) -> Path | None:
    """Where a checkout keeps object files between builds, because its sources change; an installed package's do not."""
    if plan.root == _PACKAGE / "_csrc":
        return None
    objects = folder / "objects"
    objects.mkdir(exist_ok=True)
    return objects


def _sweep(folder: Path) -> None:
    """Remove what nobody has used for a month: libraries of other versions, leftovers of killed builds."""
    for path in (*folder.iterdir(), *(folder / "objects").glob("*.o")):
        with contextlib.suppress(OSError):  # another process sweeps too
            if path.name != "objects" and time.time() - path.stat().st_mtime > _UNUSED_LIFETIME:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _check_failure(folder: Path, plan: _build.Plan) -> None:
    """Raise the error of the last try if that was recent: every process would repeat it otherwise."""
    record = folder / f"{'-'.join(plan.keys)}.failed"
    try:
        if time.time() - record.stat().st_mtime > _FAILURE_LIFETIME:
            return
        failure = json.loads(record.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return
    raise BuildError(f"{failure['reason']} (remembered for an hour; delete {record} to try again)", failure["output"])


def _check_allowed() -> None:
    if not _env.build_allowed():
        lacking = build_info().get("reason") or "a checkout carries none"
        raise BuildError(f"compiling is switched off (MMKERNELS_BUILD=off) and the package has no library ({lacking})")


def _source_root() -> Path:
    root = _build.source_root()
    if root is None:
        raise BuildError(f"the sources of the native code (_csrc) are missing from {_PACKAGE}; reinstall mmkernels")
    return root


def _cached_libraries(source_key: str) -> list[Path]:
    """Compiled from exactly these sources, by whatever compiler; newest first."""
    try:
        folder = _cache_folder()
    except BuildError:
        return []
    return sorted(folder.glob(f"{source_key}-*.so"), key=lambda path: path.stat().st_mtime, reverse=True)


def _cache_folder() -> Path:
    """The user's cache, or a private folder under the system's temporary one when the home is read-only or missing."""
    tried = []
    try:
        usual = _env.cache_dir() / "native"
        usual.mkdir(parents=True, exist_ok=True)
        if os.access(usual, os.W_OK | os.X_OK):
            return usual
        tried.append(f"{usual} is read-only")
    except (OSError, RuntimeError) as error:  # RuntimeError: no home folder is known
        tried.append(str(error))
    private = Path(tempfile.gettempdir()) / f"mmkernels-{os.getuid()}"
    try:
        private.mkdir(mode=0o700, exist_ok=True)
        facts = private.lstat()
    except OSError as error:
        raise BuildError(f"no folder to compile into: {'; '.join(tried)}; {error}. Set MMKERNELS_CACHE") from error
    # Others may write to the temporary folder: never load code from a folder that is not ours alone.
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o077:
        raise BuildError(
            f"no folder to compile into: {'; '.join(tried)}; {private} is not private. Set MMKERNELS_CACHE"
        )
    return private


@contextlib.contextmanager
def _file_lock(path: Path) -> Iterator[bool]:
    """Hold an exclusive lock on a file; False where the file system has none.  A lock dies with its process."""
    import fcntl

    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        yield _acquire(fcntl.flock, handle, fcntl.LOCK_EX | fcntl.LOCK_NB, path)
    finally:
        os.close(handle)


def _acquire(flock: Any, handle: int, how: int, path: Path) -> bool:
    deadline = time.monotonic() + _LOCK_TIMEOUT
    while True:
        try:
            flock(handle, how)
            return True
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                return False  # two builds at once cost time only: each renames its own whole file
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise BuildError(f"{path} cannot be locked ({error.strerror})") from error
        if time.monotonic() > deadline:
            raise BuildError(f"another process has been compiling for {_LOCK_TIMEOUT} s (it holds {path})")
        time.sleep(0.1)
