"""Public functions ssd_scan_2d, causal_conv1d_2d and conv_ssd_scan_2d: signatures, validation, dispatch.

The parts of a state-space mixer that reads a grid in several directions (Vim, VMamba, ML-Mamba); the merge is merge.py.
"""

import math
from collections.abc import Sequence

from torch import Tensor

from mmkernels import _triton
from mmkernels._checks import Sizes, floating, same_device, same_dtype
from mmkernels._dispatch import NATIVE_PROBE, Backend, Op
from mmkernels._gradients import untracked_transform
from mmkernels.errors import ConfigError, DtypeError, ShapeError
from mmkernels.ops.scan2d.orders import parse_scans

# The integer 0 on purpose: torch.compile(dynamic=True) makes float defaults symbolic and then traces everything twice.
_NO_LIMIT = (0, math.inf)

_HERE = "mmkernels.ops.scan2d"


def scan_op(name: str, key: str, module: str = "api") -> Op:
    """An op of this folder, with the backends that all of them have."""
    return Op(
        name,
        key=key,
        public=f"{_HERE}.{module}.{name}",
        backends=[
            Backend("native", f"{_HERE}._native:{name}", ("cpu",), untracked_transform, NATIVE_PROBE),
            Backend("triton", f"{_HERE}._triton:{name}", _triton.DEVICES, _triton.objections, _triton.PROBE),
            Backend("torch", f"{_HERE}._torch:{name}"),
            Backend("reference", f"{_HERE}.reference:{name}"),
        ],
    )


SSD_SCAN_2D = scan_op("ssd_scan_2d", "x")
CAUSAL_CONV1D_2D = scan_op("causal_conv1d_2d", "x")
CONV_SSD_SCAN_2D = scan_op("conv_ssd_scan_2d", "xBC")


