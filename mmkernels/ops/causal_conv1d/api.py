"""Public functions causal_conv1d and causal_conv1d_update: signature, validation, dispatch.

Mamba-2's short convolution (arXiv 2405.21060, figure 6), as implemented for CUDA by the causal-conv1d package.
"""

import torch

from mmkernels import _triton
from mmkernels._checks import Sizes, Verified, floating, integer, same_device
from mmkernels._dispatch import NATIVE_PROBE, Backend, Op
from mmkernels._gradients import no_gradient_in_place, untracked_transform
from mmkernels.errors import ConfigError, ShapeError

_HERE = "mmkernels.ops.causal_conv1d"

CAUSAL_CONV1D = Op(
    "causal_conv1d",
    key="x",
    public="mmkernels.ops.causal_conv1d.api.causal_conv1d",
    backends=[
        Backend("native", f"{_HERE}._native:causal_conv1d", ("cpu",), untracked_transform, NATIVE_PROBE),
        Backend("triton", f"{_HERE}._triton:causal_conv1d", _triton.DEVICES, _triton.objections, _triton.PROBE),
        Backend("torch", f"{_HERE}._torch:causal_conv1d"),
        Backend("reference", f"{_HERE}.reference:causal_conv1d"),
    ],
)
CAUSAL_CONV1D_UPDATE = Op(
    "causal_conv1d_update",
    key="x",
    public="mmkernels.ops.causal_conv1d.api.causal_conv1d_update",
    backends=[
        Backend(
            "native",
            f"{_HERE}._native:causal_conv1d_update",
            ("cpu",),
            no_gradient_in_place,
            NATIVE_PROBE,
            direct=f"{_HERE}._native:update_op",
        ),
        Backend(
            "triton",
            f"{_HERE}._triton:causal_conv1d_update",
            _triton.DEVICES,
            _triton.objections_in_place,
            _triton.PROBE,
        ),
        Backend("torch", f"{_HERE}._torch:causal_conv1d_update"),
        Backend("reference", f"{_HERE}.reference:causal_conv1d_update"),
    ],
)
_verified_updates = Verified()


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    initial_states: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    reverse: bool = False,
    return_final_states: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Convolve every channel with its own short causal filter, channels last.

    out[b, t, c] = act(bias[c] + sum_{k=0}^{width-1} weight[c, k] x[b, t - (width-1) + k, c]), where rows before the
    sequence come from `initial_states` (zeros without them).  Mamba-2, arXiv 2405.21060, section 7.

    Args:
        x: (batch, seqlen, dim), any strides; float32, bfloat16, float16 or float64.
        weight: (dim, width), any width >= 1; weight[:, -1] multiplies the current token.
        bias: (dim,), or None.
        activation: None or "silu".
        initial_states: (batch, dim, width-1) - (n, dim, width-1) with cu_seqlens - the raw inputs before the first
            token, oldest first.
        seq_idx: (batch, seqlen) int32, packed sequences: taps stay within the unbroken run of equal ids a token is in.
            The id before the first token counts as 0, so initial_states reach only a leading run of zeros.  A
            negative id is padding: output 0, gradient 0.
        cu_seqlens: (n+1,) int32, 0 = first, seqlen = last: n sequences packed in a batch of 1, each with its own
            states.  Empty sequences are allowed.
        reverse: look ahead instead of back: the same as flipping time (per sequence), convolving and flipping back.
        return_final_states: also return the states.
        backend: None for the automatic choice, or a backend's name.

    Returns:
        y (batch, seqlen, dim) in x's dtype; with return_final_states also final_states, shaped like initial_states, in
        x's dtype: the last width-1 raw inputs in scan order, oldest first, zeros where there were none.

    Raises:
        ShapeError: sizes disagree, or cu_seqlens with a batch other than 1 or together with seq_idx.
        DtypeError: a dtype outside the four, or ids that are not integers.
        ConfigError: an unknown activation.

    Numerics: products and sums in float32 (float64 for float64), rounded once on output; deterministic.
    Cost: 2 * width flops and one read and one write per element of x.

    Example:
        >>> import torch, mmkernels
        >>> x, weight = torch.randn(2, 16, 8), torch.randn(8, 4)
        >>> mmkernels.causal_conv1d(x, weight, activation="silu").shape
        torch.Size([2, 16, 8])

    Source: checked against torch.nn.functional.conv1d(groups=dim) and the formula in float64.
    """
    function = "causal_conv1d"
    sizes = Sizes(function)
    sizes.bind("x", x, "batch seqlen dim", "Channels come last; use x.transpose(1, 2) if they came second.")
    _check_filter(sizes, x, weight, bias, activation)
    if seq_idx is not None and cu_seqlens is not None:
        raise ShapeError(
            f"{function}: seq_idx must be None when cu_seqlens is given; got both. Keep the one that fits the batch."
        )
    if seq_idx is not None:
        sizes.bind("seq_idx", seq_idx, "batch seqlen")
    if cu_seqlens is not None:
        _check_cu_seqlens(sizes, x, cu_seqlens)
    if initial_states is not None:
        rows = "batch" if cu_seqlens is None else "sequences"
        sizes.bind("initial_states", initial_states, f"{rows} dim history", "history is width - 1.")
    integer(function, seq_idx=seq_idx, cu_seqlens=cu_seqlens)
    floating(function, initial_states=initial_states)
    same_device(
        function, x=x, weight=weight, bias=bias, initial_states=initial_states, seq_idx=seq_idx, cu_seqlens=cu_seqlens
    )
    return CAUSAL_CONV1D(
        backend,
        {
            "x": x,
            "weight": weight,
            "bias": bias,
            "activation": activation,
            "initial_states": initial_states,
            "seq_idx": seq_idx,
            "cu_seqlens": cu_seqlens,
            "reverse": reverse,
            "return_final_states": return_final_states,
        },
    )


def causal_conv1d_update(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    state_indices: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Continue a causal convolution by one or several tokens, keeping its state in place.

    Appends x to the state and returns, for every new token,
    act(bias[c] + sum_k weight[c, k] input[t - (width-1) + k, c]) - the formula of `causal_conv1d`.

    Args:
        x: (batch, dim) for one token, or (batch, seqlen, dim); float32, bfloat16, float16 or float64.
        conv_state: (nslots, dim, state_len) with state_len >= width-1, any float dtype: the last raw inputs, oldest
            first.  UPDATED IN PLACE: shifted left by seqlen, x appended.
        weight: (dim, width); weight[:, -1] multiplies the current token.
        bias: (dim,), or None.
        activation: None or "silu".
        state_indices: (batch,) int32, the slot of each row, each slot at most once; negative = padding row: output 0,
            no state touched.  None: row i has slot i, and nslots must equal batch.
        backend: None for the automatic choice, or a backend's name.

    Returns:
        y, shaped and typed like x.

    Raises:
        ShapeError: sizes disagree, or state_len < width-1.
        DtypeError: a dtype outside the four, or state_indices that are not integers.
        ConfigError: an unknown activation.

    Numerics: products and sums in float32 (float64 for float64); the state keeps its dtype; deterministic.
    Cost: 2 * width flops per element of x; reads and writes the addressed states once.

    Example:
        >>> import torch, mmkernels
        >>> state, weight = torch.zeros(2, 8, 3), torch.randn(8, 4)
        >>> mmkernels.causal_conv1d_update(torch.randn(2, 8), state, weight).shape
        torch.Size([2, 8])

    Source: checked against causal_conv1d on the concatenated inputs.
    """
    direct = CAUSAL_CONV1D_UPDATE.direct(backend, x)
    if direct is not None and (activation is None or activation == "silu"):
        try:
            if state_indices is None and activation is not None:
                return direct(x, conv_state, weight, bias)
            return direct(x, conv_state, weight, bias, activation is not None, state_indices)
        except RuntimeError:
            pass  # nothing has changed: below it is said in words, or done in another way
    seen = _verified_updates.signature(x, conv_state, weight, bias, activation, state_indices)
    if seen not in _verified_updates:
        _check_update(x, conv_state, weight, bias, activation, state_indices)
        _verified_updates.add(seen)
    return CAUSAL_CONV1D_UPDATE(
        backend,
        {
            "x": x,
            "conv_state": conv_state,
            "weight": weight,
            "bias": bias,
            "activation": activation,
            "state_indices": state_indices,
        },
    )


