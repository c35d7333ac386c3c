"""Compiles csrc/ into one shared library, with the compiler alone: no CMake, no ninja, and torch is not imported.

setup.py calls it when pip installs, mmkernels/_native.py at the first use of a native op.  What is compiled, and how,
is read from the build list in CMakeLists.txt.
"""

import dataclasses
import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mmkernels import _env

LIBRARY = "libmmkernels_native.so"
COMPILERS = ("c++", "g++", "clang++")
OLDEST_TORCH = (2, 10)  # the first whose stable ABI has what csrc/ uses
UNIT_TIMEOUT = 900  # seconds; a unit takes a few, a hundred times that means a hung compiler
_MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}


class BuildError(Exception):
    """Why there is no library, in words; `output` is the end of what the compiler said, if it was asked."""

    def __init__(self, reason: str, output: str = ""):
        super().__init__(reason)
        self.output = output


@dataclasses.dataclass(frozen=True)
class Step:
    """One call of the compiler that makes one object file."""

    source: str
    level: str | None
    flags: tuple[str, ...]

    @property
    def object_name(self) -> str:
        """File name of the object: the source's path and the ISA level."""
        return re.sub(r"\W", "_", self.source) + (f".{self.level}" if self.level else "") + ".o"


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that decides the bytes of the library."""

    root: Path
    torch: Path
    torch_version: str
    compiler: tuple[str, ...]
    compiler_version: str
    steps: tuple[Step, ...]
    link: tuple[str, ...]
    levels: tuple[str, ...]

    @property
    def keys(self) -> tuple[str, str]:
        """Hash of sources, flags, processor and torch's major.minor; hash of the compiler."""
        return source_key(self.root), _digest(" ".join(self.compiler).encode(), self.compiler_version.encode())


def source_root() -> Path | None:
    """The folder that holds CMakeLists.txt and csrc/: inside an installed package, else the checkout around it."""
    package = Path(__file__).resolve().parent
    for root in (package / "_csrc", package.parent):
        if (root / "CMakeLists.txt").is_file() and (root / "csrc").is_dir():
            return root
    return None


def build_list(root: Path) -> dict[str, list[str]]:
    """The `set(NAME words...)` lines of the build list in CMakeLists.txt."""
    text = (root / "CMakeLists.txt").read_text(encoding="utf-8")
    block = re.search(r"^# -+ build list: begin -+$(.*)^# -+ build list: end -+$", text, re.MULTILINE | re.DOTALL)
    if block is None:
        raise BuildError("CMakeLists.txt has no build list")
    lines = re.sub(r"#.*", "", block.group(1))
    found = {m.group(1): m.group(2).split() for m in re.finditer(r"\bset\(\s*(\w+)([^()]*)\)", lines)}
    rest = re.sub(r"\bset\([^()]*\)", "", lines).strip()
    if rest:
        raise BuildError(
            f"the build list in CMakeLists.txt may hold only set(NAME word ...); got {rest.splitlines()[0]!r}"
        )
    return found


def find_compiler() -> tuple[str, ...]:
    """The C++ compiler: CXX, or the first of c++, g++, clang++ on PATH."""
    override = _env.compiler_override()
    if override is not None:
        command = shlex.split(override)
        if not command or shutil.which(command[0], path=_env.compiler_path()) is None:
            raise BuildError(f"the C++ compiler named by CXX was not found: {override!r}")
        return tuple(command)
    for name in COMPILERS:
        path = shutil.which(name, path=_env.compiler_path())
        if path is not None:
            return (path,)
    raise BuildError(f"no C++ compiler on PATH (looked for {', '.join(COMPILERS)}; set CXX)")


def find_torch() -> tuple[Path, str]:
    """Folder and version of the installed torch, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise BuildError(
            "torch is not installed where the build runs (pip install --no-build-isolation lets it see yours)"
        )
    folder = Path(spec.submodule_search_locations[0])
    try:
        text = (folder / "version.py").read_text(encoding="utf-8")
    except OSError as error:
        raise BuildError(f"torch in {folder} has no version.py ({error.strerror})") from error
    match = re.search(r"__version__\s*(?::\s*\w+\s*)?=\s*['\"]([^'\"]+)", text)
    version = match.group(1) if match else "unknown"
    if match and _major_minor(version) < OLDEST_TORCH:
        raise BuildError(
            f"torch {version} is older than {'.'.join(map(str, OLDEST_TORCH))}, the first with the ABI we use"
        )
    return folder, version


def kernel_sources(words: dict[str, list[str]], level: str) -> list[str]:
    """The files of the build list that are compiled for a level: its own, where it has a list, or all."""
    return words.get(f"MMK_KERNEL_SOURCES_{level}", words["MMK_KERNEL_SOURCES"])


def make_plan(root: Path) -> Plan:
    """What to compile and with what, or a BuildError that says what is missing.  Runs `compiler --version` only."""
    words = build_list(root)
    levels, link = _platform_words(words)
    folder, version = find_torch()
    if not (folder / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
        raise BuildError(f"torch {version} in {folder} comes without its C++ headers")
    compiler = find_compiler()
    try:
        asked = subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{compiler[0]} --version does not run ({error})") from error
    common = [
        *words["MMK_FLAGS"],
        *(f"-D{d}" for d in words["MMK_DEFINITIONS"]),
        f"-I{root / 'csrc'}",
        "-isystem",
        str(folder / "include"),
    ]
    # Widest level first: it takes the compiler longest.
    steps = [
        Step(source, level, (*common, f"-DMMK_ISA_NS={level}", *words[f"MMK_FLAGS_{level}"]))
        for level in reversed(levels)
        for source in kernel_sources(words, level)
    ]
    steps += [Step(source, None, tuple(common)) for source in words["MMK_SOURCES"]]
    libraries = (f"-L{folder / 'lib'}", *(f"-l{name}" for name in words["MMK_TORCH_LIBRARIES"]))
    return Plan(
        root=root,
        torch=folder,
        torch_version=version,
        compiler=compiler,
        compiler_version=asked.stdout.strip(),
        steps=tuple(steps),
        link=(*link, *libraries),
        levels=tuple(levels),
    )


def source_key(root: Path) -> str:
    """Hash of all that decides the library but the compiler: csrc/, the build list, the processor, torch's version."""
    parts = [json.dumps(build_list(root), sort_keys=True), platform.system(), machine()]
    parts.append(".".join(map(str, _major_minor(find_torch()[1]))))
    contents = [part.encode() for part in parts]
    for path in sorted(p for p in (root / "csrc").rglob("*") if p.suffix in (".h", ".cpp")):
        contents += [path.relative_to(root).as_posix().encode(), path.read_bytes()]
    return _digest(*contents)


