"""VTC-CLS, FasterVLM and the controls: the formula again in plain loops, golden choices, budgets, bad input."""

import pickle

import pytest
import torch
from pruner_inputs import CLIP, SIGLIP, TINY, inputs_for, one

from mmkernels import ConfigError, DataError, DtypeError, ShapeError, get_pruner
from mmkernels.pruning import Encoder, Pruned, Tap, VisionInputs, pruners


def assert_batch_is_its_samples(pruner, inputs):
    """Bit for bit, but for the padding that a batch may add."""
    together = pruner(inputs)
    assert isinstance(together, Pruned)
    for i in range(inputs.features.shape[0]):
        alone = pruner(one(inputs, i))
        width = alone.tokens.shape[1]
        assert torch.equal(alone.mask[0], together.mask[i, :width])
        assert not together.mask[i, width:].any()
        assert torch.equal(alone.tokens[0], together.tokens[i, :width])
        assert torch.equal(alone.indices[0], together.indices[i, :width])
        if together.sizes is not None:
            assert torch.equal(alone.sizes[0], together.sizes[i, :width])
    assert (together.tokens[~together.mask] == 0).all()
    assert (together.indices[~together.mask] == -1).all()


def best(scores, k):
    """The k largest, equals by rising index, in rising index."""
    return sorted(sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:k])


@pytest.mark.parametrize("layers", [1, 3])
def test_vtc_cls_sums_layers_and_keeps_the_best(layers):
    pruner = get_pruner("vtc_cls", num_keep=5, num_layers=layers)
    inputs = inputs_for(pruner, TINY)
    kept = pruner(inputs)
    for b in range(2):
        rows = [inputs.taps[Tap(layer, "cls_row")][b] for layer in range(4 - layers, 4)]
        want = best([sum(row[j].item() for row in rows) for j in range(12)], 5)
        assert kept.indices[b].tolist() == want
        assert torch.equal(kept.tokens[b], inputs.features[b, want])
    assert_batch_is_its_samples(pruner, inputs)


def test_golden_ties():
    pruner = get_pruner("fastervlm", num_keep=3)
    encoder = Encoder(num_layers=2, feature_layer=0, num_prefix=1, grid=(2, 3))
    (tap,) = pruner.taps(encoder)
    inputs = VisionInputs(torch.randn(1, 6, 2), (2, 3), taps={tap: torch.tensor([[0.1, 0.4, 0.4, 0.05, 0.3, 0.4]])})
    for k, want in ((1, [1]), (2, [1, 2]), (3, [1, 2, 5]), (4, [1, 2, 4, 5])):
        assert get_pruner("fastervlm", num_keep=k)(inputs).indices.tolist() == [want]
        assert get_pruner("vtc_cls", num_keep=k, num_layers=1)(inputs).indices.tolist() == [want]


def test_the_layers_of_clip():
    assert get_pruner("vtc_cls", num_keep=64).taps(CLIP) == tuple(Tap(layer, "cls_row") for layer in (20, 21, 22))
    assert [t.layer for t in get_pruner("vtc_cls", num_keep=64, num_layers=7).taps(CLIP)] == list(range(16, 23))
    assert get_pruner("fastervlm", num_keep=64).taps(CLIP) == (Tap(22, "cls_row"),)
    assert get_pruner("random", num_keep=64).taps(CLIP) == ()
    probe = get_pruner("vtc_cls", num_keep=64, score_source="probe")
    assert probe.taps(SIGLIP) == (Tap(26, "probe_row"),)
    column = get_pruner("vtc_cls", num_keep=64, num_layers=1, score_source="column")
    assert column.taps(SIGLIP) == (Tap(25, "column"),)


@pytest.mark.parametrize("name", ["vtc_cls", "fastervlm", "least_cls", "random", "uniform"])
def test_keeping_everything_changes_no_bit(name):
    pruner = get_pruner(name, num_keep=12)
    inputs = inputs_for(pruner, TINY)
    kept = pruner(inputs)
    assert torch.equal(kept.tokens, inputs.features)
    assert torch.equal(kept.indices, torch.arange(12).expand(2, 12))
    assert kept.mask.all()


def test_least_is_the_other_end():
    pruner = get_pruner("least_cls", num_keep=5)
    inputs = inputs_for(pruner, TINY)
    most = get_pruner("vtc_cls", num_keep=7)(inputs)
    for few, many in zip(pruner(inputs).indices.tolist(), most.indices.tolist(), strict=True):
        assert sorted(few + many) == list(range(12))


