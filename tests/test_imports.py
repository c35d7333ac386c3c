"""The dependency rules of docs/architecture.md, read from the import statements themselves."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"transformers", "triton", "accelerate", "mamba_ssm", "causal_conv1d", "flash_attn", "matplotlib", "sklearn"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("mmkernels", *parts) if parts[0] == "models" else parts
    return ".".join(p for p in parts if p != "__init__")


def sources() -> list[Path]:
    package = [p for p in (ROOT / "mmkernels").rglob("*.py") if "models" not in p.relative_to(ROOT / "mmkernels").parts]
    return sorted(package + list((ROOT / "models").rglob("*.py")))


def imports(path: Path, *, top_only: bool) -> set[str]:
    """Absolute names imported by a file; with top_only, only those that run when the file is imported."""
    tree = ast.parse(path.read_text())
    package = module_name(path).split(".") if path.name == "__init__.py" else module_name(path).split(".")[:-1]
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if top_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            found.update(f"{stem}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found


def starts(name: str, *prefixes: str) -> bool:
    return any(name == p or name.startswith(p + ".") for p in prefixes)


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_layers_of_the_house(path):
    name = module_name(path)
    every, at_top = imports(path, top_only=False), imports(path, top_only=True)
    if starts(
        name,
        "mmkernels.ops",
        "mmkernels.layers",
        "mmkernels.pruning",
        "mmkernels._dispatch",
        "mmkernels._checks",
        "mmkernels.errors",
    ):
        # a file of Triton kernels is imported on first use, by a backend that has found triton to be there
        allowed = {"triton"} if path.name.startswith("_triton_kernels") else set()
        heavy = {i for i in at_top if i.split(".")[0] in HEAVY - allowed}
        assert not heavy, f"{name} imports {heavy} at the top; import inside the function that needs it"
    if starts(name, "mmkernels.ops"):
        upward = {
            i
            for i in every
            if starts(
                i, "mmkernels.layers", "mmkernels.pruning", "mmkernels.models", "mmkernels.distill", "mmkernels.data"
            )
        }
        assert not upward, f"{name} reaches up to {upward}"
    if starts(name, "mmkernels.pruning"):
        others = {
            i
            for i in every
            if starts(i, "mmkernels") and not starts(i, "mmkernels.ops", "mmkernels.pruning", "mmkernels.errors")
        }
        assert not others, f"{name} imports {others}: pruners know tensors, ops and errors"
    if starts(name, "mmkernels.layers"):
        upward = {i for i in every if starts(i, "mmkernels.models", "mmkernels.distill", "mmkernels.data")}
        assert not upward, f"{name} reaches up to {upward}"
    if starts(name, "mmkernels.layers", "mmkernels.pruning"):
        inside = {i for i in every if starts(i, "mmkernels.ops") and "._" in i}
        if name == "mmkernels.layers.mamba2_stack":  # docs/adr/0005
            inside.remove("mmkernels.ops.mamba2_step._native.Steps")
        assert not inside, f"{name} imports {inside}: ops are used through their public functions"
    programs = {
        "mmkernels.models.aki.train",
        "mmkernels.models.ml_mamba.train",
    }  # run, never imported: a leaf like the command line
    assert not every & programs, f"{name} imports a program: {every & programs}"
    if starts(name, "mmkernels.models") and name not in programs:
        upward = {i for i in every if starts(i, "mmkernels.distill", "mmkernels.demo", "mmkernels.data")}
        assert not upward, f"{name} reaches up to {upward}"


@pytest.mark.parametrize(
    "path", [p for p in sources() if p.name.startswith("_") and p.parent.parent.name == "ops"], ids=module_name
)
def test_backends_do_not_lean_on_each_other(path):
    if path.name == "__init__.py":
        return
    others = {
        i
        for i in imports(path, top_only=True)
        if starts(i, "mmkernels.ops") and i.split(".")[-1] in ("reference", "_torch", "_native", "_triton")
    }
    # The second derivative of a native kernel is the torch backend's: that one import is by design.
    allowed = {i for i in others if path.name.startswith("_native") and i.endswith("._torch")}
    same_backend = {i for i in others if path.name.startswith(i.split(".")[-1])}
    assert not others - allowed - same_backend, f"{module_name(path)} imports {others}"


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_one_reader_of_the_environment(path):
    if path.name == "_env.py":
        return
    tree = ast.parse(path.read_text())
    reads = [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr in ("environ", "getenv")]
    assert not reads, f"{module_name(path)} reads the environment at lines {reads}; add a function to mmkernels/_env.py"
