"""cls_attention_scores and prune_tokens in Triton: planted faults, scores at the edges, samples longer than a block."""

import pytest
import torch

from mmkernels import _triton
from mmkernels._triton import Config
from mmkernels.ops.token_pruning import _torch
from mmkernels.ops.token_pruning import _triton as backend
from mmkernels.testing import CASES
from mmkernels.testing.contract import check_error_bar

DEVICE = "cpu" if _triton.interpreting() else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SCORE_FAULTS = {
    "prefix scored": ("+ prefix + token", "+ token", "one-head"),
    "tiles with equal weights": ("tops - top)", "tops - tops)", "clip"),
    "keys that do not exist": ('tl.where(inside, products, float("-inf"))', "products", "odd"),
    "another query head": ("kv * GROUP + n % GROUP", "kv + n % GROUP", "shared-keys"),
    "another key head": ("kv * k_head", "kv * 0 * k_head", "shared-keys"),
    "another sample": ("b * k_batch", "b * 0 * k_batch", "no-prefix"),
    "one query row": ("row * q_row", "row * 0 * q_row", "no-prefix"),
    "scale": (", 1) * scale", ", 1)", "shared-keys"),
    "weight and mean": ("total * share", "total", "no-prefix"),
    "lse of another head": ("head * l_head", "head * 0 * l_head", "lse"),
    "lse of another row": ("row * l_row", "row * 0 * l_row", "lse"),
}
SELECT_FAULTS = {
    "ties to the higher index": ("<= wanted)", "< wanted)", "ties"),
    "a slot skipped": ("stays.to(tl.int32), 0) - 1", "stays.to(tl.int32), 0)", "per-sample"),
    "one count for all": ("tl.load(counts + b)", "tl.load(counts)", "per-sample"),
    "packed from the front": ("tl.load(before + b)", "tl.load(before)", "per-sample-packed"),
    "masked tokens kept": ("fit = fit & (tl.load(mask", "fit = fit | (tl.load(mask", "masked"),
    "positions of another sample": ("position_ids += b * seqlen", "position_ids += 0", "masked"),
    "features of another sample": ("b * f_batch +", "", "plain"),
    "padding not written": ("(slot < room)", "(slot < slots)", "per-sample"),
    "rank of negative scores": ("key = bits ^ ((bits >> 31) & 0x7FFFFFFF)", "key = bits", None),
    "negative zero": ("key = tl.where(value == 0.0, 0, key)", "key = key", None),
    "NaN": ("key = tl.where(value == value, key, lowest + (1 << LOW))", "key = key", None),
    "the last digit": ("(BITS - LOW) // STEP)", "(BITS - LOW) // STEP - 1)", None),
}
BLOCKWISE_FAULTS = {
    "blocks after the first not counted": ("above += tl.sum(((other", "above += 0 * tl.sum(((other"),
    "ties of earlier blocks forgotten": ("equals += tl.sum(equal, 0)", "equals += 0"),
    "slots of earlier blocks forgotten": ("slots += tl.sum(stays.to(tl.int32), 0)", "slots += 0"),
}


def edges(dtype):
    """Two samples of scores where comparing bits goes wrong, with ties: infinities, both zeros and NaN, subnormals."""
    info = torch.finfo(dtype)
    special = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), -float("nan"), info.tiny, -info.tiny, info.max]
    near = [1.0, 1 + info.eps, 1 + 2 * info.eps, -1.0, -1 - info.eps, -1 - 2 * info.eps, info.min, info.tiny / 2]
    scores = torch.tensor([*special, *near] * 2, dtype=dtype)
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(0))
    return torch.stack([scores[order], scores[order.flip(0)]]).to(DEVICE)


def agrees(dtype, kept):
    """Whether the choice among `edges` is that of the torch backend, whose NaN ranks below every number."""
    scores = edges(dtype)
    features = torch.arange(scores.numel(), dtype=torch.float32, device=DEVICE).reshape(*scores.shape, 1)
    chosen = [module.prune_tokens(features, scores, None, None, None, kept, None) for module in (backend, _torch)]
    return all(torch.equal(a, b) for a, b in zip(*chosen, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kept", [1, 17, 28, 33])
def test_scores_at_the_edges(dtype, kept):
    assert agrees(dtype, kept)


@pytest.fixture
def small_blocks(monkeypatch):
    """Selection in blocks of 16 scores, as a sample of more than 4096 is read."""

    def shrink():
        small = Config({"BLOCK": 16, "DIGITS": 4})
        monkeypatch.setattr(backend.select_kernels, "select_config", lambda seqlen: small)

    return shrink


@pytest.mark.parametrize("name", ["ties", "mass-packed"])
def test_samples_longer_than_a_block(name, small_blocks):
    small_blocks()
    (case,) = [case for case in CASES["prune_tokens"] if case.id == name]
    for dtype in (torch.float32, torch.bfloat16):
        check_error_bar(case, "triton", dtype, DEVICE)
        assert agrees(dtype, 20)


@pytest.mark.parametrize("fault", SCORE_FAULTS)
def test_a_fault_in_the_scores_is_caught(plant, caught, fault):
    old, new, case = SCORE_FAULTS[fault]
    plant(backend, "kernels", old, new)
    assert caught("cls_attention_scores", case)


@pytest.mark.parametrize("fault", SELECT_FAULTS)
def test_a_fault_in_the_choice_is_caught(plant, caught, fault):
    old, new, case = SELECT_FAULTS[fault]
    plant(backend, "select_kernels", old, new)
    try:
        if case is None:
            assert not all(agrees(torch.float32, kept) for kept in range(1, 34, 2))
        else:
            assert caught("prune_tokens", case)
    except IndexError:  # the gradient went to a place that nobody wrote
        pass


@pytest.mark.parametrize("fault", BLOCKWISE_FAULTS)
def test_a_fault_in_the_choice_among_blocks_is_caught(plant, caught, small_blocks, fault):
    plant(backend, "select_kernels", *BLOCKWISE_FAULTS[fault])
    small_blocks()
    assert caught("prune_tokens", "ties")


def test_without_a_fault_nothing_is_caught(plant, caught, small_blocks):
    plant(backend, "kernels", "share", "share")
    plant(backend, "select_kernels", "wanted", "wanted")
    assert not caught("cls_attention_scores", "clip")
    small_blocks()
    assert not caught("prune_tokens", "ties")


def test_two_runs_agree_to_the_last_bit():
    q, k = torch.randn(2, 2, 4, 24, device=DEVICE), torch.randn(2, 150, 2, 24, device=DEVICE)
    scores, again = (backend.cls_attention_scores(q, k, None, 0.3, 1, 1.0) for _ in range(2))
    assert torch.equal(scores, again)
    alone = backend.cls_attention_scores(q[1:], k[1:], None, 0.3, 1, 1.0)  # nor does the batch matter
    assert torch.equal(scores[1:], alone)


def test_a_query_that_is_not_a_number_spreads_over_its_sample_only():
    q, k = torch.randn(2, 1, 2, 8, device=DEVICE), torch.randn(2, 9, 2, 8, device=DEVICE)
    q[1, 0, 0, 3] = float("nan")
    scores = backend.cls_attention_scores(q, k, None, 0.3, 1, 1.0)
    assert scores[0].isfinite().all()
    assert scores[1].isnan().all()
