"""Anything that is a picture to an RGB image, with errors that say what it was instead."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from mmkernels.errors import DataError


def load_image(source: Any) -> Image.Image:
    """Read a PIL image, a path, encoded bytes, or pixels as an array or tensor, and return it as RGB.

    Args:
        source: arrays are (height, width), (height, width, 1 | 3 | 4); tensors may also be channels-first.  Integers
            are 0..255, floats 0..1.

    Returns:
        An RGB image.

    Raises:
        DataError: the source is no image, is damaged, or is empty.
    """
    try:
        if isinstance(source, Image.Image):
            image = source
        elif isinstance(source, str | Path):
            image = Image.open(source)
        elif isinstance(source, bytes | bytearray):
            image = Image.open(io.BytesIO(source))
        elif isinstance(source, np.ndarray | torch.Tensor):
            image = Image.fromarray(_pixels(source))
        else:
            raise DataError(
                f"load_image: source must be an image, a path, bytes or an array; got {type(source).__name__}. "
                "Open it with PIL.Image.open."
            )
        image = image.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        shown = f"{len(source)} bytes" if isinstance(source, bytes | bytearray) else repr(source)
        raise DataError(
            f"load_image: source must be a readable image; got {shown} ({type(error).__name__}: {error}). "
            "Check that the file exists and is complete."
        ) from error
    if image.width == 0 or image.height == 0:
        raise DataError(f"load_image: source must have pixels; got size {image.size}. Leave the image out instead.")
    return image


def _pixels(source: np.ndarray | torch.Tensor) -> np.ndarray:
    array = source.detach().cpu().numpy() if isinstance(source, torch.Tensor) else source
    if isinstance(source, torch.Tensor) and array.ndim == 3 and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or array.size == 0:
        raise DataError(
            "load_image: an array must have shape (height, width) or (height, width, 1 | 3 | 4) and pixels; got "
            f"{tuple(source.shape)}. Pass one image at a time."
        )
    if array.dtype.kind == "f":
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise DataError(
                "load_image: a float array must lie in [0, 1]; got values outside it. Undo its normalisation first."
            )
        return (array * 255).round().astype(np.uint8)
    if array.dtype.kind not in "iub" or array.min() < 0 or array.max() > 255:
        raise DataError(
            f"load_image: an array must hold 0..255 or floats in [0, 1]; got {array.dtype} in [{array.min()}, "
            f"{array.max()}]. Convert it to uint8."
        )
    return array.astype(np.uint8)
