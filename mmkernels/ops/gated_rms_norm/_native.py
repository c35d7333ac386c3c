"""Backend "native" of gated_rms_norm: csrc/cpu/gated_rms_norm.cpp; its fakes and gradients are in _autograd.py."""

import torch
from torch import Tensor

from mmkernels import _native
from mmkernels._gradients import wants_gradient
from mmkernels.ops.gated_rms_norm import _autograd

_native.require()
_inference = torch.ops.mmkernels.gated_rms_norm.default
_fwd = torch.ops.mmkernels.gated_rms_norm_fwd.default
_bwd = torch.ops.mmkernels.gated_rms_norm_bwd.default
_autograd.register(_inference, _fwd, _bwd)


def gated_rms_norm(
    x: Tensor,
    weight: Tensor,
    z: Tensor | None,
    bias: Tensor | None,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
) -> Tensor:
    """See mmkernels.gated_rms_norm."""
    if z is not None and z.dtype != x.dtype:
        # The kernels read x and z in one dtype: the one that holds both exactly.
        common = torch.promote_types(x.dtype, z.dtype)
        return gated_rms_norm(x.to(common), weight, z.to(common), bias, eps, group_size, norm_before_gate).to(x.dtype)
    if wants_gradient(x, weight, z, bias):
        return _fwd(x, weight, z, bias, eps, group_size, norm_before_gate)[0]
    return _inference(x, weight, z, bias, eps, group_size, norm_before_gate)
