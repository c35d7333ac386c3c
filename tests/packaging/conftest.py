"""Fresh environments that share this one's third-party packages, and copies of the source tree: offline, in seconds."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SITE = Path(sysconfig.get_paths()["purelib"])
AT_THE_TOP = {"build", "dist", "out", "site"}
ANYWHERE = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so", ".*")


def left_out(folder: str, names: list[str]) -> set[str]:
    """What a fresh checkout does not have: results, caches, hidden folders."""
    return ANYWHERE(folder, names) | (AT_THE_TOP & set(names) if Path(folder) == ROOT else set())


def clean_environment(**env: str) -> dict[str, str]:
    """This process's variables without those that would steer the package or Python under test."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("MMKERNELS_", "PYTHON", "CXX"))} | env


def call(command: list[object], cwd: Path, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=clean_environment(**env),
        capture_output=True,
        text=True,
        check=False,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@dataclass(frozen=True)
class Environment:
    """A virtual environment; `run` and `pip` return the finished process."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def site(self) -> Path:
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        return self.folder / "lib" / version / "site-packages"

    def run(self, *arguments: object, cwd: Path | None = None, check: bool = True, **env: str):
        fixed = {"MMKERNELS_CACHE": str(self.folder / "cache"), "OMP_NUM_THREADS": "1"}
        return call([self.python, *arguments], cwd or self.folder, check, **{**fixed, **env})

    def pip_install(self, *what: object, **env: str):
        # No build isolation and no index: what the build may use is what this environment sees.
        pip = [sys.executable, "-m", "pip", "--python", self.python, "--disable-pip-version-check", "install"]
        fixed = ["--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed"]
        return call([*pip, *fixed, *what], self.folder, **env)


@pytest.fixture
def environment(tmp_path):
    """environment(packages) -> Environment that sees the named third-party packages, or all of them (None)."""

    def make(packages: list[str] | None = None, name: str = "venv") -> Environment:
        made = Environment(tmp_path / name)
        venv.create(made.folder, with_pip=False, symlinks=True)
        shared = SITE
        if packages is not None:
            shared = tmp_path / f"{name}-packages"
            shared.mkdir()
            for found in (entry for package in packages for entry in SITE.glob(f"{package}*")):
                (shared / found.name).symlink_to(found)
        # A plain path line: packages become importable, but .pth files there (an editable mmkernels) do not run.
        (made.site / "shared.pth").write_text(f"{shared}\n")
        return made

    return make


@pytest.fixture
def source_tree(tmp_path):
    """A copy of the repository as a fresh checkout has it, symlinks kept."""
    copy = tmp_path / "source"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=left_out)
    return copy


def backend_hook(hook: str, source: Path, target: Path, **env: str) -> Path:
    """Run a PEP 517 hook of setuptools in `source`; the file it made in `target`."""
    script = f"import setuptools.build_meta as backend, sys; print(backend.{hook}(sys.argv[1]))"
    done = call([sys.executable, "-c", script, target], source, **env)
    return target / done.stdout.splitlines()[-1]


@pytest.fixture(scope="session")
def sdist(tmp_path_factory):
    """The source distribution, built once."""
    base = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, base / "source", symlinks=True, ignore=left_out)
    return backend_hook("build_sdist", base / "source", base)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory, sdist):
    """The pure wheel, built from the unpacked sdist."""
    base = tmp_path_factory.mktemp("wheel")
    shutil.unpack_archive(sdist, base)
    (source,) = (p for p in base.iterdir() if p.is_dir())
    return backend_hook("build_wheel", source, base, MMKERNELS_BUILD="off")
