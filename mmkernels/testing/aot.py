"""Triton kernels compiled ahead of time for every architecture, without a GPU: budgets and 64-bit offsets.

    python -m mmkernels.testing.aot --table benchmarks/results/triton_budgets.md
    python -m mmkernels.testing.aot --json out.json --only gated_rms_norm --arch sm_90 gfx942

Compiles every Specimen that the modules of MODULES list, reads shared memory, registers and spills from the binary, and
looks for offsets that are multiplied in 32 bits.  Run it in a process of its own: Triton's interpreter must be off.
"""

import argparse
import dataclasses
import functools
import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mmkernels import _triton
from mmkernels._triton import Specimen

# Every file of kernels; each has specimens(architecture).  tests/triton/test_aot.py fails when one is missing here.
MODULES = (
    "mmkernels._triton_math",
    "mmkernels.ops.causal_conv1d._triton_kernels",
    "mmkernels.ops.causal_conv1d._triton_kernels_state",
    "mmkernels.ops.gated_rms_norm._triton_kernels",
    "mmkernels.ops.mma_attention._triton_kernels",
    "mmkernels.ops.mma_attention._triton_kernels_backward",
    "mmkernels.ops.mma_attention._triton_kernels_plan",
    "mmkernels.ops.scan2d._triton_kernels",
    "mmkernels.ops.ssd._triton_kernels_backward",
    "mmkernels.ops.ssd._triton_kernels_forward",
    "mmkernels.ops.ssd._triton_kernels_steps",
    "mmkernels.ops.ssd._triton_kernels_update",
    "mmkernels.ops.token_pruning._triton_kernels",
    "mmkernels.ops.token_pruning._triton_kernels_matching",
    "mmkernels.ops.token_pruning._triton_kernels_merging",
    "mmkernels.ops.token_pruning._triton_kernels_received",
    "mmkernels.ops.token_pruning._triton_kernels_select",
)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A target, and what one program may use of it.

    Args:
        name: "sm_90" or "gfx942".
        shared: bytes of shared memory (LDS) a program may ask for.
        registers: 32-bit registers a thread (a lane) may have without spilling.
    """

    name: str
    shared: int
    registers: int

    @property
    def target(self) -> Any:
        """Triton's GPUTarget."""
        from triton.backends.compiler import GPUTarget

        if self.name.startswith("gfx"):
            return GPUTarget("hip", self.name, 64)
        return GPUTarget("cuda", int(self.name.removeprefix("sm_")), 32)


# CUDA programming guide, technical specifications by compute capability; CDNA 3 instruction set architecture (64 KiB
# of LDS; 512 registers a lane, half of them accumulation registers).
ARCHITECTURES = {
    a.name: a
    for a in (
        Architecture("sm_80", 163 * 1024, 255),
        Architecture("sm_90", 227 * 1024, 255),
        Architecture("sm_100", 227 * 1024, 255),
        Architecture("sm_120", 99 * 1024, 255),
        Architecture("gfx942", 64 * 1024, 512),
    )
}


@dataclasses.dataclass(frozen=True)
class Budget:
    """What one specimen uses on one architecture; `faults` says in words what is over budget."""

    op: str
    kernel: str
    label: str
    architecture: str
    config: str
    warps: int
    shared: int
    registers: int
    spilled: int
    narrow_offsets: list[str]

    @property
    def faults(self) -> list[str]:
        """Objections in words; none when the kernel may ship."""
        limit = ARCHITECTURES[self.architecture]
        where = f"{self.op}.{self.kernel} ({self.label}) on {self.architecture}"
        found = [f"{where}: offset multiplied in 32 bits: {line}" for line in self.narrow_offsets]
        if self.shared > limit.shared:
            found.append(f"{where}: {self.shared} bytes of shared memory; there are {limit.shared}")
        if self.registers > limit.registers:
            found.append(f"{where}: {self.registers} registers; there are {limit.registers}")
        if self.spilled:
            found.append(f"{where}: {self.spilled} bytes of registers spilled to memory")
        return found


