"""Mixers of vision backbones on the Mamba-2 scan: every direction projects step sizes, B and C for itself.

Vim (arXiv 2401.09417, algorithm 1) and VMamba (arXiv 2401.10166, figure 5) with the scan of Mamba-2 (2405.21060) in the
place of Mamba-1's: one rate a head instead of one a channel and state.
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mmkernels._checks import Sizes
from mmkernels.errors import ShapeError
from mmkernels.layers import _mixing
from mmkernels.ops.scan2d.api import causal_conv1d_2d, ssd_scan_2d
from mmkernels.ops.scan2d.orders import parse_scan


class _DirectionalMixer(nn.Module):
    """What both have: [x | z] = W_in u, projections of x for each direction, K scans, W_out.

    Parameters: in_proj.weight (2 d_inner, d_model), x_proj (K, nheads + 2 ngroups d_state, d_inner) in the order
    dt, B, C, dt_bias, A_log and D (K, nheads), out_proj.weight (d_model, d_inner).
    """

    def __init__(
        self,
        d_model: int,
        *,
        scans: Sequence[str],
        d_state: int = 16,
        expand: int = 2,
        headdim: int = 64,
        ngroups: int = 1,
        chunk_size: int | None = None,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        layer, d_inner = type(self).__name__, expand * d_model
        _mixing.require_divides(layer, "headdim", headdim, "expand * d_model", d_inner)
        nheads = d_inner // headdim
        _mixing.require_divides(layer, "ngroups", ngroups, "nheads", nheads)
        self.scans = tuple(str(parse_scan(layer, scan)) for scan in scans)
        if not self.scans:
            raise ShapeError(
                f"{layer}: scans must hold at least one scan; got none. One way along the rows is 'raster'."
            )
        self.d_model, self.d_inner, self.d_state = d_model, d_inner, d_state
        self.nheads, self.headdim, self.ngroups = nheads, headdim, ngroups
        self.chunk_size, self.dt_limit = chunk_size, (float(dt_limit[0]), float(dt_limit[1]))
        count, projected = len(self.scans), nheads + 2 * ngroups * d_state
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=False, device=device, dtype=dtype)
        self.x_proj = nn.Parameter(torch.empty(count, projected, d_inner, device=device, dtype=dtype))
        self.dt_bias = _mixing.scan_parameter((count, nheads), device, dtype)
        self.A_log = _mixing.scan_parameter((count, nheads), device, dtype)
        self.D = _mixing.scan_parameter((count, nheads), device, dtype)
        self.out_proj = nn.Linear(d_inner, d_model, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw every parameter again."""
        for module in self.children():
            cast(nn.Linear, module).reset_parameters()
        bound = self.d_inner**-0.5  # what nn.Linear draws from
        nn.init.uniform_(self.x_proj, -bound, bound)
        _mixing.draw_dt_bias(self.dt_bias, 1e-3, 1e-1, 1e-4)
        _mixing.draw_log_uniform_rate(self.A_log, 1.0, 16.0)
        nn.init.ones_(self.D)

    def _open(self, u: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        sizes = Sizes(type(self).__name__)
        sizes.set(d_model=self.d_model)
        sizes.bind("u", u, "batch seqlen d_model")
        if grid[0] * grid[1] != sizes["seqlen"]:
            raise ShapeError(
                f"{type(self).__name__}: grid must have as many cells as u has tokens; got {tuple(grid)} and "
                f"{sizes['seqlen']} tokens. Give (height, width) of the patches, without [CLS]."
            )
        x, z = self.in_proj(u).chunk(2, dim=-1)
        return x, z

    def _scan(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """The sum over directions, (batch, seqlen, d_inner); x is (batch, [K,] seqlen, d_inner)."""
        own = "k " if x.dim() == 4 else ""
        projected = torch.einsum(f"b {own}l d, k e d -> b k l e", x, self.x_proj)
        state = self.ngroups * self.d_state
        dt, B, C = projected.split([self.nheads, state, state], dim=-1)
        y = ssd_scan_2d(
            rearrange(x, "... (h p) -> ... h p", p=self.headdim),
            dt,
            -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32))),
            rearrange(B, "... (g n) -> ... g n", n=self.d_state),
            rearrange(C, "... (g n) -> ... g n", n=self.d_state),
            scans=self.scans,
            height=grid[0],
            width=grid[1],
            D=self.D,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            dt_limit=self.dt_limit,
            chunk_size=self.chunk_size,
        )
        return y.sum(1).flatten(-2)

    def extra_repr(self) -> str:
        """Sizes for print(module)."""
        return f"scans={self.scans}, nheads={self.nheads}, headdim={self.headdim}, d_state={self.d_state}"


