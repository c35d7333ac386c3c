"""Public function merged_gated_rms_norm: what several directions made of a token becomes one."""

from torch import Tensor

from mmkernels._checks import Sizes, floating, same_device
from mmkernels.errors import ShapeError
from mmkernels.ops.scan2d.api import scan_op
from mmkernels.ops.scan2d.crossing import check_reduction

MERGED_GATED_RMS_NORM = scan_op("merged_gated_rms_norm", "y", "merge")


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
