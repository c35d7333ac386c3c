"""Backend "triton" of the ops of this folder: the kernels of the one-dimensional scan and convolution, and the merge.

A direction is a row of those kernels that reads and writes its tokens where an order (int64, on the device) says, with
64-bit offsets: nothing is gathered, and one launch does all directions.  What directions share is expanded (stride 0).

Bytes beyond those of the one-dimensional ops, K directions of L tokens: the order, 8 L K for every head and tile that
reads it, from the second-level cache (the L K order entries of a grid are kilobytes).  Each direction reads the shared
inputs; an image fits that cache, so memory sees about one read.

Gradients of shared inputs: each direction writes its own, K times the input's size in the input's dtype, and autograd
adds them over the axis of directions in float32, in a fixed order: written once and read once, 2 s K L (H P + 2 G N)
bytes for x, B and C.  Adding them inside one kernel would need atomics or one program that walks all directions, since
a chunk of one direction holds tokens of many chunks of another.

conv_ssd_scan_2d is the convolution, then the scan.
"""

import torch
from torch import Tensor

from mmkernels import _triton
from mmkernels._gradients import wants_gradient
from mmkernels.ops.scan2d import _autograd
from mmkernels.ops.scan2d.directions import each
from mmkernels.ops.scan2d.orders import Scan, heads_and_keys, orders_of

_triton.require()
from mmkernels import _triton_math  # noqa: E402  (needs triton, which is known to be there only now)
from mmkernels.ops.causal_conv1d import _triton as convolution  # noqa: E402
from mmkernels.ops.scan2d import _triton_kernels as kernels  # noqa: E402
from mmkernels.ops.ssd import _triton_backward as scan_backward  # noqa: E402
from mmkernels.ops.ssd import _triton_forward as scan_forward  # noqa: E402
from mmkernels.ops.ssd._triton_call import prepare  # noqa: E402

_STRIPS = 512  # shares of the weight's gradient: some programs for every processor of the largest GPUs


def ssd_scan_2d(
    *,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    scans: tuple[Scan, ...],
    height: int,
    width: int,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    chunk_size: int | None,
) -> Tensor:
    """See mmkernels.ssd_scan_2d; chunk_size is a limit."""
    count = len(scans)
    orders = orders_of(scans, height, width, x.device)
    x, dt, B, C = each(x, count, 4), each(dt, count, 3), each(B, count, 4), each(C, count, 4)
    op = _scan_fwd if wants_gradient(x, dt, A, B, C, D, dt_bias) else _scan_inference
    low, high = float(dt_limit[0]), float(dt_limit[1])
    y: Tensor = op(x, dt, A, B, C, D, dt_bias, orders, dt_softplus, low, high, chunk_size or 0)
    return y


def _scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    orders: Tensor,
    softplus: bool,
    low: float,
    high: float,
    chunk_size: int,
) -> Tensor:
    limit = (low, high)
    call = prepare(x, dt, A, B, C, D, None, dt_bias, None, None, softplus, limit, chunk_size, False, order=orders)
    return scan_forward.forward(call, None, None)


def _scan_backward(
    grad_y: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    orders: Tensor,
    softplus: bool,
    low: float,
    high: float,
    chunk_size: int,
) -> tuple[Tensor, ...]:
    call = prepare(
        x, dt, A, B, C, D, None, dt_bias, None, None, softplus, (low, high), chunk_size, False,
        order=orders, backward=True,
    )  # fmt: skip
    grads = scan_backward.backward(call, grad_y, None, None)
    none = x.new_empty((0,), dtype=call.acc)
    return *grads[:5], none if D is None else grads[5], torch.empty_like(none) if dt_bias is None else grads[7]


def causal_conv1d_2d(
    *,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scans: tuple[Scan, ...],
    height: int,
    width: int,
    activation: str | None,
) -> Tensor:
    """See mmkernels.causal_conv1d_2d."""
    op = _convolution_fwd if wants_gradient(x, weight, bias) else _convolution_inference
    orders = orders_of(scans, height, width, x.device)
    y: Tensor = op(each(x, len(scans), 3), weight, bias, orders, activation == "silu")
    return y


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, orders: Tensor, silu: bool) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    convolution.Call(x, weight, bias, None, None, None, orders).forward(y, silu, False)
    return y


def _convolve_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, orders: Tensor, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    call = convolution.Call(x, weight, bias, None, None, None, orders)
    grad, silu = call.before_silu(grad_y, silu, False)
    return call.backward(grad, None, silu, False, True)


def conv_ssd_scan_2d(
    *,
    xBC: Tensor,
    dt: Tensor,
    conv_weight: Tensor,
    A: Tensor,
    headdim: int,
    ngroups: int,
    conv_bias: Tensor | None,
    activation: str | None,
    D: Tensor | None,
    dt_bias: Tensor | None,
    scans: tuple[Scan, ...],
    height: int,
    width: int,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    chunk_size: int | None,
) -> Tensor:
    """See mmkernels.conv_ssd_scan_2d: one part after the other, K directions of x, B and C in between."""
    convolved = causal_conv1d_2d(
        x=xBC,
        weight=conv_weight,
        bias=conv_bias,
        scans=scans,
        height=height,
        width=width,
        activation=activation,
    )
    x, B, C = heads_and_keys(convolved, A.shape[1], headdim, ngroups)
    return ssd_scan_2d(
        x=x,
        dt=dt,
        A=A,
        B=B,
        C=C,
        D=D,
        dt_bias=dt_bias,
        scans=scans,
        height=height,
        width=width,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
        chunk_size=chunk_size,
    )