def ssd_scan_2d(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    scans: Sequence[str],
    height: int,
    width: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = _NO_LIMIT,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Scan a grid of tokens in several directions, each a state-space recurrence with parameters of its own.

    With $\pi_k$ the order of scan $k$ (`scan_permutation`) and $\mathrm{SSD}_k$ the recurrence of `ssd_scan` with
    $A_k, D_k, dt\_bias_k$:

    $$y_k[\pi_k(t)] = \mathrm{SSD}_k(x \circ \pi_k,\ dt \circ \pi_k,\ B \circ \pi_k,\ C \circ \pi_k)[t]$$

    (VMamba, section 4.3, with the scan of Mamba-2, eq. 16.)  Inputs and outputs stay in raster order: the kernel reads
    and writes rows where they lie.

    Args:
        x: (batch, seqlen, nheads, headdim) read by every direction, or (batch, K, seqlen, nheads, headdim) one for
            each of the K directions; seqlen = height * width in raster order, any strides.
        dt: (batch, [K,] seqlen, nheads) step sizes, before bias and softplus; may have another float dtype than x.
        A: (K, nheads) decay rates, <= 0.
        B: (batch, [K,] seqlen, ngroups, dstate) input projections, x.dtype; ngroups divides nheads.
        C: (batch, [K,] seqlen, ngroups, dstate) output projections, x.dtype.
        scans: K kinds of `scan_permutation`, e.g. ("raster", "raster_rev"), ("column", "hilbert", "window:7").
        height: rows of the grid.
        width: columns of the grid.
        D: (K, nheads) or (K, nheads, headdim) skip weight.
        dt_bias: (K, nheads) added to dt before softplus.
        dt_softplus: apply softplus to dt + dt_bias.
        dt_limit: smallest and largest step size after softplus, 0 <= low <= high.
        chunk_size: tokens per chunk; a matter of speed only.
        backend: run on this backend or raise; default: the first able one.

    Returns:
        (batch, K, seqlen, nheads, headdim), raster order, x.dtype.  Merge with `merged_gated_rms_norm` or `sum(1)`.

    Raises:
        ConfigError: an unknown scan, or none.
        ShapeError: sizes disagree, or the grid has another number of cells than there are tokens.
        DtypeError: a dtype is not supported, or B, C differ from x in dtype.
        DeviceError: the tensors live on different devices.
        BackendError: the named backend cannot run the call.

    Numerics:
        Those of `ssd_scan`, direction by direction; gradients of shared inputs add the directions in order.
        Deterministic.

    Cost:
        K times `ssd_scan`.  Memory: the outputs; gradients of shared inputs take K times their size.

    Example:
        >>> import torch, mmkernels
        >>> x, dt, BC = torch.randn(1, 12, 4, 16), torch.rand(1, 12, 4), torch.randn(1, 12, 1, 8)
        >>> A = -torch.ones(2, 4)
        >>> mmkernels.ssd_scan_2d(x, dt, A, BC, BC, scans=("raster", "column"), height=3, width=4).shape
        torch.Size([1, 2, 12, 4, 16])

    Source:
        VMamba (arXiv 2401.10166) and ML-Mamba (2407.19832), scans of Mamba-2 (2405.21060); checked in float64.
    """
    function = "ssd_scan_2d"
    sizes = Sizes(function)
    sizes.set(scans=len(scans))
    _bind(sizes, "x", x, "seqlen nheads headdim")
    parsed = parse_scans(function, scans, height, width, sizes["seqlen"])
    _bind(sizes, "dt", dt, "seqlen nheads")
    _bind(sizes, "B", B, "seqlen ngroups dstate")
    _bind(sizes, "C", C, "seqlen ngroups dstate")
    sizes.divides("ngroups", "nheads", "Head h reads group h * ngroups // nheads of B and C.")
    _check_scan(sizes, A, D, dt_bias, dt_limit, chunk_size)
    floating(function, x=x, dt=dt, A=A, D=D, dt_bias=dt_bias)
    same_dtype(function, x=x, B=B, C=C)
    same_device(function, x=x, dt=dt, A=A, B=B, C=C, D=D, dt_bias=dt_bias)
    args = {
        "x": x,
        "dt": dt,
        "A": A,
        "B": B,
        "C": C,
        "D": D,
        "dt_bias": dt_bias,
        "scans": parsed,
        "height": height,
        "width": width,
        "dt_softplus": dt_softplus,
        "dt_limit": dt_limit,
        "chunk_size": chunk_size,
    }
    y: Tensor = SSD_SCAN_2D(backend, args)
    return y


def causal_conv1d_2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scans: Sequence[str],
    height: int,
    width: int,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Convolve a grid of tokens causally along each of several scans, every direction with filters of its own.

    $$y_k[\pi_k(t)] = \mathrm{act}\Big(b_k + \sum_{s=0}^{w-1} W_k[w-1-s] \; x[\pi_k(t - s)]\Big)$$

    with $\pi_k$ the order of scan $k$, and zeros before its first token: the convolution of a Mamba-2 mixer (its
    section 7) along the order of VMamba's section 4.3.  Inputs and outputs stay in raster order.

    Args:
        x: (batch, seqlen, dim) read by every direction, or (batch, K, seqlen, dim) one for each of K directions;
            seqlen = height * width in raster order, any strides.
        weight: (K, dim, width), weight[..., -1] multiplies the current token.
        bias: (K, dim), or None.
        scans: K kinds of `scan_permutation`.
        height: rows of the grid.
        width: columns of the grid.
        activation: None or "silu".
        backend: run on this backend or raise; default: the first able one.

    Returns:
        (batch, K, seqlen, dim), raster order, x.dtype.

    Raises:
        ConfigError: an unknown scan or activation.
        ShapeError: sizes disagree, or the grid has another number of cells than there are tokens.
        DtypeError: a dtype outside the four.
        DeviceError: the tensors live on different devices.

    Numerics: products and sums in float32 (float64 for float64), rounded once on output; deterministic.
    Cost: K times `causal_conv1d`; memory: the outputs.

    Example:
        >>> import torch, mmkernels
        >>> x, weight = torch.randn(2, 12, 8), torch.randn(2, 8, 4)
        >>> mmkernels.causal_conv1d_2d(x, weight, scans=("raster", "raster_rev"), height=3, width=4).shape
        torch.Size([2, 2, 12, 8])

    Source: checked against causal_conv1d on the gathered tokens, in float64.
    """
    function = "causal_conv1d_2d"
    sizes = Sizes(function)
    sizes.set(scans=len(scans))
    _bind(sizes, "x", x, "seqlen dim")
    parsed = parse_scans(function, scans, height, width, sizes["seqlen"])
    _check_filters(sizes, "weight", weight, "bias", bias, "dim", activation)
    floating(function, x=x, weight=weight, bias=bias)
    same_device(function, x=x, weight=weight, bias=bias)
    args = {
        "x": x,
        "weight": weight,
        "bias": bias,
        "scans": parsed,
        "height": height,
        "width": width,
        "activation": activation,
    }
    y: Tensor = CAUSAL_CONV1D_2D(backend, args)
    return y


def conv_ssd_scan_2d(
    xBC: Tensor,
    dt: Tensor,
    conv_weight: Tensor,
    A: Tensor,
    *,
    headdim: int,
    scans: Sequence[str],
    height: int,
    width: int,
    ngroups: int = 1,
    conv_bias: Tensor | None = None,
    activation: str | None = "silu",
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = _NO_LIMIT,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Convolve and scan a grid of tokens in several directions: `causal_conv1d_2d`, then `ssd_scan_2d`, as one op.

    $$[x_k | B_k | C_k] = \mathrm{act}(\mathrm{conv}_k(xBC \circ \pi_k)), \qquad
      y_k \circ \pi_k = \mathrm{SSD}_k(x_k,\ dt \circ \pi_k,\ B_k,\ C_k)$$

    (Mamba-2, section 7, along the orders of VMamba, section 4.3.)  For inference the native kernel convolves x as it
    reads it, so that no direction's x, B, C exists in memory.

    Args:
        xBC: (batch, seqlen, conv_dim) read by every direction, or (batch, K, seqlen, conv_dim); channels are
            [x: nheads * headdim | B: ngroups * dstate | C: ngroups * dstate], tokens in raster order.
        dt: (batch, [K,] seqlen, nheads) step sizes, before bias and softplus.
        conv_weight: (K, conv_dim, taps), conv_weight[..., -1] multiplies the current token.
        A: (K, nheads) decay rates, <= 0.
        headdim: channels of a head.
        scans: K kinds of `scan_permutation`.
        height: rows of the grid.
        width: columns of the grid.
        ngroups: groups of heads that share B and C; divides nheads.
        conv_bias: (K, conv_dim), or None.
        activation: of the convolution, None or "silu".
        D: (K, nheads) or (K, nheads, headdim) skip weight.
        dt_bias: (K, nheads) added to dt before softplus.
        dt_softplus: apply softplus to dt + dt_bias.
        dt_limit: smallest and largest step size after softplus, 0 <= low <= high.
        chunk_size: tokens per chunk; a matter of speed only.
        backend: run on this backend or raise; default: the first able one.

    Returns:
        (batch, K, seqlen, nheads, headdim), raster order, in the dtype of xBC.

    Raises:
        ConfigError: an unknown scan or activation.
        ShapeError: sizes disagree, or conv_dim is not nheads * headdim + 2 * ngroups * dstate for any dstate.
        DtypeError: a dtype is not supported.
        DeviceError: the tensors live on different devices.
        BackendError: the named backend cannot run the call.

    Numerics:
        Those of the two ops.  For inference the native kernel keeps the convolved x in float32; otherwise it is
        rounded to the dtype of xBC between them.

    Cost:
        K times convolution and scan.  Memory: the outputs and, for inference, one direction's B and C.

    Example:
        >>> import torch, mmkernels
        >>> xBC, dt, A = torch.randn(1, 12, 4 * 16 + 2 * 8), torch.rand(1, 12, 4), -torch.ones(2, 4)
        >>> where = {"scans": ("raster", "column"), "height": 3, "width": 4}
        >>> mmkernels.conv_ssd_scan_2d(xBC, dt, torch.randn(2, 80, 4), A, headdim=16, **where).shape
        torch.Size([1, 2, 12, 4, 16])

    Source:
        Mamba-2 (arXiv 2405.21060) and VMamba (2401.10166); checked against its two parts, in float64.
    """
    function = "conv_ssd_scan_2d"
    sizes = Sizes(function)
    sizes.set(scans=len(scans))
    _bind(sizes, "xBC", xBC, "seqlen conv_dim")
    parsed = parse_scans(function, scans, height, width, sizes["seqlen"])
    _bind(sizes, "dt", dt, "seqlen nheads")
    sizes.set(headdim=headdim, ngroups=ngroups)
    keys = sizes["conv_dim"] - sizes["nheads"] * headdim
    if headdim < 1 or ngroups < 1 or keys < 2 * ngroups or keys % (2 * ngroups) != 0:
        raise ShapeError(
            f"{function}: xBC must have nheads * headdim + 2 * ngroups * dstate channels; got {sizes['conv_dim']} with "
            f"nheads={sizes['nheads']}, headdim={headdim}, ngroups={ngroups}. Its channels are [x | B | C]."
        )
    _check_filters(sizes, "conv_weight", conv_weight, "conv_bias", conv_bias, "conv_dim", activation)
    _check_scan(sizes, A, D, dt_bias, dt_limit, chunk_size)
    floating(function, xBC=xBC, dt=dt, conv_weight=conv_weight, conv_bias=conv_bias, A=A, D=D, dt_bias=dt_bias)
    same_device(function, xBC=xBC, dt=dt, conv_weight=conv_weight, conv_bias=conv_bias, A=A, D=D, dt_bias=dt_bias)
    args = {
        "xBC": xBC,
        "dt": dt,
        "conv_weight": conv_weight,
        "A": A,
        "headdim": headdim,
        "ngroups": ngroups,
        "conv_bias": conv_bias,
        "activation": activation,
        "D": D,
        "dt_bias": dt_bias,
        "scans": parsed,
        "height": height,
        "width": width,
        "dt_softplus": dt_softplus,
        "dt_limit": dt_limit,
        "chunk_size": chunk_size,
    }
    y: Tensor = CONV_SSD_SCAN_2D(backend, args)
    return y


def _check_scan(
    sizes: Sizes,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_limit: tuple[float, float],
    chunk_size: int | None,
) -> None:
    """What every direction of a scan has for itself, and the options of all."""
    sizes.divides("ngroups", "nheads", "Head h reads group h * ngroups // nheads of B and C.")
    sizes.bind("A", A, "scans nheads", "Every direction has rates of its own.")
    if D is not None:
        per_channel = isinstance(D, Tensor) and D.dim() == 3
        sizes.bind("D", D, "scans nheads headdim" if per_channel else "scans nheads", "D has one row per direction.")
    if dt_bias is not None:
        sizes.bind("dt_bias", dt_bias, "scans nheads", "Every direction has a bias of its own.")
    if not isinstance(dt_limit, (tuple, list)) or len(dt_limit) != 2:
        raise DtypeError(
            f"{sizes.function}: dt_limit must be a pair of numbers (low, high); got {dt_limit!r}. "
            "Use (0.0, float('inf')) for no limit."
        )
    if not 0.0 <= dt_limit[0] <= dt_limit[1]:
        raise ShapeError(
            f"{sizes.function}: dt_limit must satisfy 0 <= low <= high; got {tuple(dt_limit)}. "
            "A negative step size would make the state grow; use (0.0, float('inf')) for no limit."
        )
    if chunk_size is not None and chunk_size < 1:
        raise ShapeError(
            f"{sizes.function}: chunk_size must be at least 1; got {chunk_size}. Leave it out for the backend's choice."
        )


def _check_filters(
    sizes: Sizes, name: str, weight: Tensor, bias_name: str, bias: Tensor | None, dim: str, activation: str | None
) -> None:
    """Filters and biases of every direction, at least one tap, a known activation."""
    sizes.bind(name, weight, f"scans {dim} taps", "Every direction has filters of its own.")
    if weight.shape[2] < 1:
        raise ShapeError(
            f"{sizes.function}: {name} must have at least one tap; got {tuple(weight.shape)}. Widen its filters."
        )
    if bias is not None:
        sizes.bind(bias_name, bias, f"scans {dim}", "Every direction has biases of its own.")
    if activation not in (None, "silu"):
        raise ConfigError(
            f"{sizes.function}: activation must be None or 'silu'; got {activation!r}. Apply others afterwards."
        )


def _bind(sizes: Sizes, name: str, value: Tensor, rest: str) -> None:
    """One for all directions, or one for each."""
    own = isinstance(value, Tensor) and value.dim() == len(rest.split()) + 2
    sizes.bind(
        name,
        value,
        f"batch {'scans ' if own else ''}{rest}",
        "A dimension of K before the tokens makes it per direction.",
    )
