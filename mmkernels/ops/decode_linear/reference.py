"""The oracle of decode_linear: y_o = sum_i x_i W_oi + b_o, row after row."""

import torch
from torch import Tensor


def decode_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See mmkernels.decode_linear."""
    acc = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    rows = [(weight.to(acc) * row).sum(-1) for row in x.to(acc).reshape(-1, x.shape[-1])] if x.numel() else []
    y = torch.stack(rows) if rows else x.new_zeros((x[..., 0:0].sum(-1).numel(), weight.shape[0]), dtype=acc)
    if bias is not None:
        y = y + bias.to(acc)
    return y.reshape(*x.shape[:-1], weight.shape[0]).to(x.dtype)