@pytest.mark.parametrize("source", ["probe", "column", "mean_query"])
def test_proxies_of_encoders_without_cls(source):
    pruner = get_pruner("vtc_cls", num_keep=4, num_layers=2, score_source=source)
    encoder = Encoder(num_layers=4, feature_layer=3, num_prefix=0, grid=(3, 4), has_probe=True)
    inputs = inputs_for(pruner, encoder)
    rows = torch.stack(list(inputs.taps.values()))
    assert len(rows) == (1 if source == "probe" else 2)
    assert pruner(inputs).indices[0].tolist() == best(rows[:, 0].sum(0).tolist(), 4)
    assert_batch_is_its_samples(pruner, inputs)


def test_mass_and_ratio():
    inputs = inputs_for(get_pruner("fastervlm", num_keep=1), TINY)
    (row,) = inputs.taps.values()
    for share in (0.2, 0.5, 0.9):
        kept = get_pruner("fastervlm", keep_mass=share)(inputs)
        for b in range(2):
            count = next(
                k for k in range(1, 13) if row[b, best(row[b].tolist(), k)].sum() >= share * row[b].sum() - 1e-7
            )
            assert kept.mask[b].sum() == count
    assert get_pruner("fastervlm", keep_ratio=0.3)(inputs).indices.shape == (2, 4)  # 3.6
    assert_batch_is_its_samples(get_pruner("fastervlm", keep_mass=0.4), inputs)


def test_global_scope_is_one_choice_over_a_samples_crops():
    pruner = get_pruner("fastervlm", num_keep=10, scope="global")
    mask = torch.ones(5, 12, dtype=torch.bool)
    mask[1, 8:] = False
    inputs = inputs_for(pruner, TINY, images=5, crops=(3, 2), mask=mask)
    (row,) = inputs.taps.values()
    kept = pruner(inputs)
    for crops in ((0, 1, 2), (3, 4)):
        places = [(c, j) for c in crops for j in range(12) if mask[c, j]]
        want = sorted(sorted(places, key=lambda p: (-row[p].item(), p))[:10])
        got = [(c, j) for c in crops for j in kept.indices[c].tolist() if j >= 0]
        assert got == want
    assert torch.equal(kept.tokens[kept.mask], inputs.features[torch.arange(5)[:, None], kept.indices][kept.mask])


def test_unpadded_patches_are_never_kept():
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[0, 3:9], mask[1, 5] = True, True
    for name in ("vtc_cls", "random"):
        pruner = get_pruner(name, num_keep=4)
        kept = pruner(inputs_for(pruner, TINY, mask=mask))
        assert kept.mask.sum(-1).tolist() == [4, 1]
        assert all(3 <= j < 9 for j in kept.indices[0].tolist())


def test_random_repeats_itself_and_covers():
    inputs = inputs_for(get_pruner("random", num_keep=3), TINY, images=3)
    kept = [get_pruner("random", num_keep=3, seed=s)(inputs).indices for s in range(60)]
    assert torch.equal(kept[7], get_pruner("random", num_keep=3, seed=7)(inputs).indices)
    assert torch.equal(kept[0][0], kept[0][2])
    # each of 12 patches 60 * 3 / 12 = 15 times on average; the chance of one outside 3 .. 30 is below 1e-3
    hits = torch.bincount(torch.cat([k[0] for k in kept]), minlength=12)
    assert hits.min() >= 3
    assert hits.max() <= 30
    each = get_pruner("random", num_keep=3, per_image=True)(inputs).indices
    assert not (torch.equal(each[0], each[1]) and torch.equal(each[1], each[2]))
    assert_batch_is_its_samples(get_pruner("random", num_keep=3), inputs)


def test_uniform_grid_is_even():
    inputs = VisionInputs(torch.randn(1, 576, 2), (24, 24))
    kept = get_pruner("uniform", num_keep=64)(inputs).indices[0]
    assert kept.tolist() == [r * 24 + c for r in range(1, 24, 3) for c in range(1, 24, 3)]
    for height, width in ((24, 24), (3, 7), (7, 3), (1, 9)):
        for k in range(1, height * width + 1):
            grid = VisionInputs(torch.randn(1, height * width, 1), (height, width))
            chosen = get_pruner("uniform", num_keep=k)(grid).indices[0].tolist()
            assert len(set(chosen)) == k
            assert chosen == sorted(chosen)
            assert chosen[-1] < height * width


