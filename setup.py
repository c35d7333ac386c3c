"""What pyproject.toml cannot say: models/ is installed as mmkernels.models, and native code is compiled if possible.

Installing never fails for want of torch, a compiler or a GPU: what is missing is written to mmkernels/_build_info.json,
and the sources travel in mmkernels/_csrc so that the first use of a native op can compile them.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # a PEP 517 build does not put it there
from mmkernels import _build, _env  # noqa: E402  (no third-party import behind it)

sys.path.remove(str(ROOT))


def build_native(package: Path) -> dict[str, object]:
    """Compile into the package about to be packed; what happened, or why nothing did."""
    if not _env.build_allowed():
        return {"native": False, "reason": "compiling was switched off (MMKERNELS_BUILD=off) during installation"}
    try:
        plan = _build.make_plan(ROOT)
        with tempfile.TemporaryDirectory() as workspace:
            report = _build.compile_library(plan, Path(workspace))
            shutil.move(Path(workspace) / _build.LIBRARY, package / _build.LIBRARY)
    except (_build.BuildError, OSError) as error:
        return {"native": False, "reason": str(error), "output": getattr(error, "output", "")}
    return {"native": True, **report}


class BuildPackage(build_py):
    """Python files, then csrc/, then the library."""

    def run(self) -> None:
        """Build into build_lib; an editable install compiles at first use instead, and again when csrc/ changes."""
        if self.editable_mode:
            return super().run()
        package = Path(self.build_lib) / "mmkernels"
        shutil.rmtree(package, ignore_errors=True)  # or files of an earlier build would be packed again
        super().run()
        sources = package / "_csrc"
        shutil.copytree(ROOT / "csrc", sources / "csrc")
        shutil.copy2(ROOT / "CMakeLists.txt", sources)
        info = build_native(package)
        (package / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
        print("mmkernels: native kernels " + ("compiled" if info["native"] else f"not compiled now: {info['reason']}"))
        return None


class Wheel(bdist_wheel):
    """py3-none-any without the library, py3-none-<platform> with it: one library serves every Python."""

    def run(self) -> None:
        """Pack what BuildPackage made."""
        self.run_command("build_py")
        package = Path(self.get_finalized_command("build_py").build_lib) / "mmkernels"
        self.root_is_pure = not (package / _build.LIBRARY).exists()
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        """(python, abi, platform) of the wheel's name."""
        tag = super().get_tag()
        return tag if self.root_is_pure else ("py3", "none", tag[2])


# The symlink mmkernels/models -> ../models serves checkouts only; followed here, it would pack every model twice.
packages = find_packages(include=["mmkernels", "mmkernels.*"], exclude=["mmkernels.models", "mmkernels.models.*"])
models = ["mmkernels.models", *(f"mmkernels.models.{name}" for name in find_packages("models"))]

setup(
    packages=[*packages, *models],
    package_dir={"mmkernels.models": "models"},
    package_data={"": ["py.typed", "*.md", "*.yaml", "recipes/*.yaml"]},
    cmdclass={"build_py": BuildPackage, "bdist_wheel": Wheel},
)
