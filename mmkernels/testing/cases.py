"""Test inputs of every op, in one registry: adding a case adds it to every property, every backend and every dtype."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

CASES: dict[str, list["Case"]] = {}


@dataclass(frozen=True)
class Case:
    """One way to call an op.

    Args:
        op: the op's name.
        id: short and unique within the op, e.g. "groups2-z-D".
        build: makes float64 CPU keyword arguments of the public function from a seeded generator.
        small: few enough elements for numerical differentiation (gradcheck, gradgradcheck).
        mutates: arguments the op writes in place; they count as outputs.
        heavy: too many steps for Triton's interpreter (some 300 a second), which therefore leaves it out; whatever
            feature it has must be in another case too.
        summands: products behind one result (tokens that a gradient sums over), if backends may add them in any order.
    """

    op: str
    id: str
    build: Callable[[torch.Generator], dict[str, Any]]
    small: bool = False
    mutates: tuple[str, ...] = ()
    summands: int = 0
    heavy: bool = False

    def args(
        self, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0, grad: bool = False
    ) -> dict[str, Any]:
        """Keyword arguments: floating tensors rounded to `dtype`, leaves that require grad if `grad`."""
        made = self.build(torch.Generator().manual_seed(seed))
        out = {}
        for name, value in made.items():
            if isinstance(value, torch.Tensor):
                if value.is_floating_point():
                    value = value.to(dtype)
                value = value.to(device)
                if grad and value.is_floating_point() and name not in self.mutates:
                    value = value.detach().clone(memory_format=torch.preserve_format).requires_grad_()
            out[name] = on_device(value, device)
        return out

    def run(self, args: dict[str, Any], backend: str) -> tuple[torch.Tensor, ...]:
        """Call the public function; outputs first, then the arguments it mutates (its own copies)."""
        import mmkernels

        args = {k: v.clone() if k in self.mutates else v for k, v in args.items()}
        out = getattr(mmkernels, self.op)(**args, backend=backend)
        outs = out if isinstance(out, tuple) else (out,)
        return (*outs, *(args[name] for name in self.mutates))


def on_device(value: Any, device: str) -> Any:
    """`value` moved to the device if it is something that lives on one: a tensor, a mask made of tensors."""
    return value.to(device) if hasattr(value, "to") else value


def register_cases(*cases: Case) -> None:
    """Add cases to the registry; an id used twice within an op is an error."""
    for case in cases:
        known = CASES.setdefault(case.op, [])
        if any(other.id == case.id for other in known):
            raise ValueError(f"register_cases: {case.op} already has a case called {case.id!r}")
        known.append(case)
