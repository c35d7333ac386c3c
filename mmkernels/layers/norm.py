"""RMS normalisation as a module: the weight of `mmkernels.gated_rms_norm` and its fixed options."""

import torch
from torch import Tensor, nn

from mmkernels.ops.gated_rms_norm.api import gated_rms_norm


class GatedRMSNorm(nn.Module):
    """RMSNorm over groups of channels, optionally gated by silu(z); see `mmkernels.gated_rms_norm` for the formula.

    Args:
        dim: size of the weight: all channels, or group_size where the groups share it.
        eps: added to the mean square.
        group_size: consecutive channels normalised together; None: all of them.
        norm_before_gate: normalise, then gate (mmMamba), instead of gate, then normalise (Mamba-2).
        device: of the weight.
        dtype: of the weight.

    Example:
        >>> import torch
        >>> from mmkernels.layers import GatedRMSNorm
        >>> norm = GatedRMSNorm(64)
        >>> norm(torch.randn(2, 5, 64), torch.randn(2, 5, 64)).shape
        torch.Size([2, 5, 64])
    """

    def __init__(
        self,
        dim: int,
        *,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to ones."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """Normalise x (..., dim), gated by z (..., dim) if given; the result has x's shape and dtype."""
        return gated_rms_norm(
            x, self.weight, z=z, eps=self.eps, group_size=self.group_size, norm_before_gate=self.norm_before_gate
        )

    def extra_repr(self) -> str:
        """Sizes and options for print(module)."""
        return (
            f"{self.weight.shape[0]}, eps={self.eps}, group_size={self.group_size}, "
            f"norm_before_gate={self.norm_before_gate}"
        )
