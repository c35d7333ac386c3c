"""Received attention, matching and merging in Triton: planted faults, more tiles than one, ties."""

import pytest
import torch

from mmkernels import _triton
from mmkernels._triton import Config
from mmkernels.ops.token_pruning import _torch
from mmkernels.ops.token_pruning import _triton_merging as merging
from mmkernels.ops.token_pruning import _triton_received as received

DEVICE = "cpu" if _triton.interpreting() else "cuda"
COLUMN_FAULTS = {
    "sums of earlier tiles not scaled": ("sums * tl.exp2(largest - shift)", "sums"),
    "later keys seen": ("row[:, None] + (seqlen - rows)", "row[:, None] + (1 + seqlen - rows)"),
    "rows before the first that sees left out": ("tile * KEYS + rows - seqlen)", "tile * KEYS + 16 + rows - seqlen)"),
    "masked keys take their share": ("keep = seen[None, :]", "keep = (key < seqlen)[None, :]"),
    "rows that do not count are added": ("keep = counts[:, None] &", "keep = (row < rows)[:, None] &"),
    "rows that do not count are averaged over": ("chosen = tl.load(counts + b)", "chosen = b * 0 + rows"),
    "another key head": ("head // GROUP * k_head", "head * 0 * k_head"),
    "prefix scored": ("seqlen + prefix + token", "seqlen + token"),
}
MATCHING_FAULTS = {
    "the later of equal links first": ("j[None, :] < i[:, None]", "j[None, :] > i[:, None]", "ties"),
    "a later tile's equal cosine": ("better = top > best", "better = top >= best", "ties"),
    "a later column's equal cosine": ("j[None, :], 2147483647), 1)", "-j[None, :], 2147483647), 1) * -1", "ties"),
    "lengths of even places": ("products * scale[:, None]", "products", "plain"),
    "protected odd places": ("odd = 2 * (j + odds) + 1", "odd = 2 * j + 1", "protected"),
    "channels after the first ones": ("squares += tl.sum", "squares = tl.sum", "odd"),
    "another sample": ("m_batch + (token", "m_batch * 0 + (token", "plain"),
    "merged into a protected place": ("goes, other=0) + odds)", "goes, other=0))", "protected"),
}
MERGING_FAULTS = {
    "one of several": ("ordinal == m + 1", "ordinal == 1", "many"),
    "sizes of another sample": ("weights(sizes, b * tokens + member", "weights(sizes, member", "plain"),
    "the size of what stays": ("total = weights(sizes, b * tokens + stays", "total = weights(None, stays", "plain"),
    "gradients of another sample": ("line // tokens * width", "line * 0 * width", "one-each"),
    "sizes do not pull at the mean": ("own - pull / total", "own", "plain"),
    "differences from the wrong row": ("row - base), 1", "row), 1", "plain"),
}


@pytest.fixture
def small_tiles(monkeypatch):
    """Products in tiles of 16 by 16, as larger images are cut up."""

    def shrink():
        small = Config({"ROWS": 16, "KEYS": 16, "CHANNELS": 16})
        monkeypatch.setattr(received.kernels, "tiles_config", lambda *sizes: small)
        small_places = Config({"ROWS": 16, "COLUMNS": 16, "CHANNELS": 16})
        monkeypatch.setattr(merging.matching, "links_config", lambda *sizes: small_places)
        monkeypatch.setattr(merging.matching, "lengths_config", lambda dim: Config({"TOKENS": 64, "CHANNELS": 16}))

    return shrink


def columns_agree():
    """Whether the scores of several tiles are those of the torch backend: causal, masked, with a prefix, two heads."""
    draw = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, n, h, 8, generator=draw).to(DEVICE) for n, h in ((20, 2), (37, 2)))
    query_mask, key_mask = torch.arange(20) % 5 != 1, torch.arange(37) % 7 != 3
    args = (q, k, None, 0.9, 2, query_mask[None].to(DEVICE), key_mask[None].to(DEVICE), True)
    scores, slow = (module.attention_column_scores(*args) for module in (received, _torch))
    return bool(torch.allclose(scores, slow, rtol=1e-5, atol=1e-7))


def test_columns_of_several_tiles(small_tiles):
    small_tiles()
    assert columns_agree()


@pytest.mark.parametrize("fault", COLUMN_FAULTS)
def test_a_fault_in_received_attention_is_caught(plant, small_tiles, fault):
    plant(received, "kernels", *COLUMN_FAULTS[fault])
    small_tiles()
    assert not columns_agree()


@pytest.mark.parametrize("fault", MATCHING_FAULTS)
def test_a_fault_in_the_matching_is_caught(plant, caught, small_tiles, fault):
    old, new, case = MATCHING_FAULTS[fault]
    plant(merging, "matching", old, new)
    small_tiles()
    assert caught("bipartite_soft_matching", case)


@pytest.mark.parametrize("fault", MERGING_FAULTS)
def test_a_fault_in_the_merging_is_caught(plant, caught, fault):
    old, new, case = MERGING_FAULTS[fault]
    plant(merging, "merging", old, new)
    assert caught("merge_tokens", case)


def test_without_a_fault_nothing_is_caught(plant, caught, small_tiles):
    plant(merging, "matching", "evens", "evens")
    plant(merging, "merging", "ordinal", "ordinal")
    small_tiles()
    assert not caught("bipartite_soft_matching", "odd")
    assert not caught("merge_tokens", "many")


def test_neither_the_run_nor_the_batch_changes_a_bit():
    x = torch.randn(2, 21, 5, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    results = []
    for given in (x, x, x[1:]):
        plan = merging.bipartite_soft_matching(given, 8, 1, "raster")
        merged = merging.merge_tokens(given, *plan[:3], None)
        columns = received.attention_column_scores(
            given[:, :, None], given[:, :, None], None, 0.3, 1, None, None, False
        )
        results.append([t[-1] for t in (*plan, *merged, columns)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
