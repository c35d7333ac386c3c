"""FastV and PyramidDrop: what they keep, by plain loops; where they look; budgets; bad input."""

import pytest
import torch

from mmkernels import ConfigError, DataError, ShapeError, get_pruner
from mmkernels.pruning import DecoderStep


def step_of(layer, num_layers, visual=(8, 5), seqlen=14, seed=0):
    """Visual tokens in the middle of each sample, padding on the left of the second."""
    draw = torch.Generator().manual_seed(seed)
    is_visual = torch.zeros(2, seqlen, dtype=torch.bool)
    mask = torch.ones(2, seqlen, dtype=torch.bool)
    for b, n in enumerate(visual):
        is_visual[b, 3 : 3 + n] = True
    mask[1, :2] = False
    return DecoderStep(
        layer,
        num_layers,
        torch.rand(2, seqlen, generator=draw),
        is_visual,
        mask,
        torch.tensor(visual),
        torch.randn(2, seqlen, 6, generator=draw),
    )


def assert_keeps_best(pruner, step, counts):
    keep = pruner.keep(step)
    for b, count in enumerate(counts):
        visual = [j for j in range(keep.shape[1]) if step.is_visual[b, j]]
        order = sorted(visual, key=lambda j: (-step.scores_row[b, j].item(), j))
        kept = [j for j in visual if keep[b, j]]
        assert kept == sorted(order[:count])
        assert all(keep[b, j] for j in range(keep.shape[1]) if j not in visual)


def test_fastv():
    pruner = get_pruner("fastv", keep_ratio=0.5)
    assert pruner.drop_layers(32) == {2: 1}
    assert pruner.stage == "decoder_layer"
    assert pruner.position_policy == "original"
    assert_keeps_best(pruner, step_of(2, 32), [4, 3])  # 2.5, halves up
    assert_keeps_best(get_pruner("fastv", num_keep=3, layer=3), step_of(3, 4), [3, 3])
    ties = step_of(2, 4)
    ties.scores_row[:] = 0.25
    assert get_pruner("fastv", num_keep=2).keep(ties)[0].nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4, 11, 12, 13]


def test_the_last_row_scores():
    pruner = get_pruner("fastv", num_keep=3)
    mask = torch.tensor([[True, True, True, False], [False, True, True, True]])
    rows = pruner.query_rows(torch.zeros(2, 4, 2), torch.zeros_like(mask), mask)
    assert rows.nonzero().tolist() == [[0, 2], [1, 3]]


def test_pyramiddrop():
    pruner = get_pruner("pyramiddrop")
    assert pruner.drop_layers(32) == {8: 8, 16: 16, 24: 24}
    assert pruner.position_policy == "compact"
    assert_keeps_best(pruner, step_of(8, 32), [4, 2])
    assert_keeps_best(pruner, step_of(16, 32), [2, 1])
    assert_keeps_best(pruner, step_of(24, 32), [1, 0])
    own = get_pruner("pyramiddrop", layers=(1, 3), ratios=(0.6, 0.3))
    assert own.drop_layers(4) == {1: 1, 3: 3}
    assert_keeps_best(own, step_of(3, 4), [2, 1])


def test_pyramiddrop_meets_a_layer_average():
    pruner = get_pruner("pyramiddrop", num_keep=192)
    step = step_of(8, 32)
    step.original_visual = torch.tensor([576])
    counts = [576]
    for layer in pruner.drop_layers(32):
        step.layer = layer
        counts.append(int(pruner.num_visual(step)))
    assert sum(counts) / 4 == pytest.approx(192, abs=1)
    step.original_visual = torch.tensor([576, 0])
    assert pruner.num_visual(step)[1] == 0
    with pytest.raises(ConfigError, match="at least the 8 of 32 layers"):
        get_pruner("pyramiddrop", num_keep=64).num_visual(step)


def test_samples_without_images_and_bad_input():
    step = step_of(2, 4, visual=(8, 0))
    assert get_pruner("fastv", num_keep=3).keep(step)[1].all()
    with pytest.raises(ShapeError, match="at most the number of tokens, 5; got 6"):
        get_pruner("fastv", num_keep=6).keep(step_of(2, 4))
    with pytest.raises(ShapeError, match="layer must be rising numbers in 1"):
        get_pruner("fastv", num_keep=6, layer=4).drop_layers(4)
    with pytest.raises(ShapeError, match="layers must be rising"):
        get_pruner("pyramiddrop", layers=(3, 2), ratios=(0.5, 0.2)).drop_layers(8)
    with pytest.raises(ConfigError, match="ratios must name one share for each"):
        get_pruner("pyramiddrop", ratios=(0.5,))
    with pytest.raises(ConfigError, match="ratios must be left out"):
        get_pruner("pyramiddrop", ratios=(0.5, 0.2, 0.1), num_keep=3)
    step.scores_row[0, 4] = float("nan")
    with pytest.raises(DataError, match="fastv: scores must be numbers; got NaN"):
        get_pruner("fastv", num_keep=3).keep(step)
