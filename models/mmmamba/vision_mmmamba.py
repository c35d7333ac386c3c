"""Pixels to image tokens without a vision encoder: patch embedding, pixel shuffle, projection.

Source: HoVLE (arXiv 2412.16158); the order of the shuffled channels was checked against a direct index formula.
"""

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from mmkernels.errors import ShapeError
from mmkernels.models.mmmamba.configuration_mmmamba import MMMambaConfig


class MMMambaVisionEmbedding(nn.Module):
    """Non-overlapping patches through one convolution, plus a learned position per patch.

    Slot 0 of the table belonged to a class token that the published model never reads; it is kept so that checkpoints
    fit.  On another grid than the table's the positions are resampled (bicubic, in fp32); on the same grid they are
    used as they are.
    """

    def __init__(self, config: MMMambaConfig):
        super().__init__()
        self.patch_size, self.num_channels = config.patch_size, config.num_channels
        self.grid = config.image_size // config.patch_size
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.position_embedding = nn.Parameter(torch.zeros(1, 1 + self.grid**2, config.hidden_size))

    def positions(self, height: int, width: int) -> torch.Tensor:
        """The position table on a height x width grid of patches, (1, hidden, height, width)."""
        table = rearrange(self.position_embedding[:, 1:], "one (h w) c -> one c h w", h=self.grid)
        if (height, width) == (self.grid, self.grid):
            return table
        resampled = F.interpolate(table.float(), size=(height, width), mode="bicubic", align_corners=False)
        return resampled.to(table.dtype)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(n, channels, height, width) pixels to (n, hidden, height / patch_size, width / patch_size) patch tokens."""
        patch = self.patch_size
        shape = tuple(pixel_values.shape)
        if len(shape) != 4 or shape[1] != self.num_channels or shape[2] % patch or shape[3] % patch:
            raise ShapeError(
                f"MMMambaVisionEmbedding: pixel_values must have shape (tiles, {self.num_channels}, height, width), "
                f"height and width multiples of {patch}; got {shape}. Let MMMambaProcessor cut the tiles."
            )
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        return patches + self.positions(*patches.shape[-2:])


def pixel_shuffle(patches: torch.Tensor, factor: int) -> torch.Tensor:
    """Join each factor x factor block of patch tokens into one token, row-major over blocks and inside a block.

    out[n, R * (width / r) + C, (a * r + b) * hidden + c] = patches[n, c, R * r + a, C * r + b]

    Args:
        patches: (n, hidden, height, width).
        factor: r, dividing height and width.

    Returns:
        (n, height * width / r^2, hidden * r^2).

    Raises:
        ShapeError: the grid is not a multiple of r.
    """
    height, width = patches.shape[-2:]
    if height % factor or width % factor:
        raise ShapeError(
            f"pixel_shuffle: the patch grid must be a multiple of {factor}; got {height} x {width}. "
            "Resize the image, or use downsample_ratio 1.0."
        )
    return rearrange(patches, "n c (R a) (C b) -> n (R C) (a b c)", a=factor, b=factor)


class MMMambaProjector(nn.Module):
    """Pixel shuffle, then Linear - GELU - Linear into the width of the decoder."""

    def __init__(self, config: MMMambaConfig):
        super().__init__()
        self.factor = config.shuffle_factor
        self.linear_1 = nn.Linear(config.hidden_size * self.factor**2, config.hidden_size)
        self.linear_2 = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """(n, hidden, height, width) patch tokens to (n, height * width / r^2, hidden) image tokens."""
        return self.linear_2(F.gelu(self.linear_1(pixel_shuffle(patches, self.factor))))
