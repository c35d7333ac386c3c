"""Public function mamba2_step: signature, validation, dispatch.

One token through a whole Mamba-2 block (arXiv 2405.21060, section 7.1) in one call: at small sizes a step in six calls
spends more time between them than inside.
"""

from typing import Any

import torch

from mmkernels._checks import Sizes, Verified, floating, same_device, same_dtype
from mmkernels._dispatch import NATIVE_PROBE, Backend, Op
from mmkernels._gradients import no_gradient_in_place
from mmkernels.errors import DtypeError, ShapeError

_HERE = "mmkernels.ops.mamba2_step"
_FLOAT64_TOGETHER = (
    "hidden",
    "conv_state",
    "ssm_state",
    "in_weight",
    "out_weight",
    "residual",
    "norm_weight",
    "in_bias",
    "conv_bias",
    "gate_weight",
    "out_bias",
)


def _declines(**args: Any) -> list[str]:
    """Why the native backend declines: gradients, float64 mixed with others, a state it cannot walk."""
    reasons = no_gradient_in_place(**args)
    wide = args["hidden"].dtype == torch.float64
    for name in _FLOAT64_TOGETHER:
        value = args[name]
        if value is not None and (value.dtype == torch.float64) != wide:
            reasons.append(f"{name} is {value.dtype} and hidden {args['hidden'].dtype}: float64 goes with float64 only")
    if args["ssm_state"].shape[-1] > 1 and args["ssm_state"].stride(-1) != 1:
        reasons.append("the last dimension of ssm_state is not dense")
    return reasons


MAMBA2_STEP = Op(
    "mamba2_step",
    key="hidden",
    public="mmkernels.ops.mamba2_step.api.mamba2_step",
    backends=[
        Backend("native", f"{_HERE}._native:mamba2_step", ("cpu",), _declines, NATIVE_PROBE),
        Backend("torch", f"{_HERE}._torch:mamba2_step"),
        Backend("reference", f"{_HERE}.reference:mamba2_step"),
    ],
)
_verified = Verified()


