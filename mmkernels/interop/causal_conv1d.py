"""The functions of the causal-conv1d package on this library's op: same names, same arguments, any device.

    from mmkernels.interop.causal_conv1d import causal_conv1d_fn, causal_conv1d_update

There the channels come second, (batch, dim, seqlen).  `mmkernels.causal_conv1d` has them last and offers more.
"""

import torch
from torch import Tensor

from mmkernels.errors import ConfigError, ShapeError
from mmkernels.ops.causal_conv1d.api import causal_conv1d
from mmkernels.ops.causal_conv1d.api import causal_conv1d_update as update

_ACTIVATIONS = {None: None, "silu": "silu", "swish": "silu"}


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Depthwise causal convolution over time of channels-first input.

    Args:
        x: (batch, dim, seqlen).  Channels last in memory, as a transposed projection is, costs no copy.
        weight: (dim, width); bias: (dim,) or None.
        seq_idx: (batch, seqlen) int32, the sequence of each token; taps do not cross.
        initial_states: (batch, dim, width - 1), the inputs before the first.
        return_final_states: also return the last width - 1 inputs, (batch, dim, width - 1).
        final_states_out: where to write them as well.
        activation: None, "silu" or "swish".

    Returns:
        (batch, dim, seqlen) in the dtype of x, channels last in memory; with the final states if asked for.

    Raises:
        ShapeError, DtypeError: as `mmkernels.causal_conv1d`, whose numerics and cost these are.
        ConfigError: an activation it does not have.
    """
    _three_dimensions("causal_conv1d_fn", x)
    out = causal_conv1d(
        x.transpose(1, 2),
        weight,
        bias,
        activation=_known("causal_conv1d_fn", activation),
        initial_states=initial_states,
        seq_idx=seq_idx,
        return_final_states=return_final_states,
    )
    if not isinstance(out, tuple):
        return out.transpose(1, 2)
    y, final = out
    if final_states_out is not None:
        final = final_states_out.copy_(final)
    return y.transpose(1, 2), final


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """One token, or a few, of the convolution; `conv_state` is updated in place.

    Args:
        x: (batch, dim) or (batch, dim, seqlen).
        conv_state: (slots, dim, state_len) with state_len >= width - 1: the last inputs, oldest first.
        weight: (dim, width); bias: (dim,) or None.
        activation: None, "silu" or "swish".
        cache_seqlens: must be None; a state that is a ring buffer is not supported.
        conv_state_indices: (batch,) int32, the slot of each row; negative: padding.

    Returns:
        Like x.

    Raises:
        ShapeError, DtypeError: as `mmkernels.causal_conv1d_update`.
        ConfigError: cache_seqlens given, or an activation it does not have.
    """
    if cache_seqlens is not None:
        raise ConfigError(
            "causal_conv1d_update: cache_seqlens must be None; got a tensor. Keep conv_state in order (oldest first) "
            "instead of as a ring."
        )
    known = _known("causal_conv1d_update", activation)
    if x.dim() == 2:
        return update(x, conv_state, weight, bias, activation=known, state_indices=conv_state_indices)
    _three_dimensions("causal_conv1d_update", x)
    y = update(x.transpose(1, 2), conv_state, weight, bias, activation=known, state_indices=conv_state_indices)
    return y.transpose(1, 2)


def _known(function: str, activation: str | None) -> str | None:
    if activation not in _ACTIVATIONS:
        raise ConfigError(f"{function}: activation must be None, 'silu' or 'swish'; got {activation!r}.")
    return _ACTIVATIONS[activation]


def _three_dimensions(function: str, x: torch.Tensor) -> None:
    if x.dim() != 3:
        raise ShapeError(f"{function}: x must have shape (batch, dim, seqlen); got {tuple(x.shape)}.")
