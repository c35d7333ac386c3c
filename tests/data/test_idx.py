import gzip

import numpy as np
import pytest

from mmkernels.data import read_idx, read_idx_folder
from mmkernels.errors import DataError


@pytest.fixture
def scans() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (40, 28, 28)), np.arange(40) % 10


@pytest.mark.parametrize("packed", [False, True])
def test_round_trip(tmp_path, scans, packed, write_idx_folder):
    images, labels = read_idx_folder(write_idx_folder(tmp_path, *scans, packed=packed), "test")
    np.testing.assert_array_equal(images, scans[0].astype(np.float32) / np.float32(255))
    np.testing.assert_array_equal(labels, scans[1])


def test_alternative_name(tmp_path, scans, write_idx_folder):
    write_idx_folder(tmp_path, *scans)
    (tmp_path / "train-images-idx3-ubyte").rename(tmp_path / "train-images.idx3-ubyte")
    assert len(read_idx_folder(tmp_path, "train")[0]) == 40


def test_missing_file_and_folder(tmp_path, scans, write_idx_folder):
    write_idx_folder(tmp_path, *scans)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte or .*\.gz"):
        read_idx_folder(tmp_path, "test")
    with pytest.raises(DataError, match="must be a directory"):
        read_idx_folder(tmp_path / "nowhere", "test")


def test_wrong_magic_swapped_files(tmp_path, scans, write_idx_folder):
    write_idx_folder(tmp_path, *scans)
    with pytest.raises(DataError, match=r"magic 0x00000803.*got 0x00000801"):
        read_idx(tmp_path / "train-labels-idx1-ubyte", 3)


@pytest.mark.parametrize(
    "change", [lambda raw: raw[:-1], lambda raw: raw + b"\0", lambda raw: raw[:3], lambda raw: b""]
)
def test_wrong_length(tmp_path, scans, change, idx_bytes):
    path = tmp_path / "labels"
    path.write_bytes(change(idx_bytes(scans[1])))
    with pytest.raises(DataError, match="must"):
        read_idx(path, 1)


@pytest.mark.parametrize("cut", [15, 400])
def test_damaged_gzip(tmp_path, scans, cut, idx_bytes):
    raw = gzip.compress(idx_bytes(scans[0]))
    path = tmp_path / "images.gz"
    path.write_bytes(raw[:cut])
    with pytest.raises(DataError, match="readable idx file"):
        read_idx(path, 3)
    path.write_bytes(raw[:200] + bytes(200) + raw[400:])
    with pytest.raises(DataError):
        read_idx(path, 3)


def test_counts_differ(tmp_path, scans, write_idx_folder, idx_bytes):
    write_idx_folder(tmp_path, *scans)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(scans[1][:-1]))
    with pytest.raises(DataError, match="40 images and 39 labels"):
        read_idx_folder(tmp_path, "train")