def measure(specimen: Specimen, architecture: Architecture, op: str) -> Budget:
    """Compile one specimen and read its budget."""
    import triton
    from triton.compiler import ASTSource

    config = specimen.config
    constants = {**config.blocks, **specimen.constants}
    names = specimen.kernel.arg_names
    unknown = [name for name in constants if name not in names]
    constants = {name: value for name, value in constants.items() if name not in unknown}
    signature = {n: "constexpr" if n in constants else specimen.types.get(n, "i32") for n in names}
    # As at a launch: fresh tensors are aligned to 16 bytes, and that is what lets loads be vectorised.
    aligned = {n for n in names if signature[n].startswith("*") or (n in specimen.aligned and n not in constants)}
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in sorted(aligned)}
    source = ASTSource(specimen.kernel, signature, {(names.index(n),): v for n, v in constants.items()}, attributes)
    compiled = triton.compile(source, target=architecture.target, options=_triton.options(config))
    registers, spilled = _resources(compiled.asm)
    return Budget(
        op=op,
        kernel=specimen.kernel.__name__,
        label=specimen.label,
        architecture=architecture.name,
        config=", ".join(f"{k} {v}" for k, v in config.blocks.items()),
        warps=config.warps,
        shared=compiled.metadata.shared,
        registers=registers,
        spilled=spilled,
        narrow_offsets=narrow_offsets(compiled.asm["ttir"]),
    )


