"""Every launch of the Triton backends in the contract's cases, compiled for a GPU that is not there instead of run.

    python -m mmkernels.testing.rehearsal --arch sm_90 --only causal_conv1d

The interpreter accepts what the compiler refuses, and the specimens of mmkernels.testing.aot are a selection; this
gives Triton the arguments of real calls, forward and backward, and stops before the launch.  In a process of its own:
the interpreter must be off, and the backends are told that there is a device.
"""

import argparse
import sys
from typing import Any

import torch

from mmkernels import _triton
from mmkernels._triton import Config
from mmkernels.testing import CASES
from mmkernels.testing.aot import ARCHITECTURES, narrow_offsets
from mmkernels.testing.contract import forward_backward


class _AbsentDevice:
    """As much of a Triton driver as binding arguments and compiling ask for."""

    def __init__(self, target: Any):
        self.target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


class Rehearsal:
    """Stands in for `_triton.launch`: Triton binds and specialises the arguments, compiles, and does not launch.

    Args:
        architecture: a name of ARCHITECTURES.
    """

    def __init__(self, architecture: str):
        from triton.runtime import driver

        driver.set_active(_AbsentDevice(ARCHITECTURES[architecture].target))
        self.compiled: set[str] = set()
        self.faults: list[str] = []
        self.case = ""

    def launch(self, kernel: Any, grid: tuple[int, ...], config: Config, *args: Any, **constants: Any) -> None:
        """As `_triton.launch`, up to the launch itself."""
        from triton.compiler.errors import CompilationError

        if 0 in grid:
            return
        try:
            found = kernel.warmup(*args, grid=grid, **config.blocks, **constants, **_triton.options(config))
        except (CompilationError, RuntimeError, TypeError, KeyError) as error:  # of binding, front end and passes
            self.faults.append(f"{self.case}: {kernel.__name__} does not compile: {error}")
            return
        if found.hash not in self.compiled:
            self.compiled.add(found.hash)
            narrow = narrow_offsets(found.asm["ttir"])
            self.faults += [f"{self.case}: {kernel.__name__}: narrow offset {line}" for line in narrow]


def rehearse(architecture: str, only: str = "", dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)) -> Rehearsal:
    """Run every case of the op called `only`, or of every op whose name contains it, with launches compiled instead.

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
    # Some of what kernels would have written is an index for what comes after them.
    torch.Tensor.new_empty = torch.Tensor.new_zeros  # type: ignore[assignment, method-assign]
    torch.empty_like = torch.zeros_like
    for op, entry in registered().items():
        asked = op == only if only in registered() else only in op
        if "triton" not in entry.entries or not asked:
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
    parser.add_argument("--only", default="", help="an op's name, or a part of several")
    parser.add_argument("--float64", action="store_true", help="float64 instead of bfloat16")
    options = parser.parse_args(arguments)
    done = rehearse(options.arch, options.only, (torch.float64,) if options.float64 else (torch.bfloat16,))
    for fault in done.faults:
        sys.stdout.write(f"{fault}\n")
    sys.stdout.write(f"{len(done.compiled)} kernels compiled, {len(done.faults)} faults\n")
    return 1 if done.faults else 0


if __name__ == "__main__":
    sys.exit(main())
