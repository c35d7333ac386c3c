"""VisionZip, PruMerge(+), VisPruner, DivPrune, HiPrune, ToMe: each against its formula in plain loops."""

import pytest
import slow_pruners as slow
import torch
from pruner_inputs import SIGLIP, inputs_for, one

from mmkernels import ConfigError, ShapeError, get_pruner
from mmkernels.pruning import Encoder, Tap, VisionInputs

GRID = Encoder(num_layers=6, feature_layer=4, num_prefix=1, grid=(5, 7))  # 35 patches
SQUARE = Encoder(num_layers=6, feature_layer=4, num_prefix=2, grid=(6, 6))
encoders = pytest.mark.parametrize("encoder", [GRID, SQUARE], ids=["35", "36"])


def tap(inputs, what):
    (value,) = [value for t, value in inputs.taps.items() if t.what == what]
    return value


def assert_is(pruned, b, tokens, sources):
    width = len(sources)
    assert pruned.indices[b, :width].tolist() == sources
    assert pruned.mask[b, :width].all()
    assert not pruned.mask[b, width:].any()
    torch.testing.assert_close(pruned.tokens[b, :width], torch.tensor(tokens), rtol=1e-5, atol=1e-6)
    assert (pruned.tokens[b, width:] == 0).all()
    assert (pruned.indices[b, width:] == -1).all()


def assert_batch_is_its_samples(pruner, inputs):
    together = pruner(inputs)
    for i in range(len(inputs.features)):
        alone = pruner(one(inputs, i))
        width = alone.tokens.shape[1]
        assert torch.equal(alone.indices[0], together.indices[i, :width])
        assert torch.equal(alone.mask[0], together.mask[i, :width])
        assert not together.mask[i, width:].any()
        torch.testing.assert_close(alone.tokens[0], together.tokens[i, :width], rtol=1e-5, atol=1e-6)
    if together.sizes is not None:
        assert (together.sizes[~together.mask] == 0).all()


@encoders
@pytest.mark.parametrize(("total", "contextual"), [(12, 3), (20, 1), (9, 7), (35, 20)])
def test_visionzip(encoder, total, contextual):
    pruner = get_pruner("visionzip", num_keep=total, contextual=contextual)
    assert pruner.taps(encoder) == (Tap(4, "cls_row"), Tap(4, "keys"))
    inputs = inputs_for(pruner, encoder)
    pruned = pruner(inputs)
    assert pruned.tokens.shape[1] == total
    for b in range(2):
        tokens, sources = slow.visionzip(
            inputs.features[b].tolist(),
            inputs.prefix[b, 0].tolist(),
            tap(inputs, "cls_row")[b].tolist(),
            tap(inputs, "keys")[b, encoder.num_prefix :].tolist(),
            total - contextual,
            contextual,
        )
        assert_is(pruned, b, tokens, sources)
        assert pruned.sizes[b].sum() == encoder.grid[0] * encoder.grid[1] + 1
    assert_batch_is_its_samples(pruner, inputs)


def test_visionzips_budgets():
    published = {64: (53, 10), 128: (107, 20), 192: (161, 30)}
    for total, split in published.items():
        assert get_pruner("visionzip", num_keep=total).split(576, 1) == split
    pruner = get_pruner("visionzip", num_keep=10, contextual=0)
    assert pruner(inputs_for(pruner, GRID)).indices.shape == (2, 10)
    column = get_pruner("visionzip", num_keep=12, score_source="column")
    encoder = Encoder(num_layers=6, feature_layer=4, num_prefix=0, grid=(5, 7))
    inputs = inputs_for(column, encoder)
    kept = column(inputs)
    assert kept.indices.shape == (2, 12)
    dominant = sorted(slow.falling(tap(inputs, "column")[0].tolist())[:10])
    assert kept.indices[0, :10].tolist() == dominant


