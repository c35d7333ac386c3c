"""PerceiverResampler: any number of patch features to a fixed number of image tokens.

Source: the Perceiver Resampler of Flamingo (arXiv 2204.14198, section 3.1.1) with the output projection of AKI.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from mmkernels.errors import ShapeError


class PerceiverAttention(nn.Module):
    """Latents attend to the features and to themselves: keys and values come from [LN(features); LN(latents)]."""

    def __init__(self, dim: int, heads: int, head_dim: int):
        super().__init__()
        self.heads = heads
        inner = heads * head_dim
        self.norm_media = nn.LayerNorm(dim)
        self.norm_latents = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, features: Tensor, latents: Tensor) -> Tensor:
        """(n, tokens, dim) features and (n, latents, dim) latents to (n, latents, dim)."""
        latents = self.norm_latents(latents)
        media = torch.cat([self.norm_media(features), latents], dim=1)
        key, value = rearrange(self.to_kv(media), "n t (two h d) -> two n h t d", two=2, h=self.heads)
        query = rearrange(self.to_q(latents), "n t (h d) -> n h t d", h=self.heads)
        mixed = F.scaled_dot_product_attention(query, key, value)  # scale head_dim^-1/2
        return self.to_out(rearrange(mixed, "n h t d -> n t (h d)"))


class PerceiverMLP(nn.Module):
    """LayerNorm, Linear, GELU (erf), Linear; no biases in the linear maps."""

    def __init__(self, dim: int, mult: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, mult * dim, bias=False)
        self.down = nn.Linear(mult * dim, dim, bias=False)

    def forward(self, latents: Tensor) -> Tensor:
        """(..., dim) to (..., dim)."""
        return self.down(F.gelu(self.up(self.norm(latents))))


class PerceiverLayer(nn.Module):
    """Attention and MLP, each added to its input."""

    def __init__(self, dim: int, heads: int, head_dim: int, mult: int):
        super().__init__()
        self.attention = PerceiverAttention(dim, heads, head_dim)
        self.mlp = PerceiverMLP(dim, mult)

    def forward(self, features: Tensor, latents: Tensor) -> Tensor:
        """(n, tokens, dim) features and (n, latents, dim) latents to (n, latents, dim)."""
        latents = latents + self.attention(features, latents)
        return latents + self.mlp(latents)


class PerceiverResampler(nn.Module):
    """A fixed number of tokens from any number of features, by learned queries that attend to them.

    l <- l + W_o softmax(q(l) k([x; l])^T / sqrt(head_dim)) v([x; l]);  l <- l + MLP(l), depth times;  out = W LN(l) + b

    Args:
        dim: width of the features and the latents.
        out_dim: width of the tokens.
        depth: layers.
        heads: attention heads.
        head_dim: their width; heads * head_dim need not be dim.
        num_latents: tokens made.
        ff_mult: width of the MLP over dim.

    Raises:
        ShapeError: from a call with features that are not (n, tokens, dim).

    Numerics: LayerNorms with eps 1e-5; features carry no positions of their own here, they have the tower's.
    Cost: O(num_latents * (tokens + num_latents)) attention per layer.

    Example:
        >>> PerceiverResampler(8, 16, depth=1, heads=2, head_dim=4, num_latents=3)(torch.randn(2, 9, 8)).shape
        torch.Size([2, 3, 16])

    Source: Flamingo, arXiv 2204.14198, section 3.1.1; checked against the written-out formula.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        *,
        depth: int = 6,
        heads: int = 8,
        head_dim: int = 64,
        num_latents: int = 144,
        ff_mult: int = 4,
    ):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(num_latents, dim))
        self.layers = nn.ModuleList(PerceiverLayer(dim, heads, head_dim, ff_mult) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.projection = nn.Linear(dim, out_dim)

    def forward(self, features: Tensor) -> Tensor:
        """(n, tokens, dim) to (n, num_latents, out_dim)."""
        if features.ndim != 3 or features.shape[2] != self.latents.shape[1]:
            raise ShapeError(
                f"PerceiverResampler: features must have shape (n, tokens, {self.latents.shape[1]}); got "
                f"{tuple(features.shape)}. Flatten images and frames into n."
            )
        latents = self.latents.expand(features.shape[0], -1, -1)
        for layer in self.layers:
            latents = layer(features, latents)
        return self.projection(self.norm(latents))
