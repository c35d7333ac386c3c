"""Backend "native" of mamba2_step: csrc/ops/mamba2_step.cpp, one call; here its fake kernel and what it declines."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmkernels import _native

_native.require()
_step = torch.ops.mmkernels.mamba2_step.default
_steps = torch.ops.mmkernels.mamba2_steps.default
# As kParameters and kNumbers in csrc/ops/mamba2_step.cpp count them.
_PARAMETERS = (
    *("in_weight", "conv_weight", "A_log", "dt_bias", "D", "out_weight", "norm_weight"),
    *("in_bias", "conv_bias", "gate_weight", "out_bias"),
)


def mamba2_step(
    *,
    hidden: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    in_weight: Tensor,
    conv_weight: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    D: Tensor,
    out_weight: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    in_bias: Tensor | None,
    conv_bias: Tensor | None,
    gate_weight: Tensor | None,
    out_bias: Tensor | None,
    eps: float,
    gate_eps: float,
    dt_limit: tuple[float, float],
    norm_before_gate: bool,
    residual_in_fp32: bool,
) -> tuple[Tensor, Tensor | None]:
    """See mmkernels.mamba2_step; always (out, residual sum or None)."""
    out, total = _step(
        hidden,
        conv_state,
        ssm_state,
        in_weight,
        conv_weight,
        A_log,
        dt_bias,
        D,
        out_weight,
        residual,
        norm_weight,
        in_bias,
        conv_bias,
        gate_weight,
        out_bias,
        eps,
        gate_eps,
        *dt_limit,
        norm_before_gate,
        residual_in_fp32,
    )
    return out, None if norm_weight is None else total


@torch.library.register_fake(_step)
def mamba2_step_fake(hidden: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """(out, residual sum); the latter empty without a norm."""
    out_weight, residual, norm_weight, residual_in_fp32 = args[7], args[8], args[9], args[-1]
    out = hidden.new_empty(hidden.shape, dtype=out_weight.dtype)
    if norm_weight is None:
        return out, hidden.new_empty((0,))
    dtype = hidden.dtype if residual is None else torch.promote_types(hidden.dtype, residual.dtype)
    dtype = torch.promote_types(dtype, torch.float32) if residual_in_fp32 else dtype
    return out, hidden.new_empty(hidden.shape, dtype=dtype)


class Steps:
    """Several blocks bound to one call: `mamba2_step` on each in turn, the loop being C++.

    Args:
        blocks: what `mamba2_step` takes for each block but hidden, residual and the states; norm_weight is required.
    """

    def __init__(self, blocks: Iterable[Mapping[str, Any]]):
        self._parameters, self._numbers = [], []
        for block in blocks:
            self._parameters += [block[name] for name in _PARAMETERS]
            numbers = (block["eps"], block["gate_eps"], *block["dt_limit"])
            self._numbers += [*map(float, numbers), float(block["norm_before_gate"]), float(block["residual_in_fp32"])]

    def __call__(
        self, hidden: Tensor, residual: Tensor | None, conv_states: Sequence[Tensor], ssm_states: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """(out of the last block, the running sum before it), bit for bit as call by call; states change IN PLACE."""
        made: tuple[Tensor, Tensor] = _steps(hidden, residual, conv_states, ssm_states, self._parameters, self._numbers)
        return made