class VimMamba2(_DirectionalMixer):
    """Vim's mixer on the Mamba-2 scan: each direction has its own convolution, projections and rates.

    [x | z] = W_in u;  for each direction k, in its order:  x_k = silu(conv_k(x)),  [dt | B | C] = W_k x_k,
    y_k = SSD(x_k, softplus(dt + dt_bias_k), -exp(A_log_k), B, C) + D_k x_k;   out = W_out (sum_k y_k) silu(z)

    Shared by the directions: W_in, z, W_out.  Beside the parameters of all directional mixers: conv_weight
    (K, d_inner, d_conv) and conv_bias (K, d_inner).

    Args:
        d_model: channels of the input and the output.
        scans: kinds of `mmkernels.scan_permutation`, one for each direction.
        d_conv: taps of the causal convolutions.
        **options: d_state, expand, headdim, ngroups, chunk_size, dt_limit, device, dtype as in
            `MultiDirectionalMamba2` (d_state 16 by default, as in Vim).

    Example:
        >>> import torch
        >>> from mmkernels.layers import VimMamba2
        >>> VimMamba2(64, headdim=16)(torch.randn(2, 12, 64), grid=(3, 4)).shape
        torch.Size([2, 12, 64])

    Source: Vim, arXiv 2401.09417, algorithm 1; checked against its formula with permuted copies.
    """

    def __init__(
        self, d_model: int, *, scans: Sequence[str] = ("raster", "raster_rev"), d_conv: int = 4, **options: object
    ):
        self.d_conv = d_conv
        super().__init__(d_model, scans=scans, **options)  # type: ignore[arg-type]
        like = self.x_proj
        shape = (len(self.scans), self.d_inner)
        self.conv_weight = nn.Parameter(torch.empty(*shape, d_conv, device=like.device, dtype=like.dtype))
        self.conv_bias = nn.Parameter(torch.empty(shape, device=like.device, dtype=like.dtype))
        self._reset_filters()

    def _reset_filters(self) -> None:
        for parameter in (self.conv_weight, self.conv_bias):
            nn.init.uniform_(parameter, -(self.d_conv**-0.5), self.d_conv**-0.5)

    def reset_parameters(self) -> None:
        """Draw every parameter again."""
        super().reset_parameters()
        if hasattr(self, "conv_weight"):
            self._reset_filters()

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
        x, z = self._open(u, grid)
        x = causal_conv1d_2d(
            x, self.conv_weight, self.conv_bias, scans=self.scans, height=grid[0], width=grid[1], activation="silu"
        )
        out: Tensor = self.out_proj(self._scan(x, grid) * F.silu(z))
        return out


class SS2DMamba2(_DirectionalMixer):
    """VMamba's SS2D on the Mamba-2 scan: one convolution of the grid, four directions, a norm of their sum.

    [x | z] = W_in u;  x = silu(conv2d(x)), depthwise;  for each direction k:  [dt | B | C] = W_k x,
    y_k = SSD(x, softplus(dt + dt_bias_k), -exp(A_log_k), B, C) + D_k x;   out = W_out LayerNorm(sum_k y_k) silu(z)

    Beside the parameters of all directional mixers: conv2d (d_inner, 1, d_conv, d_conv) with bias, out_norm (d_inner).

    Args:
        d_model: channels of the input and the output.
        scans: kinds of `mmkernels.scan_permutation`; VMamba's four by default, in its order.
        d_conv: side of the depthwise filters, odd.
        norm_eps: of the LayerNorm.
        **options: d_state, expand, headdim, ngroups, chunk_size, dt_limit, device, dtype as in
            `MultiDirectionalMamba2` (d_state 16 by default, as in VMamba).

    Example:
        >>> import torch
        >>> from mmkernels.layers import SS2DMamba2
        >>> SS2DMamba2(64, headdim=16)(torch.randn(2, 12, 64), grid=(3, 4)).shape
        torch.Size([2, 12, 64])

    Source: VMamba, arXiv 2401.10166, section 4.3; checked against its formula with permuted copies.
    """

    def __init__(
        self,
        d_model: int,
        *,
        scans: Sequence[str] = ("raster", "column", "raster_rev", "column_rev"),
        d_conv: int = 3,
        norm_eps: float = 1e-5,
        **options: object,
    ):
        if d_conv < 1 or d_conv % 2 == 0:
            raise ShapeError(f"SS2DMamba2: d_conv must be odd; got {d_conv}. The filter is centred on its patch.")
        super().__init__(d_model, scans=scans, **options)  # type: ignore[arg-type]
        place = {"device": self.x_proj.device, "dtype": self.x_proj.dtype}
        self.conv2d = nn.Conv2d(
            self.d_inner,
            self.d_inner,
            d_conv,
            padding=d_conv // 2,
            groups=self.d_inner,
            **place,  # type: ignore[arg-type]
        )
        self.out_norm = nn.LayerNorm(self.d_inner, eps=norm_eps, **place)  # type: ignore[arg-type]

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
        x, z = self._open(u, grid)
        cells = rearrange(x, "b (i j) d -> b d i j", i=grid[0])
        x = rearrange(F.silu(self.conv2d(cells)), "b d i j -> b (i j) d")
        out: Tensor = self.out_proj(self.out_norm(self._scan(x, grid)) * F.silu(z))
        return out
