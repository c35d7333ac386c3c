"""Any image to square tiles: pick the grid nearest to its shape, resize, cut row by row, normalise.

Source: the InternVL-style dynamic tiling that HoVLE and mmMamba use; tested against an exhaustive search.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmkernels.errors import ConfigError
from mmkernels.models.common.images import load_image

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ImageTiler:
    """Cut images into min_tiles..max_tiles squares, plus one square of the whole image when there are several.

    Among all grids of columns i x rows j with min_tiles <= i j <= max_tiles, in ascending order of i j, the one with
    the smallest |width / height - i / j| is kept; on an exact tie (float64) a later grid replaces it only if the image
    has more than half of that grid's pixels.  The image is resized to the grid (bicubic, its aspect is not kept).

    Args:
        tile_size: pixels along a side of a tile.
        min_tiles, max_tiles: bounds of the number of tiles, thumbnail not counted.
        use_thumbnail: append the whole image as a last tile when it was cut.
        image_mean, image_std: per channel; pixels in [0, 1] are shifted and scaled by them.

    Raises:
        ConfigError: bounds out of order, or sizes below 1.

    Example:
        >>> ImageTiler(max_tiles=6).grid(800, 400)
        (2, 1)
    """

    tile_size: int = 448
    min_tiles: int = 1
    max_tiles: int = 12
    use_thumbnail: bool = True
    image_mean: tuple[float, ...] = IMAGENET_MEAN
    image_std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        if not 1 <= self.min_tiles <= self.max_tiles:
            raise ConfigError(
                f"ImageTiler: min_tiles must lie between 1 and max_tiles; got {self.min_tiles} and {self.max_tiles}. "
                "Raise max_tiles."
            )
        if self.tile_size < 1:
            raise ConfigError(f"ImageTiler: tile_size must be at least 1; got {self.tile_size}. 448 is the model's.")
        if len(self.image_mean) != 3 or len(self.image_std) != 3 or min(self.image_std) <= 0:
            raise ConfigError(
                f"ImageTiler: image_mean and image_std must be three numbers, image_std positive; got "
                f"{self.image_mean} and {self.image_std}. (0, 0, 0) and (1, 1, 1) leave pixels in [0, 1]."
            )

    def candidates(self, max_tiles: int | None = None) -> list[tuple[int, int]]:
        """All (columns, rows) within the bounds, by ascending number of tiles."""
        most = self.max_tiles if max_tiles is None else max_tiles
        sides = range(1, most + 1)
        grids = [(i, j) for i in sides for j in sides if self.min_tiles <= i * j <= most]
        return sorted(grids, key=lambda grid: grid[0] * grid[1])

    def grid(self, width: int, height: int, max_tiles: int | None = None) -> tuple[int, int]:
        """(columns, rows) for an image of the given size; `max_tiles` overrides the bound for this image."""
        aspect, best, distance = width / height, (1, 1), float("inf")
        for columns, rows in self.candidates(max_tiles):
            off = abs(aspect - columns / rows)
            # the comparison is exact on purpose: rounding splits many mathematical ties, in the original as well
            large = width * height > 0.5 * self.tile_size * self.tile_size * columns * rows
            if off < distance or (off == distance and large):
                best, distance = (columns, rows), off
        return best

    def budget(self, images: int) -> int:
        """Tiles that each of several images of one prompt may use."""
        return max(self.min_tiles, self.max_tiles // max(images, 1), 1)

    def __call__(self, source: Any, max_tiles: int | None = None) -> torch.Tensor:
        """One image to (tiles, 3, tile_size, tile_size) float32, row-major, thumbnail last."""
        image, size = load_image(source), self.tile_size
        columns, rows = self.grid(image.width, image.height, max_tiles)
        whole = image.resize((size * columns, size * rows), Image.Resampling.BICUBIC)
        tiles = [
            whole.crop((size * i, size * j, size * (i + 1), size * (j + 1)))
            for j in range(rows)
            for i in range(columns)
        ]
        if self.use_thumbnail and len(tiles) > 1:
            tiles.append(image.resize((size, size), Image.Resampling.BICUBIC))
        pixels = np.stack([np.asarray(tile, dtype=np.float32) for tile in tiles]) / 255
        pixels = (pixels - np.array(self.image_mean, np.float32)) / np.array(self.image_std, np.float32)
        return torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