def merged_gated_rms_norm(
    *, y: Tensor, weight: Tensor, z: Tensor | None, eps: float, group_size: int, reduction: str
) -> Tensor:
    """See mmkernels.merged_gated_rms_norm."""
    mean = reduction == "mean"
    if wants_gradient(y, weight, z):
        out: Tensor = _merge_fwd(y, weight, z, eps, group_size, mean)[0]
    else:
        out = _merge_inference(y, weight, z, eps, group_size, mean)
    return out


def _merge(y: Tensor, weight: Tensor, z: Tensor | None, eps: float, group_size: int, mean: bool) -> Tensor:
    return _merged(y, weight, z, None, eps, group_size, mean)


def _merge_and_keep(
    y: Tensor, weight: Tensor, z: Tensor | None, eps: float, group_size: int, mean: bool
) -> tuple[Tensor, Tensor]:
    rstd = y.new_empty((*y.shape[:-1], y.shape[-1] // group_size), dtype=_triton.accumulator(y.dtype))
    return _merged(y, weight, z, rstd, eps, group_size, mean), rstd


def _merged(
    y: Tensor, weight: Tensor, z: Tensor | None, rstd: Tensor | None, eps: float, group_size: int, mean: bool
) -> Tensor:
    batch, directions, seqlen, dim = y.shape
    out = y.new_empty((batch, seqlen, dim))
    groups = dim // group_size
    lines = batch * seqlen * groups
    config, whole = kernels.forward_config(group_size, directions)
    _triton.launch(
        kernels.forward_kernel,
        (-(-lines // config.blocks["LINES"]),),
        config,
        y,
        z,
        weight.contiguous(),
        out,
        rstd,
        lines,
        seqlen,
        groups,
        group_size,
        directions,
        *y.stride(),
        *((0, 0, 0) if z is None else z.stride()),
        group_size if weight.shape[0] == dim else 0,
        EPS=eps,
        SCALE=1.0 / directions if mean else 1.0,
        ACC=_triton_math.dtype(_triton.accumulator(y.dtype)),
        WHOLE=whole,
    )
    return out


def _merge_backward(
    grad_out: Tensor,
    y: Tensor,
    weight: Tensor,
    z: Tensor | None,
    rstd: Tensor,
    eps: float,
    group_size: int,
    mean: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, directions, seqlen, dim = y.shape
    rows, groups = batch * seqlen, dim // group_size
    config, whole = kernels.backward_config(group_size, directions)
    tiles = -(-rows // config.blocks["ROWS"])
    steps = max(1, -(-tiles * groups // _STRIPS)) if whole else 1
    strips = -(-tiles // steps)
    grad_y = y.new_empty(y.shape)
    grad_z = y.new_empty((0,)) if z is None else z.new_empty(z.shape)
    of_weight = y.new_empty((strips, groups, group_size), dtype=rstd.dtype)
    _triton.launch(
        kernels.backward_kernel,
        (strips * groups,),
        config,
        grad_out,
        y,
        z,
        weight.contiguous(),
        rstd,
        grad_y,
        None if z is None else grad_z,
        of_weight,
        rows,
        seqlen,
        groups,
        group_size,
        steps,
        directions,
        *grad_out.stride(),
        *y.stride(),
        *((0, 0, 0) if z is None else z.stride()),
        group_size if weight.shape[0] == dim else 0,
        SCALE=1.0 / directions if mean else 1.0,
        ACC=_triton_math.dtype(rstd.dtype),
        WHOLE=whole,
    )
    return grad_y, _triton_math.column_sums(of_weight, weight), grad_z


_SCANNED = "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, Tensor orders"
_OPTIONS = "bool dt_softplus, float dt_low, float dt_high, int chunk_size"
_scan_inference = _triton.define("ssd_scan_2d", f"({_SCANNED}, {_OPTIONS}) -> Tensor", _scan)
_scan_fwd = _triton.define("ssd_scan_2d_fwd", f"({_SCANNED}, {_OPTIONS}) -> Tensor", _scan)
_scan_bwd = _triton.define(
    "ssd_scan_2d_bwd", f"(Tensor grad_y, {_SCANNED}, {_OPTIONS}) -> ({', '.join(['Tensor'] * 7)})", _scan_backward
)
_autograd.register_scan(_scan_inference, _scan_fwd, _scan_bwd)

_CONVOLVED = "Tensor x, Tensor weight, Tensor? bias, Tensor orders, bool silu"
_convolution_inference = _triton.define("causal_conv1d_2d", f"({_CONVOLVED}) -> Tensor", _convolve)
_convolution_fwd = _triton.define("causal_conv1d_2d_fwd", f"({_CONVOLVED}) -> Tensor", _convolve)
_convolution_bwd = _triton.define(
    "causal_conv1d_2d_bwd", f"(Tensor grad_y, {_CONVOLVED}) -> (Tensor, Tensor, Tensor)", _convolve_backward
)
_autograd.register_convolution(_convolution_inference, _convolution_fwd, _convolution_bwd)

_NORMED = "Tensor y, Tensor weight, Tensor? z"
_HOW = "float eps, int group_size, bool mean"
_merge_inference = _triton.define("merged_gated_rms_norm", f"({_NORMED}, {_HOW}) -> Tensor", _merge)
_merge_fwd = _triton.define("merged_gated_rms_norm_fwd", f"({_NORMED}, {_HOW}) -> (Tensor, Tensor)", _merge_and_keep)
_merge_bwd = _triton.define(
    "merged_gated_rms_norm_bwd",
    f"(Tensor grad_out, {_NORMED}, Tensor rstd, {_HOW}) -> (Tensor, Tensor, Tensor)",
    _merge_backward,
)
_autograd.register_merge(_merge_inference, _merge_fwd, _merge_bwd)
