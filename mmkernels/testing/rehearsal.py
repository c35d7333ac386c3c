"""Every launch of the Triton backends in the contract's cases, compiled for a GPU that is not there instead of run.

    python -m mmkernels.testing.rehearsal --arch sm_90 --only causal_conv1d

The interpreter accepts what the compiler refuses, and the specimens of mmkernels.testing.aot are a selection; this
takes the arguments of real calls, forward and backward, as a launch would specialise them.  In a process of its own:
the interpreter must be off, and the backends are told that there is a device.
"""

import argparse
import sys
from typing import Any

import torch
from torch import Tensor

from mmkernels import _triton
from mmkernels._triton import Config
from mmkernels.testing import CASES
from mmkernels.testing.aot import ARCHITECTURES, narrow_offsets
from mmkernels.testing.contract import forward_backward

_POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
    torch.uint8: "*u8",
    torch.int8: "*i8",
}


class Rehearsal:
    """Stands in for `_triton.launch`; compiles each distinct kernel once and remembers what was wrong.

    Args:
        architecture: a name of ARCHITECTURES.
    """

    def __init__(self, architecture: str):
        self.target = ARCHITECTURES[architecture].target
        self.compiled: dict[tuple[Any, ...], None] = {}
        self.faults: list[str] = []
        self.case = ""

    def launch(self, kernel: Any, grid: tuple[int, ...], config: Config, *args: Any, **constants: Any) -> None:
        """As `_triton.launch`, up to the launch itself."""
        if 0 in grid:
            return
        names = kernel.arg_names
        values = dict(zip(names, args, strict=False)) | {**config.blocks, **constants}
        unknown, missing = set(values) - set(names), [n for n in names if n not in values]
        missing = [n for n in missing if kernel.signature.parameters[n].default is kernel.signature.empty]
        if unknown or missing:
            self.faults.append(f"{self.case}: {kernel.__name__}: unknown {sorted(unknown)}, missing {missing}")
            return
        signature, constexprs, attributes = _specialised(kernel, values)
        key = (kernel.__name__, kernel.__module__, str(signature), str(constexprs), str(attributes), str(config))
        if key not in self.compiled:
            self.compiled[key] = None
            self._compile(kernel, signature, constexprs, attributes, config)

    def _compile(self, kernel: Any, signature: Any, constexprs: Any, attributes: Any, config: Config) -> None:
        import triton
        from triton.compiler import ASTSource
        from triton.compiler.errors import CompilationError

        options = {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True}
        source = ASTSource(kernel, signature, constexprs, attributes)
        try:
            ttir = triton.compile(source, target=self.target, options=options).asm["ttir"]
        except (CompilationError, RuntimeError) as error:  # what the front end and the passes raise
            self.faults.append(f"{self.case}: {kernel.__name__} does not compile: {error}")
            return
        self.faults += [f"{self.case}: {kernel.__name__}: narrow offset {line}" for line in narrow_offsets(ttir)]


def _specialised(kernel: Any, values: dict[str, Any]) -> tuple[dict[str, str], dict[Any, Any], dict[Any, Any]]:
    """(types, compile-time values, alignment), as Triton's launcher derives them from arguments."""
    signature: dict[str, str] = {}
    constexprs: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    for i, parameter in enumerate(kernel.params):
        value = values.get(parameter.name, parameter.default)
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and type(value) is int and value == 1):
            signature[parameter.name], constexprs[(i,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name] = _POINTERS[value.dtype]
            if value.data_ptr() % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if special and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constexprs, attributes


def rehearse(architecture: str, only: str = "", dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)) -> Rehearsal:
    """Run every case of every op whose name contains `only` with launches compiled instead.

    Returns:
        The rehearsal: `compiled` has one entry a distinct kernel, `faults` what was wrong, in words.
    """
    if _triton.interpreting():
        raise RuntimeError("mmkernels.testing.rehearsal: kernels must be compiled; unset TRITON_INTERPRET")
    from mmkernels._dispatch import registered

    rehearsal = Rehearsal(architecture)
    _triton.probe = lambda: None  # type: ignore[assignment]
    _triton.architecture = lambda device: architecture
    _triton.launch = rehearsal.launch
    for op, entry in registered().items():
        if "triton" not in entry.entries or only not in op:
            continue
        entry.entries["triton"].declines = None
        for case in CASES[op]:
            for dtype in dtypes:
                rehearsal.case = f"{op} {case.id} {str(dtype).removeprefix('torch.')}"
                forward_backward(case, "triton", dtype, case.args(torch.float64))
    return rehearsal


def main(arguments: list[str] | None = None) -> int:
    """Rehearse, print faults, return 1 if there are any."""
    parser = argparse.ArgumentParser(description="Compile every launch of the contract's cases for a GPU.")
    parser.add_argument("--arch", default="sm_90", choices=list(ARCHITECTURES))
    parser.add_argument("--only", default="", help="part of an op's name")
    parser.add_argument("--float64", action="store_true", help="float64 instead of bfloat16")
    options = parser.parse_args(arguments)
    done = rehearse(options.arch, options.only, (torch.float64,) if options.float64 else (torch.bfloat16,))
    for fault in done.faults:
        sys.stdout.write(f"{fault}\n")
    sys.stdout.write(f"{len(done.compiled)} kernels compiled, {len(done.faults)} faults\n")
    return 1 if done.faults else 0


if __name__ == "__main__":
    sys.exit(main())