def _check_update(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    state_indices: torch.Tensor | None,
) -> None:
    function = "causal_conv1d_update"
    sizes = Sizes(function)
    several = isinstance(x, torch.Tensor) and x.dim() == 3
    sizes.bind("x", x, "batch seqlen dim" if several else "batch dim", "One token is (batch, dim).")
    _check_filter(sizes, x, weight, bias, activation)
    slots = "batch" if state_indices is None else "nslots"
    sizes.bind(
        "conv_state", conv_state, f"{slots} dim state_len", "Rows of another batch are addressed by state_indices."
    )
    if sizes["state_len"] < sizes["history"]:
        raise ShapeError(
            f"{function}: conv_state must hold at least width-1 = {sizes['history']} inputs; got state_len="
            f"{sizes['state_len']}. Allocate it as (nslots, dim, width-1)."
        )
    if state_indices is not None:
        sizes.bind("state_indices", state_indices, "batch")
    floating(function, conv_state=conv_state)
    integer(function, state_indices=state_indices)
    same_device(function, x=x, conv_state=conv_state, weight=weight, bias=bias, state_indices=state_indices)


def _check_filter(
    sizes: Sizes, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None
) -> None:
    sizes.bind("weight", weight, "dim width", "The weight of an nn.Conv1d is (dim, 1, width): pass weight.squeeze(1).")
    if sizes["width"] < 1:
        raise ShapeError(f"{sizes.function}: weight must have width >= 1; got width=0. Give it at least one tap.")
    sizes.set(history=sizes["width"] - 1)
    if bias is not None:
        sizes.bind("bias", bias, "dim")
    floating(sizes.function, x=x, weight=weight, bias=bias)
    if activation is not None and activation != "silu":
        raise ConfigError(
            f"{sizes.function}: activation must be None or 'silu'; got {activation!r}. Apply others to the output."
        )


def _check_cu_seqlens(sizes: Sizes, x: torch.Tensor, cu_seqlens: torch.Tensor) -> None:
    sizes.bind("cu_seqlens", cu_seqlens, "boundaries")
    if x.shape[0] != 1:
        raise ShapeError(
            f"{sizes.function}: x must have batch 1 when cu_seqlens is given; got batch={x.shape[0]}. "
            "Concatenate the sequences along seqlen."
        )
    if sizes["boundaries"] < 1:
        raise ShapeError(
            f"{sizes.function}: cu_seqlens must hold n+1 boundaries; got an empty tensor. It starts with 0."
        )
    sizes.set(sequences=sizes["boundaries"] - 1)
