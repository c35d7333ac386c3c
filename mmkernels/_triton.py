"""Triton: whether it can run here, how its kernels are launched, and with which sizes they are compiled.

require()      or BackendUnavailable with the reason; a backend file calls it before it imports its kernels
objections()   why a Triton backend declines a call; for `Backend(..., declines=...)`
launch()       run a kernel with a Config
define()       make a library op of a function that launches kernels

Kernels live in `_triton_kernels*.py` files, which import triton and nothing that needs a device, so that they can be
compiled for every architecture on a machine that has none (mmkernels.testing.aot).
"""

import dataclasses
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mmkernels import _env
from mmkernels._dispatch import BackendUnavailable
from mmkernels._gradients import no_gradient_in_place, untracked_transform

NAMESPACE = "mmkernels_triton"
PROBE = "mmkernels._triton:probe"
DEVICES = ("cuda", "cpu")
INTERPRETER = "interpreter"
_INTERPRETING = _env.triton_interpreted()  # read once, as Triton reads it once: when a kernel is decorated


@dataclasses.dataclass(frozen=True)
class Config:
    """How one kernel is compiled for one architecture and one bucket of shapes.

    Args:
        blocks: the kernel's block sizes, by parameter name; powers of two.
        warps: warps a program.
        stages: depth of the software pipeline of its loops.
    """

    blocks: Mapping[str, int]
    warps: int = 4
    stages: int = 2


@dataclasses.dataclass(frozen=True)
class Specimen:
    """One way a kernel is compiled in earnest, for the ahead-of-time budgets (mmkernels.testing.aot).

    Args:
        label: what is special, e.g. "bf16 gate group 1536"; unique within the kernel.
        kernel: the `@triton.jit` function.
        types: Triton type of every run-time parameter: "*bf16", "fp32"; those left out are "i32".
        config: block sizes, warps and stages, from the function that the backend itself asks.
        constants: values of the other constexpr parameters, and of parameters a launch specialises (None, stride 1).
        aligned: integer parameters that are multiples of 16, as strides of models are; a launch sees that by itself.
    """

    label: str
    kernel: Any
    types: Mapping[str, str]
    config: Config
    constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    aligned: tuple[str, ...] = ()


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on a CPU and slowly (TRITON_INTERPRET=1)."""
    return _INTERPRETING


@functools.cache
def probe() -> str | None:
    """Why Triton kernels cannot run here; None if they can."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:  # a folder that happens to be called triton has no origin
        return "triton is not installed; pip install 'mmkernels[triton]' (Linux)"
    if not interpreting():
        if not torch.cuda.is_available():
            return "there is no CUDA device, and Triton's interpreter (TRITON_INTERPRET=1, for tests) is off"
        return None
    if "triton" in sys.modules:
        from triton.runtime.interpreter import InterpretedFunction

        # Triton reads the variable when a function is decorated, its own library's when it is imported.
        if not isinstance(importlib.import_module("triton.language").sum, InterpretedFunction):
            return "TRITON_INTERPRET was set after triton had been imported; set it before Python starts"
    return None


def require() -> None:
    """Return if Triton kernels can run here.

    Raises:
        BackendUnavailable: they cannot, with the reason.
    """
    reason = probe()
    if reason is not None:
        raise BackendUnavailable(reason)


def objections(**args: object) -> list[str]:
    """Why a Triton backend declines a call: a transform it cannot see through, or tensors its kernels cannot reach."""
    if not interpreting() and any(isinstance(a, Tensor) and a.device.type == "cpu" for a in args.values()):
        return ["compiled Triton kernels need CUDA tensors, and the interpreter (TRITON_INTERPRET=1) is off"]
    return untracked_transform()


def objections_in_place(**args: object) -> list[str]:
    """As objections, for an op that writes its state in place and has no gradient."""
    return objections(**args) or no_gradient_in_place(**args)


def architecture(device: torch.device) -> str:
    """What kernels are compiled for: "sm_90", "gfx942", ..., or "interpreter"."""
    return INTERPRETER if interpreting() else _architecture(device.index or 0)


@functools.cache
def _architecture(index: int) -> str:
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(index).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def bucket(size: int, low: int = 1, high: int = 1 << 30) -> int:
    """The smallest power of two >= size within [low, high]: shapes of one bucket share one compiled kernel."""
    return min(max(1 << max(size - 1, 0).bit_length(), low), high)


def launch(kernel: Any, grid: tuple[int, ...], config: Config, *args: Any, **constants: Any) -> None:
    """Run `kernel` on the device of its first tensor; an empty grid is no launch.

    Args:
        kernel: a `@triton.jit` function.
        grid: programs along each axis; only the first may exceed 65535.
        config: block sizes, warps, stages.
        *args: the kernel's run-time arguments, in order.
        **constants: its other constexpr arguments.
    """
    if 0 in grid:
        return
    keywords = {**config.blocks, **constants, **options(config)}
    device = next(a.device for a in args if isinstance(a, Tensor))
    if device.type != "cuda":
        kernel[grid](*args, **keywords)
        return
    with torch.cuda.device(device):
        kernel[grid](*args, **keywords)


def options(config: Config) -> dict[str, Any]:
    """What the compiler is told with every launch."""
    # Contraction into fused multiply-adds is on by default up to Triton 3.9 and off after it: say what we tested.
    return {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True}


def define(name: str, schema: str, implementation: Callable[..., Any]) -> torch._ops.OpOverload:
    """Make the library op mmkernels_triton::<name>; register its fake and its gradients as for a native op.

    An opaque op rather than torch.library.triton_op: wrap_triton refuses interpreted functions, and one path that
    runs the same in the interpreter, eagerly and under torch.compile is a path that is tested without a GPU.

    Args:
        name: of the op.
        schema: as in csrc/registration.cpp, e.g. "(Tensor x, Tensor? z) -> Tensor"; mutated arguments "Tensor(a!) s".
        implementation: takes the schema's arguments, allocates outputs and launches.
    """
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, schema)
    torch.library.impl(qualified, "default", implementation)
    overload: torch._ops.OpOverload = getattr(getattr(torch.ops, NAMESPACE), name).default
    return overload


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and of what is kept between kernels: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)