def machine() -> str:
    """The processor family as the build list spells it, e.g. "x86_64"."""
    name = platform.machine().lower()
    return _MACHINES.get(name, name)


def compile_library(plan: Plan, workspace: Path, kept_objects: Path | None = None) -> dict[str, Any]:
    """Compile and link into `workspace`/LIBRARY, with as many compilers at once as this process may use processors.

    Args:
        plan: from make_plan.
        workspace: an empty folder.
        kept_objects: a folder, on the same file system, of object files by the hash of what made them.  Objects found
            there are not compiled again and new ones are added, so that an edit costs one unit; None: keep nothing.

    Returns:
        The report that `mmkernels info` shows.

    Raises:
        BuildError: the compiler refused; `output` of the error ends with its message.
    """
    started = time.perf_counter()
    jobs = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    pool = ThreadPoolExecutor(max_workers=max(1, min(jobs, len(plan.steps))))

    def compile_step(step: Step) -> Path:
        if kept_objects is None:
            return _compile(plan, step, workspace)
        kept = kept_objects / f"{object_key(plan, step)}.o"
        if kept.exists():
            os.utime(kept)  # in use: not to be swept out
        else:
            os.replace(_compile(plan, step, workspace), kept)
        return kept

    try:
        objects = [done.result() for done in [pool.submit(compile_step, step) for step in plan.steps]]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    _run([*plan.compiler, *map(str, objects), "-o", str(workspace / LIBRARY), *plan.link], "linking")
    return {
        "compiler": " ".join(plan.compiler),
        "compiler_version": plan.compiler_version.partition("\n")[0],
        "torch": plan.torch_version,
        "levels": list(plan.levels),
        "seconds": round(time.perf_counter() - started, 1),
    }


def object_key(plan: Plan, step: Step) -> str:
    """Hash of all that makes an object file: compiler, flags, and the files it reads."""
    facts = " ".join([*plan.compiler, plan.compiler_version, *step.flags]).replace(str(plan.root), ".")
    read = [path.read_bytes() for path in included_files(plan.root, step.source)]
    return _digest(facts.encode(), *read)


def included_files(root: Path, source: str) -> list[Path]:
    """The source and every file of csrc/ it includes in quotes, directly or not: all that can change its object."""
    found: dict[Path, None] = {}
    waiting = [root / source]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found[path] = None
        names = re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(encoding="utf-8"), re.MULTILINE)
        for name in names:
            waiting += [near for near in (path.parent / name, root / "csrc" / name) if near.is_file()]
    return sorted(found)


def _compile(plan: Plan, step: Step, workspace: Path) -> Path:
    target = workspace / step.object_name
    what = f"compiling {step.source}" + (f" for {step.level}" if step.level else "")
    _run([*plan.compiler, *step.flags, "-c", str(plan.root / step.source), "-o", str(target)], what)
    return target


def _run(command: list[str], what: str) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=UNIT_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{what} took longer than {UNIT_TIMEOUT} s") from error
    except OSError as error:
        raise BuildError(f"{what}: {command[0]} does not run ({error.strerror})") from error
    if done.returncode != 0:
        said = (done.stderr + done.stdout).strip()
        errors = [line for line in said.splitlines() if "error" in line.lower()] or said.splitlines()[-1:]
        first = errors[0].strip() if errors else f"exit status {done.returncode}"
        raise BuildError(f"{what} failed: {first}", output=f"{shlex.join(command)}\n{said}"[-4000:])


def _platform_words(words: dict[str, list[str]]) -> tuple[list[str], list[str]]:
    levels, link = words.get(f"MMK_LEVELS_{machine()}"), words.get(f"MMK_LINK_FLAGS_{platform.system()}")
    if levels is None or link is None:
        raise BuildError(f"native code is not written for {platform.system()} on {machine()}")
    return levels, link


def _major_minor(version: str) -> tuple[int, int]:
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match.group(1)), int(match.group(2))) if match else (0, 0)


def _digest(*contents: bytes) -> str:
    # Lengths keep ("ab", "c") and ("a", "bc") apart.
    whole = hashlib.sha256()
    for content in contents:
        whole.update(len(content).to_bytes(8, "little") + content)
    return whole.hexdigest()[:16]
