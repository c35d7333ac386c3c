"""A Mamba-2 mixer that reads a grid of tokens in several directions, and shares all it can between them.

What is shared and what is not: ML-Mamba (arXiv 2407.19832) as its released code has it, not as its paper draws it.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmkernels._checks import Sizes
from mmkernels.errors import ShapeError
from mmkernels.layers import _mixing
from mmkernels.layers.norm import GatedRMSNorm
from mmkernels.ops.scan2d.api import conv_ssd_scan_2d
from mmkernels.ops.scan2d.crossing import check_reduction
from mmkernels.ops.scan2d.merge import merged_gated_rms_norm
from mmkernels.ops.scan2d.orders import parse_scan


class MultiDirectionalMamba2(nn.Module):
    """Mix the tokens of a grid: one projection, K convolutions and scans in as many directions, one merge.

    [z | xBC | dt] = W_in u, once;  for each direction k, in its order:  [x | B | C] = silu(conv_k(xBC)),
    y_k = SSD(x, softplus(dt + dt_bias_k), -exp(A_log_k), B, C) + D_k x,  o_k = RMSNorm(y_k silu(z)) w;
    out = W_out mean_k o_k                                                           (W_out sum_k o_k: merge="sum")

    Shared by the directions: W_in, the norm's weight w, W_out.  With scans ("raster", "raster_rev") this is the mixer
    of ML-Mamba's scan module; with four scans its cross-scan variant, which was never released (inferred: the order of
    VMamba).  With the single scan "raster" it is the Mamba-2 mixer.

    Args:
        d_model: channels of the input and the output.
        scans: kinds of `mmkernels.scan_permutation`, one for each direction.
        merge: "mean" or "sum" over the directions, after the norm.
        d_state: state size N of a head and channel.
        d_conv: taps of the causal convolutions.
        expand: inner channels are expand * d_model.
        headdim: channels of a head; divides expand * d_model.
        ngroups: groups of heads that share B and C; divides the heads.
        chunk_size: tokens per chunk of the scan; a matter of speed only.
        dt_limit: smallest and largest step size.
        norm_eps: of the gated RMSNorm.
        device: of the parameters.
        dtype: of the parameters; dt_bias, A_log and D are float32 at least.

    Example:
        >>> import torch
        >>> from mmkernels.layers import MultiDirectionalMamba2
        >>> mixer = MultiDirectionalMamba2(64, scans=("raster", "column"), headdim=16, d_state=16)
        >>> mixer(torch.randn(2, 12, 64), grid=(3, 4)).shape
        torch.Size([2, 12, 64])
    """

    def __init__(
        self,
        d_model: int,
        *,
        scans: Sequence[str] = ("raster", "raster_rev"),
        merge: str = "mean",
        d_state: int = 128,
        d_conv: int = 4,
        expand: int = 2,
        headdim: int = 64,
        ngroups: int = 1,
        chunk_size: int | None = None,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        layer = "MultiDirectionalMamba2"
        d_inner = expand * d_model
        _mixing.require_divides(layer, "headdim", headdim, "expand * d_model", d_inner)
        nheads = d_inner // headdim
        _mixing.require_divides(layer, "ngroups", ngroups, "nheads", nheads)
        check_reduction(layer, merge)
        self.scans = tuple(str(parse_scan(layer, scan)) for scan in scans)
        if not self.scans:
            raise ShapeError(
                f"{layer}: scans must hold at least one scan; got none. One way along the rows is 'raster'."
            )
        self.merge, self.d_model, self.d_inner, self.d_state, self.d_conv = merge, d_model, d_inner, d_state, d_conv
        self.nheads, self.headdim, self.ngroups = nheads, headdim, ngroups
        self.chunk_size, self.dt_limit = chunk_size, (float(dt_limit[0]), float(dt_limit[1]))
        self.conv_dim = d_inner + 2 * ngroups * d_state

        count = len(self.scans)
        self.in_proj = nn.Linear(d_model, d_inner + self.conv_dim + nheads, bias=False, device=device, dtype=dtype)
        self.conv_weight = nn.Parameter(torch.empty(count, self.conv_dim, d_conv, device=device, dtype=dtype))
        self.conv_bias = nn.Parameter(torch.empty(count, self.conv_dim, device=device, dtype=dtype))
        self.dt_bias = _mixing.scan_parameter((count, nheads), device, dtype)
        self.A_log = _mixing.scan_parameter((count, nheads), device, dtype)
        self.D = _mixing.scan_parameter((count, nheads), device, dtype)
        self.norm = GatedRMSNorm(d_inner, eps=norm_eps, group_size=d_inner // ngroups, device=device, dtype=dtype)
        self.out_proj = nn.Linear(d_inner, d_model, bias=False, device=device, dtype=dtype)
        self._reset_directions()

    def reset_parameters(self) -> None:
        """Draw every parameter again."""
        for module in (self.in_proj, self.norm, self.out_proj):
            module.reset_parameters()
        self._reset_directions()

    @torch.no_grad()
    def _reset_directions(self) -> None:
        """Filters are drawn for each direction; step sizes and rates once, and copied, so that no direction leads."""
        bound = self.d_conv**-0.5  # what nn.Conv1d draws a depthwise filter from
        nn.init.uniform_(self.conv_weight, -bound, bound)
        nn.init.uniform_(self.conv_bias, -bound, bound)
        _mixing.draw_dt_bias(self.dt_bias[0], 1e-3, 1e-1, 1e-4)
        _mixing.draw_log_uniform_rate(self.A_log[0], 1.0, 16.0)
        for parameter in (self.dt_bias, self.A_log):
            parameter.copy_(parameter[:1].expand_as(parameter).clone())
        nn.init.ones_(self.D)

    def forward(self, u: Tensor, grid: tuple[int, int]) -> Tensor:
        """Mix the tokens of a grid.

        Args:
            u: (batch, height * width, d_model), row by row.
            grid: (height, width).

        Returns:
            (batch, height * width, d_model).

        Raises:
            ShapeError: u has another width than d_model, or another number of tokens than the grid has cells.
        """
        sizes = Sizes("MultiDirectionalMamba2")
        sizes.set(d_model=self.d_model)
        sizes.bind("u", u, "batch seqlen d_model")
        height, width = grid
        z, xBC, dt = self.in_proj(u).split([self.d_inner, self.conv_dim, self.nheads], dim=-1)
        y = conv_ssd_scan_2d(
            xBC,
            dt,
            self.conv_weight,
            -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32))),
            conv_bias=self.conv_bias,
            headdim=self.headdim,
            ngroups=self.ngroups,
            scans=self.scans,
            height=height,
            width=width,
            D=self.D,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            dt_limit=self.dt_limit,
            chunk_size=self.chunk_size,
        )
        merged = merged_gated_rms_norm(
            y.flatten(-2),
            self.norm.weight,
            z=z,
            eps=self.norm.eps,
            group_size=self.norm.group_size,
            reduction=self.merge,
        )
        out: Tensor = self.out_proj(merged)
        return out

    def extra_repr(self) -> str:
        """Sizes for print(module)."""
        return (
            f"scans={self.scans}, merge={self.merge!r}, nheads={self.nheads}, headdim={self.headdim}, "
            f"d_state={self.d_state}, ngroups={self.ngroups}"
        )