@pytest.mark.parametrize("name", pruners())
def test_pruners_are_values(name):
    options = {} if name == "pyramiddrop" else {"num_keep": 6}
    pruner = get_pruner(name, **options)
    assert pickle.loads(pickle.dumps(pruner)) == pruner
    assert eval(repr(pruner)) == pruner
    assert pruner.name == name
    with pytest.raises(AttributeError):
        pruner.num_keep = 3


BAD = [
    ("vtc_csl", {"num_keep": 1}, ConfigError, "Did you mean 'vtc_cls'"),
    ("vtc_cls", {"num_kep": 1}, ConfigError, "Did you mean 'num_keep'"),
    ("vtc_cls", {}, ConfigError, "exactly one of num_keep, keep_ratio, keep_mass must be given; got none"),
    ("vtc_cls", {"num_keep": 1, "keep_mass": 0.5}, ConfigError, "got num_keep and keep_mass"),
    ("uniform", {"keep_mass": 0.5}, ConfigError, "uniform must get options it has; got 'keep_mass'"),
    ("vtc_cls", {"num_keep": 0}, ConfigError, "num_keep must be at least 1; got 0"),
    ("vtc_cls", {"num_keep": 0.5}, DtypeError, "num_keep must be an int"),
    ("vtc_cls", {"num_keep": True}, DtypeError, "num_keep must be an int"),
    ("vtc_cls", {"keep_ratio": 1.5}, ConfigError, "keep_ratio must be in"),
    ("vtc_cls", {"keep_mass": 0.0}, ConfigError, "keep_mass must be in"),
    ("vtc_cls", {"keep_ratio": "x"}, DtypeError, "keep_ratio must be a number"),
    ("vtc_cls", {"num_keep": 1, "num_layers": 0}, ConfigError, "num_layers must be at least 1"),
    ("vtc_cls", {"num_keep": 1, "score_source": "clss"}, ConfigError, "Did you mean 'cls'"),
    ("vtc_cls", {"num_keep": 1, "scope": "crop"}, ConfigError, "scope must be 'image' or 'global'"),
    ("least_cls", {"keep_mass": 0.5}, ConfigError, "keep_mass must be left out"),
]


@pytest.mark.parametrize(("name", "options", "error", "message"), BAD)
def test_bad_options_are_named(name, options, error, message):
    with pytest.raises(error, match=message):
        get_pruner(name, **options)


def test_encoders_that_cannot_serve_are_refused():
    with pytest.raises(ConfigError, match=r"must have a \[CLS\] token.*probe or column or mean_query"):
        get_pruner("vtc_cls", num_keep=1).taps(SIGLIP)
    with pytest.raises(ConfigError, match="without a pooling head"):
        get_pruner("vtc_cls", num_keep=1, score_source="probe").taps(CLIP)
    with pytest.raises(ConfigError, match=r"num_layers must be at most 23.*got 24"):
        get_pruner("vtc_cls", num_keep=1, num_layers=24).taps(CLIP)


def test_bad_inputs_are_named():
    pruner = get_pruner("vtc_cls", num_keep=13)
    with pytest.raises(ShapeError, match="num_keep must be at most the number of tokens, 12; got 13"):
        pruner(inputs_for(pruner, TINY))
    with pytest.raises(ShapeError, match="at most the number of tokens, 12"):
        get_pruner("uniform", num_keep=13)(inputs_for(pruner, TINY))
    with pytest.raises(ConfigError, match="taps must hold 3 times 'cls_row'; got 0"):
        get_pruner("vtc_cls", num_keep=1)(VisionInputs(torch.randn(1, 12, 2), (3, 4)))
    with pytest.raises(ShapeError, match="Leave \\[CLS\\]"):
        VisionInputs(torch.randn(1, 13, 2), (3, 4))
    with pytest.raises(ShapeError, match="crops must add up"):
        VisionInputs(torch.randn(3, 12, 2), (3, 4), crops=(1, 1))
    bad = inputs_for(get_pruner("fastervlm", num_keep=2), TINY)
    next(iter(bad.taps.values()))[1, 3] = float("nan")
    with pytest.raises(DataError, match="NaN for token 3 of sample 1"):
        get_pruner("fastervlm", num_keep=2)(bad)
