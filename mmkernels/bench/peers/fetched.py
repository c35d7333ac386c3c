"""Pure-Python peers that cannot be installed beside the rest: fetched by pip into the user's cache, imported there.

mamba-ssm wants a CUDA compiler to be installed at all, and torchmamba a newer Python and torch than it needs for the
functions raced here.  Neither is changed; only the files are taken, and nothing of them is part of this repository.
"""

import functools
import importlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import types
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

from mmkernels import _env
from mmkernels.bench.problems import Unavailable

VERSIONS = {"mamba-ssm": "2.3.2.post1", "torchmamba": "0.1.2"}
_PACKAGE = {"mamba-ssm": "mamba_ssm", "torchmamba": "torchmamba"}
_PIP = {
    "mamba-ssm": ("--no-build-isolation", "--no-binary", "mamba-ssm"),
    "torchmamba": ("--ignore-requires-python",),
}


def folder(project: str) -> Path:
    """Where the Python files of a project lie, fetching them if they are not there.

    Raises:
        Unavailable: pip cannot get them, with its last line.
    """
    home = _env.cache_dir() / "peers" / f"{project}-{VERSIONS[project]}"
    if not home.is_dir():
        home.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home.parent) as scratch:
            unpacked = _fetch(project, Path(scratch))
            try:
                unpacked.rename(home)
            except OSError:  # another process was faster
                if not home.is_dir():
                    raise
    return home


def _fetch(project: str, scratch: Path) -> Path:
    wanted = f"{project}=={VERSIONS[project]}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", *_PIP[project]]
    said = subprocess.run(
        [*command, "-d", str(scratch), wanted],
        capture_output=True,
        text=True,
        env=_env.child_environment(MAMBA_SKIP_CUDA_BUILD="TRUE"),
    )
    archives = [p for p in scratch.iterdir() if p.name.endswith((".tar.gz", ".whl"))]
    if said.returncode or not archives:
        why = (said.stderr.strip() or said.stdout.strip() or "no archive came").splitlines()[-1]
        raise Unavailable(f"not installed: pip download {wanted} failed ({why})")
    target = scratch / "unpacked"
    unpack(archives[0], _PACKAGE[project], target)
    return target


def unpack(archive: Path, package: str, target: Path) -> None:
    """Copy the .py files of one package out of a source distribution or wheel."""
    for name, data in _members(archive):
        parts = PurePosixPath(name).parts
        if name.endswith(".py") and package in parts and ".." not in parts:
            file = target.joinpath(*parts[parts.index(package) :])
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
    if not (target / package).is_dir():
        shutil.rmtree(target, ignore_errors=True)
        raise Unavailable(f"not installed: {archive.name} holds no package {package}")


def _members(archive: Path) -> Any:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            yield from ((name, wheel.read(name)) for name in wheel.namelist())
        return
    with tarfile.open(archive) as bundle:
        for member in bundle.getmembers():
            stream = bundle.extractfile(member) if member.isfile() else None
            if stream is not None:
                yield member.name, stream.read()


@functools.cache
def module(project: str, name: str, *, stand_ins: tuple[str, ...] = ()) -> Any:
    """Import a module of a fetched project, and forget it in sys.modules again.

    Its package is imported without any __init__, which would want CUDA extensions.  Nobody else may find it afterwards:
    transformers would take it for the real thing and call its CUDA kernels.

    Args:
        project: key of VERSIONS.
        name: full name of the module.
        stand_ins: names of compiled extensions that are imported but not used by the functions raced here.

    Raises:
        Unavailable: it cannot be fetched or imported.
    """
    package = _PACKAGE[project]
    source = folder(project) / package
    before = {n: m for n, m in sys.modules.items() if n.split(".")[0] == package or n in stand_ins}
    for known in before:
        del sys.modules[known]
    try:
        for path in [source, *(p for p in source.rglob("*") if p.is_dir())]:
            full = ".".join(path.relative_to(source.parent).parts)
            sys.modules[full] = types.ModuleType(full)
            sys.modules[full].__path__ = [str(path)]
        sys.modules.update({extension: types.ModuleType(extension) for extension in stand_ins})
        return importlib.import_module(name)
    except ImportError as error:
        raise Unavailable(f"not importable: {error}") from error
    finally:
        for made in [n for n in sys.modules if n.split(".")[0] == package or n in stand_ins]:
            del sys.modules[made]
        sys.modules.update(before)
