"""Reads MNIST-format idx files, raw or gzipped, and refuses damaged ones.

Source: the format note on the MNIST page: magic 0x00000803 (images) or 0x00000801 (labels), big-endian sizes, bytes.
"""

import gzip
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmkernels.errors import DataError

_MAGIC = {1: 0x801, 3: 0x803}
_SPLITS = {"train": "train", "test": "t10k"}


def read_idx(path: Path, ndim: int) -> NDArray[np.uint8]:
    """The array of one idx file of unsigned bytes.

    Args:
        path: the file; gzip is recognised by its first two bytes, not by the name.
        ndim: 1 for labels, 3 for images.

    Raises:
        DataError: the file is absent, damaged, of another kind, or shorter or longer than its header says.
    """
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"read_idx: path must be a readable idx file; got {path} ({error}). Fetch it again.") from error
    header = 4 + 4 * ndim
    magic = int.from_bytes(raw[:4], "big")
    if len(raw) < header or magic != _MAGIC[ndim]:
        raise DataError(
            f"read_idx: path must start with magic 0x{_MAGIC[ndim]:08x} ({ndim}-d unsigned bytes); got "
            f"0x{raw[:4].hex()} in {path}. Images and labels may be swapped, or the file is of another format."
        )
    shape = tuple(int.from_bytes(raw[at : at + 4], "big") for at in range(4, header, 4))
    expected = header + int(np.prod(shape, dtype=np.int64))
    if len(raw) != expected:
        raise DataError(
            f"read_idx: path must hold {expected} bytes for shape {shape}; got {len(raw)} in {path}. Fetch it again."
        )
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def _find(folder: Path, split: str, what: str) -> Path:
    stem = f"{_SPLITS[split]}-{what}"
    ndim = 3 if what == "images" else 1
    names = [f"{stem}-idx{ndim}-ubyte", f"{stem}.idx{ndim}-ubyte"]
    for name in [n + end for n in names for end in ("", ".gz")]:
        if (folder / name).is_file():
            return folder / name
    raise DataError(
        f"read_idx_folder: folder must contain {names[0]} or {names[0]}.gz; got {folder} without it. "
        "Point it at a folder with the four MNIST-format files."
    )


def read_idx_folder(folder: Path, split: str) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Images in [0, 1] of shape (count, height, width) and labels (count,) of one split of an MNIST-format folder.

    Args:
        folder: holds train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-... and t10k-labels-..., raw or .gz.
        split: "train" or "test".

    Raises:
        DataError: a file is missing or damaged, or images and labels differ in number.
    """
    if not folder.is_dir():
        raise DataError(f"read_idx_folder: folder must be a directory; got {folder}. Check the path.")
    images = read_idx(_find(folder, split, "images"), 3)
    labels = read_idx(_find(folder, split, "labels"), 1)
    if len(images) != len(labels):
        raise DataError(
            f"read_idx_folder: images and labels must be as many; got {len(images)} images and {len(labels)} labels "
            f"in split {split!r} of {folder}. The files are from different data sets."
        )
    return images.astype(np.float32) / np.float32(255), labels.astype(np.int64)