def mamba2_step(
    hidden: torch.Tensor,
    conv_state: torch.Tensor,
    ssm_state: torch.Tensor,
    in_weight: torch.Tensor,
    conv_weight: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    D: torch.Tensor,
    out_weight: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    in_bias: torch.Tensor | None = None,
    conv_bias: torch.Tensor | None = None,
    gate_weight: torch.Tensor | None = None,
    out_bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    gate_eps: float = 1e-5,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    norm_before_gate: bool = False,
    residual_in_fp32: bool = True,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""Take one token per row through a Mamba-2 block, both states updated in place.

    $$r \leftarrow r + h, \quad [z\,|\,xBC\,|\,\Delta] = W_{in}\,\mathrm{rms}(r), \quad
      [x\,|\,B\,|\,C] = \mathrm{silu}(\mathrm{conv}(xBC)), \quad
      S \leftarrow e^{-e^{A_{log}} \hat\Delta} S + \hat\Delta\, x B^\top, \quad
      out = W_{out}\,\mathrm{norm}((S C + D x)\,\mathrm{silu}(z))$$

    with $\hat\Delta = \mathrm{clamp}(\mathrm{softplus}(\Delta + b_\Delta))$ (arXiv 2405.21060, eq. 16).
    Sizes: d_inner = nheads headdim; conv_dim = d_inner + 2 ngroups dstate, in the order x, B, C.

    Args:
        hidden: (batch, d_model), the output of the block before, or the mixer's input if norm_weight is None.
        conv_state: (batch, conv_dim, width-1 or more), the last raw inputs of the convolution; updated IN PLACE.
        ssm_state: (batch, nheads, headdim, dstate); updated IN PLACE.
        in_weight: (d_inner + conv_dim + nheads, d_model), in the order z, xBC, dt.
        conv_weight: (conv_dim, width) or, as in an nn.Conv1d, (conv_dim, 1, width).
        A_log: (nheads,), the logarithm of the decay rates.
        dt_bias: (nheads,), added to the step sizes before softplus.
        D: (nheads,) or (nheads, headdim), the skip weight.
        out_weight: (d_model, d_inner), in in_weight's dtype.
        residual: (batch, d_model), the running sum before this block; None: 0.
        norm_weight: (d_model,), of the RMS norm that opens the block; None: no residual and no norm, just the mixer.
        in_bias: (d_inner + conv_dim + nheads,) or None.
        conv_bias: (conv_dim,) or None.
        gate_weight: (d_inner,), of the gated norm in groups of d_inner / ngroups; None: y silu(z) without a norm.
        out_bias: (d_model,) or None.
        eps: of the norm that opens the block.
        gate_eps: of the gated norm.
        dt_limit: smallest and largest step size.
        norm_before_gate: norm(y) silu(z) instead of norm(y silu(z)).
        residual_in_fp32: keep the running sum at least in float32.
        backend: None for the automatic choice, or a backend's name.

    Returns:
        out (batch, d_model) in the weights' dtype; with norm_weight (out, the new running sum).

    Raises:
        ShapeError: sizes disagree, or the convolution has no room for whole groups.
        DtypeError: a dtype outside the four; in_weight and out_weight differ, or hidden without a norm.
        DeviceError: the tensors live on different devices.

    Numerics: arithmetic in float32 (float64 for float64).  The torch backend rounds what its parts hand on to the
        weights' dtype; the native one keeps it in float32 and rounds results and states once.  Deterministic.
    Cost: 2 flops a weight and 5 an element of ssm_state for each row; weights and states are read once.

    Example:
        >>> import torch, mmkernels
        >>> from mmkernels.layers import Mamba2Mixer
        >>> m = Mamba2Mixer(16, headdim=4, d_state=8).requires_grad_(False)
        >>> weights = (m.in_proj.weight, m.conv1d.weight, m.A_log, m.dt_bias, m.D, m.out_proj.weight)
        >>> mmkernels.mamba2_step(torch.randn(2, 16), *m.init_states(2), *weights).shape
        torch.Size([2, 16])

    Source: checked against the formula in float64, and step by step against `Mamba2Mixer.forward`.
    """
    args = {
        "hidden": hidden,
        "conv_state": conv_state,
        "ssm_state": ssm_state,
        "in_weight": in_weight,
        "conv_weight": conv_weight,
        "A_log": A_log,
        "dt_bias": dt_bias,
        "D": D,
        "out_weight": out_weight,
        "residual": residual,
        "norm_weight": norm_weight,
        "in_bias": in_bias,
        "conv_bias": conv_bias,
        "gate_weight": gate_weight,
        "out_bias": out_bias,
        "eps": eps,
        "gate_eps": gate_eps,
        "dt_limit": dt_limit,
        "norm_before_gate": norm_before_gate,
        "residual_in_fp32": residual_in_fp32,
    }
    seen = _verified.signature(*args.values())
    if seen not in _verified:
        _check_shapes(args)
        _check_kinds(args)
        _verified.add(seen)
    out, total = MAMBA2_STEP(backend, args)
    return out if norm_weight is None else (out, total)


_LAYOUTS = {
    "in_weight": "d_inner+conv_dim+nheads d_model",
    "A_log": "nheads",
    "dt_bias": "nheads",
    "out_weight": "d_model d_inner",
    "residual": "batch d_model",
    "norm_weight": "d_model",
    "in_bias": "d_inner+conv_dim+nheads",
    "conv_bias": "conv_dim",
    "gate_weight": "d_inner",
    "out_bias": "d_model",
}


def _check_shapes(args: dict[str, Any]) -> None:
    function = "mamba2_step"
    sizes = Sizes(function)
    sizes.bind("hidden", args["hidden"], "batch d_model", "One token a row; use Mamba2Mixer.forward for several.")
    sizes.bind("ssm_state", args["ssm_state"], "batch nheads headdim dstate")
    conv = args["conv_weight"]
    from_module = isinstance(conv, torch.Tensor) and conv.dim() == 3
    sizes.bind("conv_weight", conv, "conv_dim 1 width" if from_module else "conv_dim width")
    inner = sizes["nheads"] * sizes["headdim"]
    group = max(2 * sizes["dstate"], 1)  # channels of B and C that a group has
    groups = (sizes["conv_dim"] - inner) // group
    if groups * group != sizes["conv_dim"] - inner or groups < 1 or sizes["nheads"] % groups != 0:
        raise ShapeError(
            f"{function}: conv_weight must have d_inner + 2 ngroups dstate rows, with ngroups a divisor of nheads; got "
            f"conv_dim={sizes['conv_dim']}, d_inner={inner}, dstate={sizes['dstate']}, nheads={sizes['nheads']}. "
            "Its channels are x, B and C."
        )
    sizes.set(d_inner=inner, **{"d_inner+conv_dim+nheads": inner + sizes["conv_dim"] + sizes["nheads"]})
    sizes.bind("conv_state", args["conv_state"], "batch conv_dim state_len")
    if sizes["width"] < 1 or sizes["state_len"] < sizes["width"] - 1:
        raise ShapeError(
            f"{function}: conv_state must hold at least width-1 inputs and width be at least 1; got state_len="
            f"{sizes['state_len']}, width={sizes['width']}. Allocate it as (batch, conv_dim, width-1)."
        )
    for name, layout in _LAYOUTS.items():
        if args[name] is not None or name in ("in_weight", "A_log", "dt_bias", "out_weight"):
            sizes.bind(name, args[name], layout)
    per_channel = isinstance(args["D"], torch.Tensor) and args["D"].dim() == 2
    sizes.bind("D", args["D"], "nheads headdim" if per_channel else "nheads", "D is (nheads,) or (nheads, headdim).")
    if args["residual"] is not None and args["norm_weight"] is None:
        raise ShapeError(
            f"{function}: residual must come with norm_weight; got none. Without a norm there is no running sum."
        )


def _check_kinds(args: dict[str, Any]) -> None:
    function = "mamba2_step"
    tensors = {name: value for name, value in args.items() if isinstance(value, torch.Tensor)}
    floating(function, **tensors)
    same_device(function, **tensors)
    same_dtype(function, in_weight=args["in_weight"], out_weight=args["out_weight"])
    if args["norm_weight"] is None:
        same_dtype(function, in_weight=args["in_weight"], hidden=args["hidden"])
    limit = args["dt_limit"]
    if not isinstance(limit, (tuple, list)) or len(limit) != 2:
        raise DtypeError(
            f"{function}: dt_limit must be a pair of numbers (low, high); got {limit!r}. Use (0.0, float('inf'))."
        )
    if not 0.0 <= limit[0] <= limit[1]:
        raise ShapeError(
            f"{function}: dt_limit must satisfy 0 <= low <= high; got {tuple(limit)}. "
            "A negative step size would make the state grow; use (0.0, float('inf')) for no limit."
        )
    for name in ("eps", "gate_eps"):
        if args[name] < 0:
            raise ShapeError(f"{function}: {name} must be >= 0; got {args[name]}. It is added under a root.")
