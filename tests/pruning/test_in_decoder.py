"""FastV, PyramidDrop and SparseVLM: what they keep, by plain loops; where they look; budgets; bad input."""

import pytest
import slow_pruners as slow
import torch

from mmkernels import ConfigError, DataError, ShapeError, get_pruner
from mmkernels.pruning import DecoderStep, RowAttention


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


def test_sparsevlm_keeps_and_merges():
    pruner = get_pruner("sparsevlm", kept=(20, 9, 4))
    assert pruner.drop_layers(32) == {3: 2, 7: 6, 16: 15}
    assert pruner.position_policy == "compact"
    step = step_of(7, 32, visual=(60, 17), seqlen=66)
    keep = pruner.keep(step)
    assert_keeps_best(pruner, step, [9, 9])
    extras = pruner.merged(step, keep)
    for b in range(2):
        dropped = [j for j in range(66) if not keep[b, j]]
        rows, counts = slow.sparse_merge(step.hidden_states[b, dropped].tolist(), step.scores_row[b, dropped].tolist())
        assert extras.mask[b].sum() == len(rows)
        torch.testing.assert_close(extras.tokens[b, : len(rows)], torch.tensor(rows), rtol=1e-5, atol=1e-6)
        assert extras.sizes[b, : len(rows)].tolist() == counts
        assert (extras.tokens[b, len(rows) :] == 0).all()
    assert extras.mask.sum(-1).tolist() == [2, 1]
    # one sample alone gives the same
    alone = DecoderStep(
        7, 32, step.scores_row[1:], step.is_visual[1:], step.mask[1:], step.original_visual[1:], step.hidden_states[1:]
    )
    assert torch.equal(pruner.keep(alone)[0], keep[1])
    torch.testing.assert_close(pruner.merged(alone, keep[1:]).tokens[0], extras.tokens[1, :1])


def test_sparsevlm_always_drops_one():
    pruner = get_pruner("sparsevlm", kept=(20, 9, 4))
    assert_keeps_best(pruner, step_of(3, 32), [7, 4])
    step = step_of(3, 32, visual=(1, 0))
    keep = pruner.keep(step)
    assert (~keep).nonzero().tolist() == [[0, 3]]
    extras = pruner.merged(step, keep)
    assert torch.equal(extras.tokens[0, 0], step.hidden_states[0, 3])
    assert extras.mask.tolist() == [[True], [False]]


def test_sparsevlms_raters():
    draw = torch.Generator().manual_seed(3)
    embeddings = torch.randn(3, 12, 6, generator=draw)
    is_visual = torch.zeros(3, 12, dtype=torch.bool)
    is_visual[0, 2:6], is_visual[1, 3:5] = True, True
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[0, 10:] = False
    rows = get_pruner("sparsevlm", num_keep=3).query_rows(embeddings, is_visual, mask)
    for b, (visual, text) in enumerate(((range(2, 6), range(6, 10)), (range(3, 5), range(5, 12)))):
        want = slow.raters(embeddings[b, list(visual)].tolist(), embeddings[b, list(text)].tolist())
        assert 0 < sum(want) < len(want)
        assert [j for j in range(12) if rows[b, j]] == [j for j, rates in zip(text, want, strict=True) if rates]
    assert not rows[2].any()
    mask[1, 6:] = False  # one text token is never above the mean: it rates
    assert get_pruner("sparsevlm", num_keep=3).query_rows(embeddings, is_visual, mask)[1].nonzero().tolist() == [[5]]


def test_sparsevlms_budgets():
    for budget, counts in ((64, (66, 30, 17)), (128, (303, 110, 36)), (192, (300, 200, 110)), (576, (576, 576, 576))):
        pruner = get_pruner("sparsevlm", num_keep=budget)
        assert tuple(pruner.count_at(stage, 576) for stage in range(3)) == counts
    between = get_pruner("sparsevlm", num_keep=96)
    assert [between.count_at(stage, 576) for stage in range(3)] == [185, 70, 27]  # 184.5, 70, 26.5: halves up
    assert get_pruner("sparsevlm", keep_ratio=1 / 9).count_at(0, 288) == 33
    small = get_pruner("sparsevlm", keep_ratio=0.5)
    assert small.drop_layers(4) == {1: 0, 2: 1, 3: 2}
    assert small.drop_layers(8) == {1: 0, 2: 1, 4: 3}


