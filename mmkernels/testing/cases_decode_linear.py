"""Test inputs of decode_linear."""

from collections.abc import Callable
from typing import Any

import torch

from mmkernels.testing.cases import Case, register_cases

Args = dict[str, Any]


def linear_inputs(generator: torch.Generator, lead: tuple[int, ...], inner: int, out: int, *, bias: bool) -> Args:
    """Keyword arguments of decode_linear in float64; outputs of size one."""

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    weight = draw(out, inner) / max(inner, 1) ** 0.5
    return {"x": draw(*lead, inner), "weight": weight, "bias": draw(out) if bias else None}


def _build(*lead: int, inner: int, out: int, bias: bool = True) -> Callable[[torch.Generator], Args]:
    return lambda generator: linear_inputs(generator, lead, inner, out, bias=bias)


def _views(generator: torch.Generator) -> Args:
    # Columns of a wider input, rows of a fused projection.
    made = linear_inputs(generator, (3,), 12, 20, bias=False)
    return {"x": made["x"][:, 2:9], "weight": made["weight"][4:15, 1:8], "bias": None}


register_cases(
    *(
        Case("decode_linear", name, build, small=small, summands=inner)
        for name, inner, build, small in (
            ("one-row", 5, _build(1, inner=5, out=3), True),
            ("no-bias", 7, _build(2, inner=7, out=6, bias=False), True),
            ("lead", 4, _build(2, 3, inner=4, out=5), True),
            ("one-dim", 6, _build(inner=6, out=9), True),
            ("views", 7, _views, True),
            ("odd", 93, _build(3, inner=93, out=31), False),
            ("rows-9", 130, _build(9, inner=130, out=66), False),
            ("mamba2-in", 768, _build(1, inner=768, out=301), False),
            ("far", 4500, _build(2, inner=4500, out=21, bias=False), False),
            ("empty-rows", 8, _build(0, inner=8, out=4), False),
            ("empty-in", 0, _build(2, inner=0, out=4), False),
        )
    )
)