@encoders
def test_prumerge(encoder):
    pruner = get_pruner("prumerge", neighbours=5)
    assert pruner.taps(encoder) == (Tap(5, "cls_query"), Tap(5, "keys"))
    inputs = inputs_for(pruner, encoder, images=3)
    inputs.taps[Tap(5, "cls_query")][1] *= 0.1  # few outliers, and many
    inputs.taps[Tap(5, "cls_query")][2] *= 3
    pruned = pruner(inputs)
    counts = []
    for b in range(3):
        keys = tap(inputs, "keys")[b].tolist()
        weights = slow.prumerge_weights(tap(inputs, "cls_query")[b].tolist(), keys, encoder.num_prefix)
        counts.append(slow.outliers(weights))
        kept = slow.falling(weights)[: counts[-1]]
        patches = inputs.features[b].tolist()
        tokens, sources = slow.prumerge(patches, weights, keys[encoder.num_prefix :], kept, 5)
        assert_is(pruned, b, tokens, sources)
    assert len(set(counts)) > 1
    assert pruned.mask.sum(-1).tolist() == [n + 1 for n in counts]
    assert_batch_is_its_samples(pruner, inputs)
    raster = get_pruner("prumerge", neighbours=5, order="raster")(inputs)
    assert raster.indices[2, : counts[2]].tolist() == sorted(pruned.indices[2, : counts[2]].tolist())


def test_prumerge_with_a_budget():
    pruner = get_pruner("prumerge", num_keep=9)
    inputs = inputs_for(pruner, GRID)
    assert pruner(inputs).indices.shape == (2, 9)
    keys = tap(inputs, "keys")[1].tolist()
    weights = slow.prumerge_weights(tap(inputs, "cls_query")[1].tolist(), keys, 1)
    tokens, sources = slow.prumerge(inputs.features[1].tolist(), weights, keys[1:], slow.falling(weights)[:8], 32)
    assert_is(pruner(inputs), 1, tokens, sources)
    # no outlier at all: one token for everything
    flat = inputs_for(get_pruner("prumerge"), GRID)
    flat.taps[Tap(5, "cls_query")].zero_()
    assert get_pruner("prumerge")(flat).indices.tolist() == [[-1], [-1]]


