"""Test inputs of gated_rms_norm."""

from collections.abc import Callable
from typing import Any

import torch

from mmkernels.testing.cases import Case, register_cases

Args = dict[str, Any]


def norm_inputs(
    generator: torch.Generator, shape: tuple[int, ...], *, gate: bool = True, bias: bool = False, **rest: Any
) -> Args:
    """Keyword arguments of gated_rms_norm in float64; the weight is shared by groups if rest has shared=True."""

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    shared = rest.pop("shared", False)
    width = rest["group_size"] if shared else shape[-1]
    return {
        "x": draw(*shape),
        "weight": 1 + draw(width) / 4,
        "z": draw(*shape) if gate else None,
        "bias": draw(width) if bias else None,
        **rest,
    }


def _build(*shape: int, **rest: Any) -> Callable[[torch.Generator], Args]:
    return lambda generator: norm_inputs(generator, shape, **rest)


def _strided(generator: torch.Generator) -> Args:
    # z as a Mamba-2 mixer passes it: the leading slice of the input projection.
    made = norm_inputs(generator, (2, 3, 8), group_size=4)
    return {**made, "z": torch.randn(2, 3, 21, generator=generator, dtype=torch.float64)[..., :8]}


register_cases(
    *(
        Case("gated_rms_norm", name, build, small=small)
        for name, build, small in (
            ("gate-first", _build(2, 3, 8), True),
            ("norm-first", _build(2, 3, 8, norm_before_gate=True), True),
            ("plain", _build(3, 5, gate=False, bias=True), True),
            ("groups-gate-first", _build(2, 12, group_size=4, bias=True), True),
            (
                "groups-norm-first-shared",
                _build(2, 2, 12, group_size=3, shared=True, norm_before_gate=True, bias=True),
                True,
            ),
            ("strided", _strided, True),
            ("one-dim", _build(7, eps=1e-3), True),
            ("empty", _build(0, 4, 8), False),
            ("mamba2", _build(2, 17, 1536), False),
            ("mmmamba", _build(2, 17, 4 * 128, group_size=128, shared=True, norm_before_gate=True), False),
            ("odd", _build(3, 5, 93, group_size=31, bias=True), False),
        )
    )
)
