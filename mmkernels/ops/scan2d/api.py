"""Public functions ssd_scan_2d, causal_conv1d_2d and merged_gated_rms_norm: signatures, validation, dispatch.

The three parts of a state-space mixer that reads a grid in several directions (Vim, VMamba, ML-Mamba).
"""

import math
from collections.abc import Sequence

from torch import Tensor

from mmkernels._checks import Sizes, floating, same_device, same_dtype
from mmkernels._dispatch import Backend, Op
from mmkernels.errors import ConfigError, DtypeError, ShapeError
from mmkernels.ops.scan2d.crossing import check_reduction
from mmkernels.ops.scan2d.orders import parse_scans

# The integer 0 on purpose: torch.compile(dynamic=True) makes float defaults symbolic and then traces everything twice.
_NO_LIMIT = (0, math.inf)

_HERE = "mmkernels.ops.scan2d"


def _op(name: str, key: str) -> Op:
    return Op(
        name,
        key=key,
        public=f"{_HERE}.api.{name}",
        backends=[
            Backend("torch", f"{_HERE}._torch:{name}"),
            Backend("reference", f"{_HERE}.reference:{name}"),
        ],
    )


SSD_SCAN_2D = _op("ssd_scan_2d", "x")
CAUSAL_CONV1D_2D = _op("causal_conv1d_2d", "x")
MERGED_GATED_RMS_NORM = _op("merged_gated_rms_norm", "y")


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
    sizes.bind("A", A, "scans nheads", "Every direction has rates of its own.")
    _bind(sizes, "B", B, "seqlen ngroups dstate")
    _bind(sizes, "C", C, "seqlen ngroups dstate")
    sizes.divides("ngroups", "nheads", "Head h reads group h * ngroups // nheads of B and C.")
    if D is not None:
        per_channel = isinstance(D, Tensor) and D.dim() == 3
        sizes.bind("D", D, "scans nheads headdim" if per_channel else "scans nheads", "D has one row per direction.")
    if dt_bias is not None:
        sizes.bind("dt_bias", dt_bias, "scans nheads", "Every direction has a bias of its own.")
    if not isinstance(dt_limit, (tuple, list)) or len(dt_limit) != 2:
        raise DtypeError(
            f"{function}: dt_limit must be a pair of numbers (low, high); got {dt_limit!r}. "
            "Use (0.0, float('inf')) for no limit."
        )
    if not 0.0 <= dt_limit[0] <= dt_limit[1]:
        raise ShapeError(
            f"{function}: dt_limit must satisfy 0 <= low <= high; got {tuple(dt_limit)}. "
            "A negative step size would make the state grow; use (0.0, float('inf')) for no limit."
        )
    if chunk_size is not None and chunk_size < 1:
        raise ShapeError(
            f"{function}: chunk_size must be at least 1; got {chunk_size}. Leave it out for the backend's choice."
        )
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
    sizes.bind("weight", weight, "scans dim taps", "Every direction has filters of its own.")
    if weight.shape[2] < 1:
        raise ShapeError(
            f"{function}: weight must have at least one tap; got {tuple(weight.shape)}. Widen its filters."
        )
    if bias is not None:
        sizes.bind("bias", bias, "scans dim")
    if activation not in (None, "silu"):
        raise ConfigError(
            f"{function}: activation must be None or 'silu'; got {activation!r}. Apply others afterwards."
        )
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


def merged_gated_rms_norm(
    y: Tensor,
    weight: Tensor,
    *,
    z: Tensor | None = None,
    eps: float = 1e-5,
    group_size: int | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    r"""Gate and normalise what several directions made of a token, and merge it, in one pass.

    $$o = c \sum_{k=1}^{K} \mathrm{norm}(y_k \cdot \mathrm{silu}(z)) \cdot w, \qquad
      \mathrm{norm}(v) = v / \sqrt{\mathrm{mean}(v^2) + \varepsilon}$$

    with c = 1 / K (mean) or 1 (sum).  (Mamba-2, section 7, for each direction, then ML-Mamba's average.)

    Args:
        y: (batch, K, seqlen, dim), one slice for each direction, all in raster order, any strides.
        weight: (dim,), or (group_size,) shared by every group.
        z: (batch, seqlen, dim) the gate, common to all directions, or None.
        eps: added to the mean square.
        group_size: consecutive channels normalised together; must divide dim.  None: all of dim.
        reduction: "mean" or "sum" over the directions.
        backend: run on this backend or raise; default: the first able one.

    Returns:
        (batch, seqlen, dim) in the dtype of y.

    Raises:
        ConfigError: an unknown reduction.
        ShapeError: sizes disagree, no direction, or group_size does not divide dim.
        DtypeError: a dtype outside the four.
        DeviceError: the tensors live on different devices.

    Numerics: everything in float32 (float64 for float64), rounded once on output; directions are added first to last.
    Cost: one read of y and z and one write.

    Example:
        >>> import torch, mmkernels
        >>> y, z = torch.randn(2, 4, 9, 8), torch.randn(2, 9, 8)
        >>> mmkernels.merged_gated_rms_norm(y, torch.ones(8), z=z).shape
        torch.Size([2, 9, 8])

    Source: gated_rms_norm per direction; ML-Mamba, arXiv 2407.19832; checked against the formula in float64.
    """
    function = "merged_gated_rms_norm"
    sizes = Sizes(function)
    sizes.bind("y", y, "batch scans seqlen dim", "It holds one slice for each direction.")
    if sizes["scans"] < 1:
        raise ShapeError(f"{function}: y must hold at least one direction; got {tuple(y.shape)}. Give it one scan.")
    sizes.set(group_size=sizes["dim"] if group_size is None else group_size)
    sizes.divides("group_size", "dim", "Groups are equal slices of the channels.")
    if z is not None:
        sizes.bind("z", z, "batch seqlen dim", "The gate is common to all directions.")
    shared = isinstance(weight, Tensor) and tuple(weight.shape) == (sizes["group_size"],)
    sizes.bind(
        "weight", weight, "group_size" if shared else "dim", "One weight per channel, or one per channel of a group."
    )
    check_reduction(function, reduction)
    floating(function, y=y, weight=weight, z=z)
    same_device(function, y=y, weight=weight, z=z)
    if eps < 0:
        raise ShapeError(f"{function}: eps must be >= 0; got {eps}. The mean square plus eps goes under a root.")
    args = {
        "y": y,
        "weight": weight,
        "z": z,
        "eps": eps,
        "group_size": sizes["group_size"],
        "reduction": reduction,
    }
    out: Tensor = MERGED_GATED_RMS_NORM(backend, args)
    return out


def _bind(sizes: Sizes, name: str, value: Tensor, rest: str) -> None:
    """One for all directions, or one for each."""
    own = isinstance(value, Tensor) and value.dim() == len(rest.split()) + 2
    sizes.bind(
        name,
        value,
        f"batch {'scans ' if own else ''}{rest}",
        "A dimension of K before the tokens makes it per direction.",
    )
