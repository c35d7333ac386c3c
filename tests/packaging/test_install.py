"""Wheel, sdist and editable installs: complete, without duplicates, and possible without a compiler or torch."""

import json
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# The package, the models under their public name (found, not imported: transformers takes seconds), the backends.
FIRST_LINES = """
import importlib.util, mmkernels, mmkernels.models
print(mmkernels.__file__)
print(importlib.util.find_spec("mmkernels.models.mmmamba").origin)
print(mmkernels.backends())
"""


def tracked(folder: str, *suffixes: str) -> set[str]:
    """Source files below a top-level folder, relative to it, symlinks not followed."""
    base = ROOT / folder
    found = (p for p in base.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    inside = (p.relative_to(base).as_posix() for p in found if p.suffix in suffixes)
    return {p for p in inside if not (folder == "mmkernels" and p.startswith("models/"))}


def test_wheel_has_everything_once(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert [n for n, count in Counter(names).items() if count > 1] == []
    assert {n.split("/")[0] for n in names if "dist-info" not in n} == {"mmkernels"}
    inside = {n.removeprefix("mmkernels/") for n in names}
    assert tracked("mmkernels", ".py", ".md", ".typed") <= inside
    assert {f"models/{p}" for p in tracked("models", ".py", ".md", ".yaml")} <= inside
    assert {f"_csrc/csrc/{p}" for p in tracked("csrc", ".cpp", ".h")} <= inside
    assert "_csrc/CMakeLists.txt" in inside
    assert wheel.name.endswith("-py3-none-any.whl")


def test_sdist_has_everything_once(sdist):
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    names = [m.name.split("/", 1)[1] for m in members if m.isfile()]
    assert [m.name for m in members if m.issym() or m.islnk()] == []
    assert [n for n, count in Counter(names).items() if count > 1] == []
    assert [n for n in names if n.startswith("mmkernels/models/")] == []
    for folder in ("mmkernels", "models", "csrc", "tests"):
        missing = {f"{folder}/{p}" for p in tracked(folder, ".py", ".cpp", ".h", ".yaml", ".md")} - set(names)
        assert not missing
    assert {"setup.py", "CMakeLists.txt", "pyproject.toml", "LICENSE", "CHANGELOG.md"} <= set(names)


def test_wheel_from_the_sdist_works(environment, wheel):
    made = environment()
    made.pip_install(wheel)
    where, model, table = made.run("-c", FIRST_LINES, MMKERNELS_BUILD="off").stdout.split("\n", 2)
    assert Path(where).is_relative_to(made.folder)
    assert Path(model).is_relative_to(made.folder)
    assert "MMKERNELS_BUILD=off" in table  # why the native backend is not there
    bare = made.run("-c", "import models", check=False)
    assert "ModuleNotFoundError" in bare.stderr


def test_editable_install_uses_the_checkout(environment, source_tree):
    made = environment()
    made.pip_install("--editable", source_tree)
    where, model, _ = made.run("-c", FIRST_LINES, MMKERNELS_BUILD="off").stdout.split("\n", 2)
    assert Path(where).is_relative_to(source_tree)
    assert Path(model).resolve().is_relative_to(source_tree)
    assert not list((source_tree / "mmkernels").glob("*.so"))  # compiled at first use, anew when csrc/ changes
    assert not (source_tree / "mmkernels" / "_csrc").exists()
    outside = made.run("-c", "import models", check=False)
    assert "ModuleNotFoundError" in outside.stderr
    inside = made.run("-c", "import models", cwd=source_tree, check=False)
    assert "this package is mmkernels.models" in inside.stderr


@pytest.mark.slow  # copies the tree and installs twice
def test_no_compiler_and_no_torch_are_no_obstacle(environment, source_tree, tmp_path):
    bare = environment(packages=["setuptools", "_distutils_hack", "pkg_resources"], name="bare")
    bare.pip_install(source_tree)
    info = json.loads((bare.site / "mmkernels" / "_build_info.json").read_text())
    assert info["native"] is False
    assert "torch is not installed" in info["reason"]

    empty = tmp_path / "empty"
    empty.mkdir()
    made = environment()
    made.pip_install(source_tree, PATH=str(empty))
    info = json.loads((made.site / "mmkernels" / "_build_info.json").read_text())
    assert info["reason"].startswith("no C++ compiler on PATH (looked for c++, g++, clang++")
    shown = made.run("-c", "import mmkernels; print(mmkernels.backends())", PATH=str(empty)).stdout
    assert "no C++ compiler on PATH" in shown


@pytest.mark.slow  # a whole build
def test_wheel_with_the_library(environment, source_tree, quick_compiler):
    made = environment()
    made.pip_install(source_tree, CXX=str(quick_compiler))
    package = made.site / "mmkernels"
    info = json.loads((package / "_build_info.json").read_text())
    assert info["native"], info
    (facts,) = made.site.glob("mmkernels-*.dist-info/WHEEL")
    assert "Root-Is-Purelib: false" in facts.read_text()
    assert "Tag: py3-none-" in facts.read_text()
    assert "none-any" not in facts.read_text()
    script = (
        "import torch, mmkernels; from mmkernels import _native; "
        "mmkernels.gated_rms_norm(torch.ones(2, 8), torch.ones(8), backend='native'); "
        "print(_native.status()['origin'])"
    )
    # PATH without a compiler: what runs is what was packed.
    done = made.run("-c", script, PATH=str(Path(sys.executable).parent), MMKERNELS_BUILD="off")
    assert done.stdout.strip() == "compiled when the package was installed"


def test_setup_stays_short():
    assert len((ROOT / "setup.py").read_text().splitlines()) < 120
