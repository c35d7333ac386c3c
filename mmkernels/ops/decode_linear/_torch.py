"""Backend "torch" of decode_linear: torch's own matrix product, in one dtype that holds every operand exactly."""

import torch
import torch.nn.functional as F
from torch import Tensor


def decode_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See mmkernels.decode_linear."""
    if x.dtype == weight.dtype and (bias is None or bias.dtype == x.dtype):
        return F.linear(x, weight, bias)
    acc = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    return F.linear(x.to(acc), weight.to(acc), None if bias is None else bias.to(acc)).to(x.dtype)