def attention_of(positions, raters, visual, heads, headdim, seed=5):
    """Random attention of a batch, with rows that are none, and rotations by the usual angles."""
    draw = torch.Generator().manual_seed(seed)
    batch, seqlen, most = len(positions), len(positions[0]), max(map(len, raters))
    weights = torch.rand(batch, heads, most, seqlen, generator=draw)
    angles = torch.tensor(positions)[..., None] / 10000 ** (2 * torch.arange(headdim // 2) / headdim)
    turned = torch.cat([angles.cos() - angles.sin(), angles.cos() + angles.sin()], -1)
    rows, is_visual = torch.zeros(batch, most, dtype=torch.bool), torch.zeros(batch, seqlen, dtype=torch.bool)
    turned_rows = torch.zeros(batch, most, headdim)
    for b in range(batch):
        rows[b, : len(raters[b])], is_visual[b, visual[b]] = True, True
        turned_rows[b, : len(raters[b])] = turned[b, raters[b]]
    weights = weights.masked_fill(~rows[:, None, :, None], 0)
    return RowAttention(weights, rows, is_visual, turned_rows + ~rows[..., None], turned)


@pytest.mark.parametrize("heads", [2, 14])
def test_sparsevlm_plus_frees_attention_from_distance(heads):
    positions = [[0, 1, 2, 3, 4, 5, 6, 7], [0, 0, 1, 2, 5, 9, 10, 11]]  # some are gone, two are padding
    raters, visual = [[6, 7], [7]], [[1, 2, 3, 4, 5], [3, 4, 5]]
    seen = attention_of(positions, raters, visual, heads=3, headdim=8)
    got = get_pruner("sparsevlm_plus", num_keep=2, heads=heads).scores(seen)
    for b in range(2):
        maps = torch.zeros(3, 8, 8)
        maps[:, raters[b]] = seen.weights[b, :, : len(raters[b])]
        want = slow.freed_scores(maps.tolist(), positions[b], raters[b], visual[b], heads, 8)
        torch.testing.assert_close(got[b, visual[b]], torch.tensor(want), atol=1e-5, rtol=1e-4)
        assert not got[b, [j for j in range(8) if j not in visual[b]]].any()
    plain = get_pruner("sparsevlm", num_keep=2).scores(seen)
    torch.testing.assert_close(plain[1], seen.weights[1, :, 0].mean(0))


def test_sparsevlm_plus_drops_for_good_by_its_own_budgets():
    tables = {64: (66, 34, 20), 96: (246, 54, 28), 128: (238, 108, 60), 192: (300, 200, 118), 576: (576, 576, 576)}
    for budget, counts in tables.items():
        pruner = get_pruner("sparsevlm_plus", num_keep=budget)
        assert tuple(pruner.count_at(stage, 576) for stage in range(3)) == counts
        tokens = (2 * 576, *(layers * count for layers, count in zip((4, 9, 17), counts, strict=True)))
        assert abs(sum(tokens) / 32 - budget) < 1 or budget == 576  # as its authors count layers
    assert pruner.position_policy == "original"
    step = step_of(7, 32, visual=(60, 17), seqlen=66)
    pruner = get_pruner("sparsevlm_plus", kept=(20, 9, 4))
    assert_keeps_best(pruner, step, [9, 9])
    assert pruner.merged(step, pruner.keep(step)) is None
    with pytest.raises(ConfigError, match="sparsevlm_plus: heads must be at least 1; got 0"):
        get_pruner("sparsevlm_plus", num_keep=2, heads=0)


def test_sparsevlm_bad_input():
    with pytest.raises(ConfigError, match="kept must name one number for each of 3 layers"):
        get_pruner("sparsevlm", kept=(3, 2))
    with pytest.raises(ConfigError, match="kept must be left out"):
        get_pruner("sparsevlm", kept=(3, 2, 1), num_keep=2)
    with pytest.raises(ConfigError, match="kept must name one number for each of 2 layers; got None"):
        get_pruner("sparsevlm", num_keep=2, layers=(2, 4))
    with pytest.raises(ShapeError, match="layers must be rising"):
        get_pruner("sparsevlm", num_keep=2).drop_layers(3)
    step = step_of(3, 32)
    step.hidden_states = None
    pruner = get_pruner("sparsevlm", num_keep=2)
    with pytest.raises(ConfigError, match="hidden_states must be given"):
        pruner.merged(step, pruner.keep(step))
    visual = torch.tensor([[False, True, True]])
    with pytest.raises(DataError, match="must have text behind the image; got none in sample 0"):
        pruner.query_rows(torch.randn(1, 3, 2), visual, torch.ones_like(visual))