@encoders
@pytest.mark.parametrize("total", [None, 2, 14, 35])
def test_prumerge_plus(encoder, total):
    pruner = get_pruner("prumerge_plus", num_keep=total, neighbours=4)
    inputs = inputs_for(pruner, encoder)
    inputs.taps[Tap(5, "cls_query")] *= 2
    pruned = pruner(inputs)
    for b in range(2):
        keys = tap(inputs, "keys")[b].tolist()
        weights = slow.prumerge_weights(tap(inputs, "cls_query")[b].tolist(), keys, encoder.num_prefix)
        order, n = slow.falling(weights), len(weights)
        if total is None:
            k = slow.outliers(weights)
            kept = order[:k] + [i for i in range(0, n, max(1, n // max(k, 1) // 3)) if i not in order[:k]]
        else:
            top = order[: (total - 1) // 4]
            rest = [i for i in range(n) if i not in top]
            count = total - 1 - len(top)
            kept = top + [rest[int((i + 0.5) * len(rest) / count)] for i in range(count)]
            assert len(set(kept)) == total - 1
        patches = inputs.features[b].tolist()
        assert_is(pruned, b, *slow.prumerge(patches, weights, keys[encoder.num_prefix :], kept, 4))
    assert_batch_is_its_samples(pruner, inputs)


@encoders
@pytest.mark.parametrize(("total", "ratio"), [(1, 0.5), (10, 0.5), (11, 0.3), (12, 1.0), (34, 0.1), (35, 0.5)])
def test_vispruner(encoder, total, ratio):
    pruner = get_pruner("vispruner", num_keep=total, important_ratio=ratio)
    inputs = inputs_for(pruner, encoder)
    pruned = pruner(inputs)
    for b in range(2):
        want = slow.vispruner(inputs.features[b].tolist(), tap(inputs, "cls_row")[b].tolist(), total, ratio)
        assert len(want) == total
        assert_is(pruned, b, inputs.features[b, want].tolist(), want)
    assert_batch_is_its_samples(pruner, inputs)


@encoders
@pytest.mark.parametrize("total", [1, 2, 9, 35])
def test_divprune(encoder, total):
    pruner = get_pruner("divprune", num_keep=total)
    assert pruner.stage == "post_projector"
    inputs = inputs_for(pruner, encoder)
    pruned = pruner(inputs)
    for b in range(2):
        want = slow.divprune(inputs.features[b].tolist(), total)
        assert_is(pruned, b, inputs.features[b, want].tolist(), want)
    assert_batch_is_its_samples(pruner, inputs)


def test_divprune_ties_go_to_the_lower_index():
    x = torch.eye(6)[None]  # all equally far from each other
    assert get_pruner("divprune", num_keep=3)(VisionInputs(x, (2, 3))).indices.tolist() == [[0, 1, 2]]


@encoders
@pytest.mark.parametrize(("total", "alpha"), [(1, 0.1), (12, 0.5), (12, 1.0), (20, 0.3), (35, 0.7)])
def test_hiprune(encoder, total, alpha):
    pruner = get_pruner("hiprune", num_keep=total, alpha=alpha, layer=1)
    assert pruner.taps(encoder) == (Tap(1, "column"), Tap(4, "column"))
    inputs = inputs_for(pruner, encoder)
    pruned = pruner(inputs)
    for b in range(2):
        middle, late = (inputs.taps[Tap(layer, "column")][b].tolist() for layer in (1, 4))
        want = slow.hiprune(middle, late, total, alpha, *encoder.grid)
        assert_is(pruned, b, inputs.features[b, want].tolist(), want)
    assert_batch_is_its_samples(pruner, inputs)


def test_hiprune_does_not_wrap_around():
    pruner = get_pruner("hiprune", num_keep=5, alpha=1.0, layer=1)
    inputs = inputs_for(pruner, GRID, images=1)
    inputs.taps[Tap(1, "column")][0, 7] = 9  # the first of the second row: its left neighbour is no patch of the first
    inputs.taps[Tap(4, "column")][0, 6] = 0
    assert {0, 7, 8, 14} < set(pruner(inputs).indices[0].tolist())
    assert 6 not in pruner(inputs).indices[0].tolist()


@pytest.mark.parametrize("total", [1, 5, 20, 34, 35])
def test_tome_behind_the_encoder(total):
    pruner = get_pruner("tome_after", num_keep=total)
    inputs = inputs_for(pruner, GRID)
    pruned = pruner(inputs)
    for b in range(2):
        x, sizes, places = inputs.features[b].tolist(), [1.0] * 35, list(range(35))
        metric = slow.head_mean(tap(inputs, "keys")[b, 1:].tolist())
        while len(x) > total:
            x, metric, sizes, places = slow.tome_round(x, metric, sizes, places, min(len(x) - total, len(x) // 2), 0)
        assert_is(pruned, b, x, places)
        torch.testing.assert_close(pruned.sizes[b], torch.tensor(sizes))
    assert_batch_is_its_samples(pruner, inputs)


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_tome_in_the_blocks(prefix):
    pruner = get_pruner("tome", num_keep=6)
    encoder = Encoder(num_layers=4, feature_layer=2, num_prefix=prefix, grid=(4, 5))
    assert pruner.stage == "encoder_block"
    assert pruner.schedule(encoder) == (4, 5, 5)
    tokens = torch.randn(2, prefix + 20, 3, generator=torch.Generator().manual_seed(0))
    slows = [(t.tolist(), [1.0] * len(t), [-1] * prefix + list(range(20))) for t in tokens]
    sizes = places = None
    for layer, r in enumerate(pruner.schedule(encoder)):
        keys = torch.randn(2, tokens.shape[1], 2, 4, generator=torch.Generator().manual_seed(9 + layer))
        tokens, sizes, places = pruner.merge(tokens, keys, sizes, places, r=r, num_prefix=prefix)
        for b in range(2):
            x, weights, at = slows[b]
            x, _, weights, at = slow.tome_round(x, slow.head_mean(keys[b].tolist()), weights, at, r, prefix)
            slows[b] = x, weights, at
    pruned = pruner.finish(tokens, sizes, places, num_prefix=prefix)
    for b in range(2):
        assert_is(pruned, b, slows[b][0][prefix:], slows[b][2][prefix:])
        torch.testing.assert_close(pruned.sizes[b], torch.tensor(slows[b][1][prefix:]))
    bias = pruner.attention_bias(sizes, torch.float32)
    torch.testing.assert_close(bias.exp()[:, 0, 0], sizes)


def test_tomes_schedules():
    clip = Encoder(num_layers=24, feature_layer=22, num_prefix=1, grid=(24, 24))
    plan = get_pruner("tome", num_keep=64).schedule(clip)
    assert len(plan) == 23
    assert sum(plan) == 512
    assert max(plan) - min(plan) <= 1
    assert get_pruner("tome", r=8).schedule(clip) == (8,) * 23
    assert sum(get_pruner("tome", r=400).schedule(clip)) == 575
    with pytest.raises(ShapeError, match="halving at most in each of 2 layers; got 8 of 64"):
        get_pruner("tome", num_keep=8).schedule(Encoder(num_layers=2, feature_layer=1, num_prefix=1, grid=(8, 8)))
    with pytest.raises(ConfigError, match="r must be left out"):
        get_pruner("tome", r=8, num_keep=3)


@pytest.mark.parametrize("name", ["vispruner", "divprune", "hiprune", "tome_after"])
def test_keeping_everything_changes_no_bit(name):
    pruner = get_pruner(name, num_keep=35)
    inputs = inputs_for(pruner, GRID)
    kept = pruner(inputs)
    assert torch.equal(kept.tokens, inputs.features)
    assert torch.equal(kept.indices, torch.arange(35).expand(2, 35))
    half = VisionInputs(inputs.features.bfloat16(), inputs.grid, inputs.prefix, inputs.taps)
    assert torch.equal(pruner(half).tokens, half.features)


@pytest.mark.parametrize(
    "name",
    [
        "vtc_cls",
        "fastervlm",
        "visionzip",
        "vispruner",
        "prumerge",
        "prumerge_plus",
        "divprune",
        "hiprune",
        "tome_after",
    ],
)
def test_half_precision_and_no_images(name):
    pruner = get_pruner(name, num_keep=9)
    inputs = inputs_for(pruner, GRID)
    half = VisionInputs(inputs.features.bfloat16(), inputs.grid, inputs.prefix.bfloat16(), inputs.taps)
    kept = pruner(half)
    assert kept.tokens.dtype == torch.bfloat16
    assert kept.tokens.shape == (2, 9, 5)
    part = {t: value[:0] for t, value in inputs.taps.items()}
    none = pruner(VisionInputs(inputs.features[:0], inputs.grid, inputs.prefix[:0], part))
    assert none.tokens.shape[0] == 0
    assert none.indices.shape == none.mask.shape == none.tokens.shape[:2]


BAD = [
    ("visionzip", {"num_keep": 4, "contextual": -1}, ConfigError, "contextual must be at least 1"),
    ("visionzip", {"num_keep": 4, "score_source": "probe"}, ConfigError, "score_source must be one of cls, column"),
    ("prumerge", {"order": "rastr"}, ConfigError, "Did you mean 'raster'"),
    ("prumerge", {"neighbours": 0}, ConfigError, "neighbours must be at least 1"),
    ("prumerge", {"num_keep": 1, "keep_ratio": 0.5}, ConfigError, "got num_keep and keep_ratio"),
    ("vispruner", {"num_keep": 4, "important_ratio": 0.0}, ConfigError, "important_ratio must be in"),
    ("vispruner", {"num_keep": 4, "score_source": "mean"}, ConfigError, "score_source must be one of"),
    ("hiprune", {"num_keep": 4, "alpha": 2.0}, ConfigError, "alpha must be in"),
    ("hiprune", {"num_keep": 4, "layer": -1}, ConfigError, "layer must be at least 1"),
    ("divprune", {}, ConfigError, "exactly one of num_keep, keep_ratio must be given"),
]


@pytest.mark.parametrize(("name", "options", "error", "message"), BAD)
def test_bad_options_are_named(name, options, error, message):
    with pytest.raises(error, match=message):
        get_pruner(name, **options)


def test_encoders_and_inputs_that_cannot_serve_are_refused():
    for name in ("visionzip", "vispruner"):
        with pytest.raises(ConfigError, match=r"must have a \[CLS\] token.*Set score_source to column"):
            get_pruner(name, num_keep=4).taps(SIGLIP)
    with pytest.raises(ConfigError, match="vtc_cls has score_source='probe'"):
        get_pruner("prumerge").taps(SIGLIP)
    with pytest.raises(ConfigError, match="layer must be before layer 4"):
        get_pruner("hiprune", num_keep=4, layer=4).taps(GRID)
    with pytest.raises(ShapeError, match=r"contextual must leave room for \[CLS\]; got 4 of 4"):
        get_pruner("visionzip", num_keep=4, contextual=4).split(35, 1)
    pruner = get_pruner("visionzip", num_keep=4)
    inputs = inputs_for(pruner, GRID)
    with pytest.raises(ConfigError, match=r"prefix must hold the features of \[CLS\]; got None"):
        pruner(VisionInputs(inputs.features, inputs.grid, None, inputs.taps))
    with pytest.raises(ConfigError, match="taps must hold 'keys' once; got 0"):
        get_pruner("tome_after", num_keep=4)(VisionInputs(inputs.features, inputs.grid))


@pytest.mark.parametrize(
    "name", ["visionzip", "vispruner", "prumerge", "prumerge_plus", "divprune", "hiprune", "tome_after", "uniform"]
)
def test_a_rectangle_is_pruned_as_an_image_of_its_own(name):
    pruner = get_pruner(name, num_keep=9)
    mask = torch.zeros(4, 5, 7, dtype=torch.bool)
    mask[0, 1:4], mask[1, :, 2:6], mask[2, 2:4, 3:6] = True, True, True  # the last has nothing, the third too few
    mask = mask.flatten(1)
    inputs = inputs_for(pruner, GRID, images=4, mask=mask)
    pruned = pruner(inputs)
    for b, grid in enumerate(((3, 7), (5, 4), (2, 3))):
        where = mask[b].nonzero()[:, 0]
        taps = {}
        for key, value in inputs.taps.items():
            inner = value[b : b + 1]
            if key.what == "keys":
                inner = torch.cat([inner[:, :1], inner[:, 1:][:, where]], 1)
            taps[key] = inner if key.what in ("keys", "cls_query") else inner[:, where]
        small = VisionInputs(inputs.features[b : b + 1, where], grid, inputs.prefix[b : b + 1], taps)
        alone = get_pruner(name, num_keep=min(9, len(where)))(small)
        sources = [where[j].item() if j >= 0 else -1 for j in alone.indices[0].tolist()]
        assert_is(pruned, b, alone.tokens[0].tolist(), sources)
    assert not pruned.mask[3].any()
    mask[1, 9] = False  # in the middle
    with pytest.raises(ConfigError, match=f"{name}: mask must leave a rectangle of each image; got .* image 1"):
        pruner(inputs)