def _resources(asm: dict[str, Any]) -> tuple[int, int]:
    """(registers a thread, bytes spilled a thread) of a cubin or of AMD assembly."""
    if "amdgcn" in asm:
        text = asm["amdgcn"]

        def field(name: str) -> int:
            return int(re.search(rf"\.{name}:\s+(\d+)", text).group(1))  # type: ignore[union-attr]

        # Scratch is what vector registers spill to; scalar ones spill to lanes of vector registers, counted as such.
        return field("vgpr_count"), field("private_segment_fixed_size")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [_cuobjdump(), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump's answer has changed: {text!r}")
    # Triton kernels have no arrays of their own: a stack is where ptxas spills to.
    return int(found[1]), int(found[2]) + int(found[3])


@functools.cache
def _cuobjdump() -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


_DEFINITION = re.compile(r"^(%[\w:]+) = \"?([\w.]+)\"?(.*)$")
_VALUE = re.compile(r"%[\w]+(?:#\d+)?")


def narrow_offsets(ttir: str) -> list[str]:
    """Multiplications in 32 bits of two run-time values whose product ends up in an address.

    A row times its stride passes 2^31 on tensors that fit a GPU easily.  A program id times a block size is a position
    along one axis and may stay narrow, so products with a constant do not count.

    Args:
        ttir: Triton's first intermediate representation, as text.

    Returns:
        The offending lines.
    """
    made, roots = _definitions(ttir)
    faults, seen = [], set()
    while roots:
        value = roots.pop()
        name = value.split("#")[0]
        if name in seen or name not in made:
            continue
        seen.add(name)
        operation, operands, line = made[name]
        if operation in ("tt.load", "tt.addptr"):
            continue  # a loaded offset is as wide as its memory; offsets of pointers are roots of their own
        narrow = operation == "arith.muli" and re.search(r": (?:tensor<[\dx]*x)?i32>?$", line)
        if narrow and not any(_is_constant(made, operand) for operand in operands):
            faults.append(line)
        roots += operands
    return faults


def _definitions(ttir: str) -> tuple[dict[str, tuple[str, list[str], str]], list[str]]:
    """Value -> (operation, operands, line), and the offsets of every address.  What a loop carries has as operands
    what enters the loop and what its body yields.
    """
    made: dict[str, tuple[str, list[str], str]] = {}
    roots: list[str] = []
    regions: list[list[str]] = []  # of the open regions, the names they carry
    for raw in ttir.splitlines():
        line = raw.split(" loc(")[0].strip()
        found = _DEFINITION.match(line)
        if found is not None:
            results, operation, rest = found.groups()
            operands = _VALUE.findall(rest)
            made[results.split(":")[0].strip()] = (operation, operands, line)
            if operation == "tt.addptr":
                roots.append(operands[1])
        if line.startswith("}"):
            regions.pop()
        if raw.rstrip().endswith("{"):
            carried = re.search(r"iter_args\(([^)]*)\)", line)
            pairs = [pair.split(" = ") for pair in carried[1].split(", ")] if carried else []
            made |= {name: ("carried", [start], line) for name, start in pairs}
            regions.append([name for name, _ in pairs])
        if line.startswith("scf.yield") and regions:
            for name, value in zip(regions[-1], _VALUE.findall(line), strict=False):
                made[name][1].append(value)
    return made, roots


def _is_constant(made: dict[str, tuple[str, list[str], str]], value: str) -> bool:
    operation, operands, _ = made.get(value.split("#")[0], ("", [], ""))
    return operation == "arith.constant" or (operation == "tt.splat" and _is_constant(made, operands[0]))


def survey(architectures: list[str], only: str = "", every: int = 1, first: int = 0) -> list[Budget]:
    """Budgets of all specimens, or of one of `every` from `first` on, with `only` in their module or kernel name."""
    if _triton.interpreting():
        raise RuntimeError("mmkernels.testing.aot: kernels must be compiled; unset TRITON_INTERPRET")
    found = []
    for module in MODULES:
        parts = module.split(".")
        op = parts[-2] if "ops" in parts else "shared"
        kernels = importlib.import_module(module)
        for name in architectures:
            for number, specimen in enumerate(kernels.specimens(name)):
                if number % every == first and (only in module or only in specimen.kernel.__name__):
                    found.append(measure(specimen, ARCHITECTURES[name], op))
    return found


def table(budgets: list[Budget]) -> str:
    """The budgets as a page of Markdown: one line a specimen, one column an architecture."""
    import triton

    names = list(dict.fromkeys(b.architecture for b in budgets))
    rows: dict[tuple[str, ...], dict[str, Budget]] = {}
    for b in budgets:
        rows.setdefault((b.op, b.kernel, b.label, b.config), {})[b.architecture] = b
    limits = ", ".join(f"{n} {ARCHITECTURES[n].shared // 1024} KiB" for n in names)
    lines = [
        "# What the Triton kernels use",
        "",
        "Made by `python -m mmkernels.testing.aot --table benchmarks/results/triton_budgets.md`, with "
        f"Triton {triton.__version__}; compiled, not run.",
        f"A cell is registers a thread / KiB of shared memory / bytes spilled. Shared memory there is: {limits}.",
        "",
        "| op | kernel | specimen | tile, warps | " + " | ".join(names) + " |",
        "| --- | --- | --- | --- | " + " | ".join("---" for _ in names) + " |",
    ]
    for (op, kernel, label, config), cells in rows.items():
        warps = "/".join(dict.fromkeys(str(b.warps) for b in cells.values()))
        shown = [
            f"{cells[n].registers} / {cells[n].shared / 1024:.1f} / {cells[n].spilled}" if n in cells else "-"
            for n in names
        ]
        lines.append(f"| {op} | `{kernel}` | {label} | {config}, {warps} warps | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Survey, write what was asked for, and return 1 when a budget is broken."""
    parser = argparse.ArgumentParser(description="Budgets of the Triton kernels, compiled without a GPU.")
    parser.add_argument("--arch", nargs="+", default=list(ARCHITECTURES), choices=list(ARCHITECTURES))
    parser.add_argument("--only", default="", help="part of a module's or kernel's name")
    parser.add_argument("--every", type=int, default=1, help="compile one of so many specimens")
    parser.add_argument("--first", type=int, default=0, help="which of them, from 0")
    parser.add_argument("--table", type=Path, help="write a Markdown table here")
    parser.add_argument("--json", type=Path, help="write the budgets here")
    options = parser.parse_args(arguments)
    budgets = survey(options.arch, options.only, options.every, options.first)
    if options.table:
        options.table.write_text(table(budgets), encoding="utf-8")
    if options.json:
        options.json.write_text(json.dumps([dataclasses.asdict(b) for b in budgets]), encoding="utf-8")
    faults = [fault for budget in budgets for fault in budget.faults]
    for fault in faults:
        sys.stdout.write(f"{fault}\n")
    sys.stdout.write(f"{len(budgets)} binaries, {len(faults)} over budget\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
