"""ML-Mamba's connector between image features and a language model: a 2-D scan of the patches, then an MLP.

arXiv 2407.19832, section 3.2.3; "msc_advanced" with the bidirectional scan is the one whose code was released, and is
parameter for parameter that.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels._checks import Sizes
from mmkernels.errors import ConfigError, ShapeError, nearest
from mmkernels.layers.multi_directional import MultiDirectionalMamba2

VARIANTS = ("mlp", "msc_basic", "msc_advanced")
SCANS = {
    "bidirectional": ("raster", "raster_rev"),
    "cross": ("raster", "column", "raster_rev", "column_rev"),
    "raster": ("raster",),
}


class SwiGLU(nn.Module):
    """W3 (silu(W1 x) * W2 x), all of one width and with biases."""

    def __init__(self, dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.w1 = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.w2 = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.w3 = nn.Linear(dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        out: Tensor = self.w3(F.silu(self.w1(x)) * self.w2(x))
        return out


class ScanLayer(nn.Module):
    """A mixer with its residual, and with `swiglu` another residual around LayerNorm and SwiGLU.

    With it the mixer reads the residual stream as it is (so the released code), and the norm belongs to the SwiGLU;
    without it the norm stands before the mixer.
    """

    def __init__(
        self,
        mixer: MultiDirectionalMamba2,
        *,
        swiglu: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.mixer = mixer
        self.norm = nn.LayerNorm(mixer.d_model, device=device, dtype=dtype)
        self.mlp = SwiGLU(mixer.d_model, device=device, dtype=dtype) if swiglu else None

    def forward(self, hidden: Tensor, grid: tuple[int, int]) -> Tensor:
        """(batch, height * width, d_model) -> the same."""
        if self.mlp is None:
            return hidden + self.mixer(self.norm(hidden), grid)
        hidden = hidden + self.mixer(hidden, grid)
        return hidden + self.mlp(self.norm(hidden))


class Mamba2ScanConnector(nn.Module):
    """Patch features to embeddings of a language model, through scans of the patch grid.

    h = GELU(W_e f);  num_layers times, msc_advanced:  h += Mixer(h), h += SwiGLU(LayerNorm(h));
                                        msc_basic:     h += Mixer(LayerNorm(h));
    h = LayerNorm(h);  out = W_3 GELU(W_2 GELU(W_1 h)), widths 4 D, D, D.
    "mlp" has neither layers nor the LayerNorm behind them.

    (ML-Mamba, section 3.2.3.  Released was msc_advanced; where the norm of msc_basic stands is inferred.)

    Args:
        in_dim: channels of the features, 2176 for DINOv2-L and SigLIP-SO400M side by side.
        hidden_dim: D, channels of the language model.
        variant: "mlp", "msc_basic" or "msc_advanced".
        scan: "bidirectional" (rows, both ways), "cross" (rows and columns, both ways), "raster" (rows), or kinds of
            `mmkernels.scan_permutation`.
        num_layers: scan layers.
        d_state: state size of the mixers.
        headdim: channels of a head of the mixers; divides expand * hidden_dim.
        d_conv: taps of their convolutions.
        expand: their inner channels are expand * hidden_dim.
        ngroups: groups of heads that share B and C.
        merge: "mean" or "sum" over the directions.
        device: of the parameters.
        dtype: of the parameters.

    Example:
        >>> import torch
        >>> from mmkernels.layers import Mamba2ScanConnector
        >>> connector = Mamba2ScanConnector(48, 64, variant="msc_advanced", scan="cross", headdim=16, d_state=16)
        >>> connector(torch.randn(2, 12, 48), grid=(3, 4)).shape
        torch.Size([2, 12, 64])
    """

    def __init__(
        self,
        in_dim: int,
        hidden_dim: int,
        *,
        variant: str = "msc_advanced",
        scan: str | Sequence[str] = "bidirectional",
        num_layers: int = 2,
        d_state: int = 128,
        headdim: int = 64,
        d_conv: int = 4,
        expand: int = 2,
        ngroups: int = 1,
        merge: str = "mean",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if variant not in VARIANTS:
            raise ConfigError(
                f"Mamba2ScanConnector: variant must be one of {', '.join(VARIANTS)}; got {variant!r}. "
                f"{nearest(str(variant), VARIANTS)}"
            )
        if num_layers < 1 and variant != "mlp":
            raise ConfigError(
                f"Mamba2ScanConnector: num_layers must be at least 1 for {variant}; got {num_layers}. "
                'Use variant="mlp" for a connector that does not scan.'
            )
        self.in_dim, self.hidden_dim, self.variant = in_dim, hidden_dim, variant
        self.scans = _scans(scan)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.entry = nn.Linear(in_dim, hidden_dim, **made)
        layers = 0 if variant == "mlp" else num_layers
        options: dict[str, Any] = {
            "d_state": d_state,
            "headdim": headdim,
            "d_conv": d_conv,
            "expand": expand,
            "ngroups": ngroups,
        }
        self.layers = nn.ModuleList(
            ScanLayer(
                MultiDirectionalMamba2(hidden_dim, scans=self.scans, merge=merge, **options, **made),
                swiglu=variant == "msc_advanced",
                **made,
            )
            for _ in range(layers)
        )
        self.norm_f = nn.LayerNorm(hidden_dim, eps=1e-5, **made) if layers else None
        self.projector = nn.Sequential(
            nn.Linear(hidden_dim, 4 * hidden_dim, **made),
            nn.GELU(),
            nn.Linear(4 * hidden_dim, hidden_dim, **made),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim, **made),
        )
        self._reset_projector()

    def reset_parameters(self) -> None:
        """Draw every parameter again."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.LayerNorm | MultiDirectionalMamba2):
                module.reset_parameters()
        self._reset_projector()

    @torch.no_grad()
    def _reset_projector(self) -> None:
        for module in self.projector:
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, features: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Map patch features to embeddings.

        Args:
            features: (batch, height * width, in_dim), row by row.
            grid: (height, width); may be None for variant "mlp", which does not look at it.

        Returns:
            (batch, height * width, hidden_dim).

        Raises:
            ShapeError: features have another width than in_dim, or the grid is missing or of another size.
        """
        out: Tensor = self.projector(self.mix(features, grid))
        return out

    def mix(self, features: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """All of `forward` but the projector, which maps every token by itself: tokens may be dropped in between.

        Args, Raises: as `forward`.

        Returns:
            (batch, height * width, hidden_dim).
        """
        sizes = Sizes("Mamba2ScanConnector")
        sizes.set(in_dim=self.in_dim)
        sizes.bind("features", features, "batch seqlen in_dim")
        hidden = F.gelu(self.entry(features))
        if self.norm_f is None:
            return hidden
        if grid is None:
            raise ShapeError(
                "Mamba2ScanConnector: grid must be (height, width) for a connector that scans; got None. "
                "A square image of 729 patches is (27, 27)."
            )
        for layer in self.layers:
            hidden = layer(hidden, grid)
        normed: Tensor = self.norm_f(hidden)
        return normed

    def extra_repr(self) -> str:
        """Options for print(module)."""
        return f"variant={self.variant!r}, scans={self.scans}"


def _scans(scan: str | Sequence[str]) -> tuple[str, ...]:
    if not isinstance(scan, str):
        return tuple(scan)
    if scan not in SCANS:
        raise ConfigError(
            f"Mamba2ScanConnector: scan must be {' or '.join(map(repr, SCANS))}, or a sequence of scans; got {scan!r}. "
            f"{nearest(scan, SCANS)}"
        )
    return SCANS[scan]
