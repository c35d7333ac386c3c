import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest


def _idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def _write_folder(folder: Path, images: np.ndarray, labels: np.ndarray, *, packed: bool = False) -> Path:
    for split in ("train", "t10k"):
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            raw = _idx_bytes(array)
            path = folder / f"{split}-{name}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(raw) if packed else raw)
    return folder


@pytest.fixture
def idx_bytes() -> Callable[[np.ndarray], bytes]:
    return _idx_bytes


@pytest.fixture
def write_idx_folder() -> Callable[..., Path]:
    return _write_folder
