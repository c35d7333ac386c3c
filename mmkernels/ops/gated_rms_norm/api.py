"""Public function gated_rms_norm: signature, validation, dispatch.

The normalisation that closes a Mamba-2 mixer (arXiv 2405.21060, section 7) and, gated afterwards, an mmMamba mixer.
"""

import torch

from mmkernels import _triton
from mmkernels._checks import Sizes, Verified, floating, same_device
from mmkernels._dispatch import NATIVE_PROBE, Backend, Op
from mmkernels._gradients import untracked_transform
from mmkernels.errors import ShapeError

_HERE = "mmkernels.ops.gated_rms_norm"

GATED_RMS_NORM = Op(
    "gated_rms_norm",
    key="x",
    public="mmkernels.ops.gated_rms_norm.api.gated_rms_norm",
    backends=[
        Backend("native", f"{_HERE}._native:gated_rms_norm", ("cpu",), untracked_transform, NATIVE_PROBE),
        Backend("triton", f"{_HERE}._triton:gated_rms_norm", _triton.DEVICES, _triton.objections, _triton.PROBE),
        Backend("torch", f"{_HERE}._torch:gated_rms_norm"),
        Backend("reference", f"{_HERE}.reference:gated_rms_norm"),
    ],
)
_verified = Verified()


def gated_rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    z: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """Normalise groups of channels by their root mean square, with a SiLU gate before or after.

    With n(v) = v / sqrt(mean over the group of v^2 + eps):
    gate first (Mamba-2, the default) y = n(x * silu(z)) * weight + bias;
    norm_before_gate              y = (n(x) * weight + bias) * silu(z);
    z None: y = n(x) * weight + bias, plain RMSNorm.

    Args:
        x: (..., dim); float32, bfloat16, float16 or float64.
        weight: (dim,), or (group_size,) shared by every group.
        z: the gate, shaped like x, or None.
        bias: shaped like weight, or None.
        eps: added to the mean square.
        group_size: consecutive channels normalised together; must divide dim.  None: all of dim.
        norm_before_gate: where the gate goes.
        backend: None for the automatic choice, or a backend's name.

    Returns:
        y, shaped and typed like x.

    Raises:
        ShapeError: sizes disagree, or group_size does not divide dim.
        DtypeError: a dtype outside the four.

    Numerics: gate, statistics and products in float32 (float64 for float64), rounded once on output; deterministic.
    Cost: about 10 flops, and one read of x and z and one write per element.

    Example:
        >>> import torch, mmkernels
        >>> x, z = torch.randn(2, 16, 8), torch.randn(2, 16, 8)
        >>> mmkernels.gated_rms_norm(x, torch.ones(4), z=z, group_size=4).shape
        torch.Size([2, 16, 8])

    Source: Zhang and Sennrich, arXiv 1910.07467, equation 4, per group; checked against the formula in float64.
    """
    seen = _verified.signature(x, weight, z, bias, eps, group_size)
    if seen not in _verified:
        _check(x, weight, z, bias, eps, group_size)
        _verified.add(seen)
    return GATED_RMS_NORM(
        backend,
        {
            "x": x,
            "weight": weight,
            "z": z,
            "bias": bias,
            "eps": eps,
            "group_size": x.shape[-1] if group_size is None else group_size,
            "norm_before_gate": norm_before_gate,
        },
    )


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    z: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    group_size: int | None,
) -> None:
    function = "gated_rms_norm"
    sizes = Sizes(function)
    lead = " ".join(f"axis{i}" for i in range(x.dim() - 1)) if isinstance(x, torch.Tensor) else ""
    sizes.bind("x", x, f"{lead} dim", "It needs at least the channel dimension.")
    sizes.set(group_size=sizes["dim"] if group_size is None else group_size)
    sizes.divides("group_size", "dim", "Groups are equal slices of the channels.")
    if z is not None:
        sizes.bind("z", z, f"{lead} dim", "The gate has one value for each value of x.")
    shared = isinstance(weight, torch.Tensor) and tuple(weight.shape) == (sizes["group_size"],)
    sizes.bind(
        "weight", weight, "group_size" if shared else "dim", "One weight per channel, or one per channel of a group."
    )
    if bias is not None:
        sizes.bind("bias", bias, "group_size" if shared else "dim", "It is shaped like weight.")
    floating(function, x=x, weight=weight, z=z, bias=bias)
    same_device(function, x=x, weight=weight, z=z, bias=bias)
    if eps < 0:
        raise ShapeError(f"{function}: eps must be >= 0; got {eps}. The mean square plus eps goes under a root.")
