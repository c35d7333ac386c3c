"""The Mamba-2 functions of the mamba-ssm package on this library's ops: same names, same arguments, any device.

    from mmkernels.interop.mamba_ssm import mamba_chunk_scan_combined, selective_state_update

What differs, on purpose: softplus keeps its accuracy for small steps, `cu_seqlens` separates sequences by itself, and
double backward works.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.errors import ConfigError, ShapeError
from mmkernels.ops.causal_conv1d.api import causal_conv1d
from mmkernels.ops.gated_rms_norm.api import gated_rms_norm
from mmkernels.ops.ssd.api import ssd_scan, ssd_update

_NO_LIMIT = (0.0, float("inf"))


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int | None = None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = _NO_LIMIT,
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """The Mamba-2 scan; `mmkernels.ssd_scan` with mamba-ssm's arguments.

    Args:
        x: (batch, seqlen, nheads, headdim); dt: (batch, seqlen, nheads); A: (nheads,), negative.
        B, C: (batch, seqlen, ngroups, dstate).
        chunk_size: not used: it is tuned for one GPU kernel, changes no result, and every backend here has its own.
        D: (nheads,) or (nheads, headdim); z: like x, the gate; dt_bias: (nheads,).
        initial_states: (batch, nheads, headdim, dstate).  With cu_seqlens they belong to the first sequence.
        seq_idx: (batch, seqlen) int32, the sequence of each token.
        cu_seqlens: (n + 1,) int32, bounds of packed sequences (batch 1); seq_idx may be given as well and must agree.
        dt_softplus, dt_limit: how a step is made of dt + dt_bias.
        return_final_states: also the states after the last token, (batch, nheads, headdim, dstate).
        return_varlen_states: also those after each sequence of cu_seqlens, (n, nheads, headdim, dstate).
        state_dtype: of the returned states; None: float32 (float64 for float64 input).

    Returns:
        y like x, or a tuple of it, the final states and the states of the sequences, as asked for.

    Raises:
        ShapeError, DtypeError: as `mmkernels.ssd_scan`, whose numerics and cost these are.
        ConfigError: return_varlen_states without cu_seqlens.
    """
    if return_varlen_states and cu_seqlens is None:
        raise ConfigError(
            "mamba_chunk_scan_combined: cu_seqlens must be given with return_varlen_states; got None. "
            "Pass the bounds of the packed sequences."
        )
    states = return_final_states or return_varlen_states
    if cu_seqlens is not None and initial_states is not None:
        others = initial_states.new_zeros((max(cu_seqlens.numel() - 2, 0), *initial_states.shape[1:]))
        initial_states = torch.cat([initial_states, others])
    out = ssd_scan(
        x,
        dt,
        A,
        B,
        C,
        initial_states=initial_states,
        seq_idx=seq_idx if cu_seqlens is None else None,
        cu_seqlens=cu_seqlens,
        D=D,
        z=z,
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
        return_final_states=states,
    )
    if not isinstance(out, tuple):
        return out
    y, final = out[0], out[1] if state_dtype is None else out[1].to(state_dtype)
    if cu_seqlens is None:
        return y, final
    if not return_varlen_states:
        return y, final[-1:]
    return (y, final[-1:], final) if return_final_states else (y, final)


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = _NO_LIMIT,
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """A Mamba-2 mixer from its input projection on: convolution, scan, gated norm, output projection.

    Args:
        zxbcdt: (batch, seqlen, 2 * d_inner + 2 * ngroups * dstate + nheads): gate, x, B, C, dt in this order.
        conv1d_weight: (d_inner + 2 * ngroups * dstate, width); conv1d_bias: per channel, or None.
        dt_bias, A: (nheads,); D: (nheads,) or (nheads, headdim).
        chunk_size: not used.
        initial_states, seq_idx, dt_limit, return_final_states, state_dtype: as `mamba_chunk_scan_combined`.
        activation: of the convolution, "silu", "swish" or None.
        rmsnorm_weight: (d_inner,), or None: the gate is applied by the scan and nothing is normalised.
        rmsnorm_eps, norm_before_gate: of the norm; its groups are d_inner / ngroups channels.
        outproj_weight: (d_model, d_inner) or None; outproj_bias: (d_model,) or None.
        headdim: needed where D is (nheads,).
        ngroups: groups of heads that share B and C.

    Returns:
        (batch, seqlen, d_model), or d_inner without projection; with the final states if asked for.

    Raises:
        ShapeError: sizes that do not add up, or neither headdim nor a D with channels.
    """
    nheads = A.shape[0]
    channels = headdim if D.dim() == 1 else D.shape[1]
    if channels is None:
        raise ShapeError(
            "mamba_split_conv1d_scan_combined: headdim must be given where D is (nheads,); got None. Pass headdim."
        )
    inner = nheads * channels
    keys = zxbcdt.shape[-1] - 2 * inner - nheads
    if keys <= 0 or keys % (2 * ngroups) != 0:
        raise ShapeError(
            f"mamba_split_conv1d_scan_combined: zxbcdt must have 2 * {inner} + 2 * ngroups * dstate + {nheads} "
            f"channels; got {zxbcdt.shape[-1]}. Check headdim={channels} and ngroups={ngroups}."
        )
    z, xBC, dt = zxbcdt.split([inner, inner + keys, nheads], dim=-1)
    kind = {"swish": "silu"}.get(activation or "", activation)
    mixed = cast(Tensor, causal_conv1d(xBC, conv1d_weight, conv1d_bias, activation=kind, seq_idx=seq_idx))
    x, B, C = mixed.split([inner, keys // 2, keys // 2], dim=-1)
    heads, groups = (nheads, channels), (ngroups, keys // 2 // ngroups)
    normed = rmsnorm_weight is not None
    out = mamba_chunk_scan_combined(
        x.unflatten(-1, heads),
        dt,
        A,
        B.unflatten(-1, groups),
        C.unflatten(-1, groups),
        chunk_size,
        D=D,
        z=None if normed else z.unflatten(-1, heads),
        dt_bias=dt_bias,
        initial_states=initial_states,
        seq_idx=seq_idx,
        dt_softplus=True,
        dt_limit=dt_limit,
        return_final_states=return_final_states,
        state_dtype=state_dtype,
    )
    y, final = out if isinstance(out, tuple) else (out, None)
    y = y.flatten(-2)
    if rmsnorm_weight is not None:
        group = inner // ngroups
        y = gated_rms_norm(y, rmsnorm_weight, z=z, eps=rmsnorm_eps, group_size=group, norm_before_gate=norm_before_gate)
    if outproj_weight is not None:
        y = F.linear(y.to(outproj_weight.dtype), outproj_weight, outproj_bias)
    return y if final is None else (y, final)


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """One token of the Mamba-2 recurrence; `state` is updated in place.

    Args:
        state: (slots, nheads, headdim, dstate).
        x: (batch, nheads, headdim); z: the same, or None.
        dt: (batch, nheads), or (batch, nheads, headdim) as an expanded view of it.
        A: (nheads,), or (nheads, headdim, dstate) as an expanded view; so D and dt_bias, to (nheads, headdim).
        B, C: (batch, ngroups, dstate).
        D: also (nheads, headdim) with values of its own.
        state_batch_indices: (batch,) int32, the slot of each row; negative: padding.

    Returns:
        y like x.

    Raises:
        ShapeError: x without heads, or A, dt or dt_bias that differ inside a head (Mamba-1).
    """
    if x.dim() != 3:
        raise ShapeError(
            f"selective_state_update: x must have shape (batch, nheads, headdim); got {tuple(x.shape)}. "
            "Mamba-1, which has no heads, is not supported."
        )
    return ssd_update(
        state,
        x,
        _one_per_head("dt", dt, 2),
        _one_per_head("A", A, 1),
        B,
        C,
        D=D[:, 0] if D is not None and D.dim() == 2 and _tied(D, 1) else D,
        z=z,
        dt_bias=None if dt_bias is None else _one_per_head("dt_bias", dt_bias, 1),
        dt_softplus=dt_softplus,
        state_indices=state_batch_indices,
    )


def _tied(value: Tensor, dims: int) -> bool:
    # By strides: no value is read, as an expanded view has stride 0 in what it repeats.
    return all(value.stride(d) == 0 or value.shape[d] == 1 for d in range(dims, value.dim()))


def _one_per_head(name: str, value: Tensor, dims: int) -> Tensor:
    if not _tied(value, dims):
        raise ShapeError(
            f"selective_state_update: {name} must be the same within a head, as an expanded view is; got "
            f"{tuple(value.shape)} with strides {value.stride()}. Pass {dims} dimensions."
        )
    for _ in range(value.dim() - dims):
        value = value[..., 0]
    return value


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """Gated RMSNorm; `mmkernels.gated_rms_norm` with mamba-ssm's arguments and defaults.

    Args:
        x: (..., dim); weight: (dim,); bias: (dim,) or None; z: like x, the gate, or None.
        eps: added to the mean square; group_size: channels normalised together, None: all.
        norm_before_gate: norm(x) * silu(z) if True, norm(x * silu(z)) if False.

    Returns:
        Like x.

    Raises:
        ShapeError, DtypeError: as `mmkernels.gated_rms_norm`.
    """
    return gated_rms_norm(x, weight, z=z, bias=bias, eps=eps, group_size=group_size, norm_before_gate=norm_before_gate)
