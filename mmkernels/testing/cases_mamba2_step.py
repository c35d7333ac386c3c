"""Test inputs of mamba2_step."""

from collections.abc import Callable
from typing import Any

import torch

from mmkernels.testing.cases import Case, register_cases

Args = dict[str, Any]


def step_inputs(
    generator: torch.Generator,
    batch: int,
    model: int,
    heads: int,
    headdim: int,
    dstate: int,
    *,
    groups: int = 1,
    width: int = 4,
    block: bool = True,
    first: bool = False,
    biases: bool = False,
    gated_norm: bool = True,
    skip_per_channel: bool = False,
    from_module: bool = False,
    **options: Any,
) -> Args:
    """Keyword arguments of mamba2_step in float64: activations of size one, step sizes from 0.001 to 1."""

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    inner = heads * headdim
    conv = inner + 2 * groups * dstate
    projected = inner + conv + heads
    made: Args = {
        "hidden": draw(batch, model),
        "conv_state": draw(batch, conv, width - 1),
        "ssm_state": draw(batch, heads, headdim, dstate),
        "in_weight": draw(projected, model) / model**0.5,
        "conv_weight": draw(conv, *([1] if from_module else []), width) / width**0.5,
        "A_log": torch.rand(heads, generator=generator, dtype=torch.float64) * 2.7,
        "dt_bias": draw(heads) - 3,
        "D": draw(heads, headdim) if skip_per_channel else draw(heads),
        "out_weight": draw(model, inner) / inner**0.5,
        "conv_bias": draw(conv) / 4,
        "gate_weight": 1 + draw(inner) / 4 if gated_norm else None,
        **options,
    }
    if block:
        made.update(residual=None if first else draw(batch, model), norm_weight=1 + draw(model) / 4)
    if biases:
        made.update(in_bias=draw(projected) / 4, out_bias=draw(model) / 4)
    return made


def _build(*sizes: int, **options: Any) -> Callable[[torch.Generator], Args]:
    return lambda generator: step_inputs(generator, *sizes, **options)


register_cases(
    *(
        Case("mamba2_step", name, build, small=small, mutates=("conv_state", "ssm_state"), summands=summands)
        for name, summands, build, small in (
            ("block", 16, _build(2, 6, 4, 3, 5), True),
            ("first-block", 16, _build(2, 6, 4, 3, 5, first=True), True),
            ("mixer", 16, _build(1, 6, 4, 3, 5, block=False), True),
            ("groups", 16, _build(3, 6, 4, 3, 2, groups=2, norm_before_gate=True), True),
            ("no-gated-norm", 16, _build(2, 6, 2, 3, 4, groups=2, gated_norm=False, skip_per_channel=True), True),
            ("biases", 16, _build(2, 6, 2, 3, 4, biases=True, width=2, dt_limit=(0.02, 0.05)), True),
            ("from-module", 16, _build(2, 6, 2, 3, 4, from_module=True, residual_in_fp32=False), True),
            ("width-1", 16, _build(2, 6, 2, 3, 4, width=1), True),
            ("empty-batch", 0, _build(0, 6, 2, 3, 4), True),
            ("odd", 64, _build(3, 37, 3, 9, 19, biases=True), False),
            ("mamba2", 256, _build(2, 128, 4, 64, 128), False),
        )
    )
)
