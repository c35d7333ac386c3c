"""What is special to token pruning: golden choices, ties, budgets, bad input (the rest: test_contract.py)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mmkernels
from mmkernels import ConfigError, DataError, DeviceError, DtypeError, ShapeError, cls_attention_scores, prune_tokens
from mmkernels.testing import poisoned_allocations
from mmkernels.testing.cases_token_pruning import score_inputs

PROPERTY = settings(max_examples=30, deadline=None, derandomize=True)
READY = [name for name in ("native", "torch") if mmkernels.backends()["prune_tokens"][name] == "ready"]
every_backend = pytest.mark.parametrize("backend", [*READY, "reference"])
nan, inf = float("nan"), float("inf")


def kept_of(scores, backend, **options):
    scores = torch.tensor([scores])
    features = torch.arange(scores.shape[1], dtype=torch.float32)[None, :, None]
    kept = prune_tokens(features, scores, backend=backend, **options)
    assert torch.equal(kept.tokens[0, :, 0].long(), kept.keep_indices[0])
    return kept.keep_indices[0].tolist()


@every_backend
@pytest.mark.parametrize(("k", "kept"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 5]), (4, [1, 2, 4, 5])])
def test_ties_go_to_the_lower_index_in_raster_order(backend, k, kept):
    assert kept_of([0.1, 0.4, 0.4, 0.05, 0.3, 0.4], backend, num_keep=k) == kept


@every_backend
def test_a_query_of_zeros_sees_uniformly(backend):
    # Each of n patches gets 1 / (n + 1), [CLS] the rest; k layers add up to k times that.
    n, layers = 6, 3
    k = torch.randn(1, n + 1, 1, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores = torch.zeros(1, n, dtype=torch.float64)
    for _ in range(layers):
        assert cls_attention_scores(torch.zeros_like(k[:, :1]), k, accumulate=scores, backend=backend) is scores
    torch.testing.assert_close(scores, torch.full_like(scores, layers / (n + 1)), rtol=1e-14, atol=0)


@every_backend
def test_rows_of_the_full_map(backend):
    made = score_inputs(torch.Generator().manual_seed(1), 2, 11, 4, 8)
    q, k = torch.randn_like(made["k"]), made["k"]
    maps = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q, k) / 8**0.5, -1)
    row = maps[:, :, 0].mean(1)
    scores = cls_attention_scores(q[:, :1], k, backend=backend)
    torch.testing.assert_close(scores, row[:, 1:], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(scores.sum(-1), 1 - row[:, 0], rtol=1e-12, atol=1e-14)
    # the column mean: every row, no prefix
    column = cls_attention_scores(q, k, num_prefix=0, backend=backend)
    torch.testing.assert_close(column, maps.mean((1, 2)), rtol=1e-12, atol=1e-14)


@every_backend
def test_lse_of_attention_gives_the_same_scores(backend):
    made = score_inputs(torch.Generator().manual_seed(2), 2, 9, 2, 8, rows=9)
    q, k = made["q"].float(), made["k"].float()
    _, lse = mmkernels.mma_attention(q, k, k, return_lse=True, backend="torch")
    full = cls_attention_scores(q[:, :1], k, backend=backend)
    given_lse = cls_attention_scores(q[:, :1], k, lse=torch.logsumexp(_logits(q, k), -1)[:, :, :1], backend=backend)
    torch.testing.assert_close(given_lse, full, rtol=1e-5, atol=1e-7)
    # causal attention: the last row is the one that sees every key
    last = cls_attention_scores(q[:, -1:], k, lse=lse[:, :, -1:], backend=backend)
    torch.testing.assert_close(last, cls_attention_scores(q[:, -1:], k, backend=backend), rtol=1e-5, atol=1e-7)


def _logits(q, k):
    return torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5


@every_backend
def test_large_products_do_not_overflow(backend):
    q, k = torch.full((1, 1, 1, 4), 100.0), torch.full((1, 3, 1, 4), 100.0)
    k[0, 1] = -100
    scores = cls_attention_scores(q, k, num_prefix=0, backend=backend)
    torch.testing.assert_close(scores, torch.tensor([[0.5, 0.0, 0.5]]))


@pytest.mark.parametrize("backend", READY)
@PROPERTY
@given(
    batch=st.integers(1, 3),
    seqlen=st.integers(1, 300),
    levels=st.integers(1, 5),
    share=st.floats(0, 1),
    packed=st.booleans(),
    masked=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_equals_the_reference(backend, batch, seqlen, levels, share, packed, masked, dtype, seed):
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randint(-levels, levels + 1, (batch, seqlen), generator=draw).to(dtype) * 0.375
    mask = torch.rand(batch, seqlen, generator=draw) < 0.7 if masked else None
    options = {
        "num_keep": (1 + (torch.rand(batch, generator=draw) * share * (seqlen - 1)).long()),
        "position_ids": torch.randint(0, 999, (batch, seqlen), generator=draw, dtype=torch.int32),
        "mask": mask,
        "packed": packed,
    }
    features = torch.randn(batch, seqlen, 3, generator=draw)
    with poisoned_allocations():
        kept = prune_tokens(features, scores, **options, backend=backend)
    for name, got, want in zip(
        kept._fields, kept, prune_tokens(features, scores, **options, backend="reference"), strict=True
    ):
        assert got.dtype == want.dtype, name
        assert torch.equal(got, want), name


@every_backend
def test_order_of_signed_zeros_and_infinities(backend):
    assert kept_of([-0.0, 0.0, -0.0, -1.0], backend, num_keep=2) == [0, 1]
    assert kept_of([-inf, 1.0, inf, -3e38], backend, num_keep=3) == [1, 2, 3]
    assert kept_of([-1e-45, 1e-45, 0.0, -1.0], backend, num_keep=2) == [1, 2]


@every_backend
def test_keeping_everything_changes_no_bit(backend):
    features = torch.randn(2, 7, 5)
    kept = prune_tokens(features, torch.randn(2, 7), num_keep=7, backend=backend)
    assert torch.equal(kept.tokens, features)
    assert torch.equal(kept.position_ids, torch.arange(7).expand(2, 7))
    assert kept.mask.all()


@every_backend
def test_a_batch_equals_its_samples(backend):
    draw = torch.Generator().manual_seed(3)
    q, k = torch.randn(4, 1, 2, 8, generator=draw), torch.randn(4, 20, 2, 8, generator=draw)
    features = torch.randn(4, 19, 6, generator=draw)
    together = prune_tokens(features, cls_attention_scores(q, k, backend=backend), num_keep=5, backend=backend)
    for i in range(4):
        part = slice(i, i + 1)
        alone = cls_attention_scores(q[part], k[part], backend=backend)
        kept = prune_tokens(features[part], alone, num_keep=5, backend=backend)
        assert torch.equal(kept.tokens, together.tokens[part])
        assert torch.equal(kept.keep_indices, together.keep_indices[part])


@every_backend
def test_packed_is_padded_without_padding(backend):
    features, scores = torch.randn(3, 9, 4), torch.rand(3, 9)
    options = {"num_keep": [4, 9, 1], "position_ids": torch.arange(27).view(3, 9), "backend": backend}
    padded, packed = prune_tokens(features, scores, **options), prune_tokens(features, scores, **options, packed=True)
    assert padded.tokens.shape == (3, 9, 4)
    assert packed.cu_seqlens.tolist() == padded.cu_seqlens.tolist() == [0, 4, 13, 14]
    assert packed.mask.all()
    for whole, joined in zip(padded[:3], packed[:3], strict=True):
        assert torch.equal(whole[padded.mask], joined)
    assert (padded.tokens[~padded.mask] == 0).all()
    assert (padded.keep_indices[~padded.mask] == -1).all()


@every_backend
def test_ratio_and_mass(backend):
    scores = [0.05, 0.4, 0.1, 0.25, 0.2]
    assert kept_of(scores, backend, keep_ratio=0.5) == [1, 3, 4]  # 2.5, halves up
    assert kept_of(scores, backend, keep_ratio=0.01) == [1]
    assert kept_of(scores, backend, keep_mass=0.39) == [1]
    assert kept_of(scores, backend, keep_mass=0.6) == [1, 3]
    assert kept_of(scores, backend, keep_mass=0.7) == [1, 3, 4]
    assert kept_of([0.0, 1.0, 0.0], backend, keep_mass=1.0) == [1]


@every_backend
def test_padding_is_never_kept(backend):
    scores = torch.tensor([[9.0, 1.0, 2.0, nan], [9.0, -inf, 9.0, 9.0]])
    mask = torch.tensor([[False, True, True, False], [False, True, False, False]])
    kept = prune_tokens(torch.ones(2, 4, 1), scores, num_keep=3, mask=mask, backend=backend)
    assert kept.keep_indices.tolist() == [[1, 2, -1], [1, -1, -1]]
    assert kept.mask.sum(-1).tolist() == kept.cu_seqlens.diff().tolist() == [2, 1]
    assert kept.tokens[..., 0].tolist() == [[1, 1, 0], [1, 0, 0]]


@every_backend
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_reach_what_is_kept_and_nothing_else(backend, packed):
    features = torch.randn(2, 4, 3, requires_grad=True)
    scores = torch.tensor([[1.0, 4.0, 3.0, 2.0], [4.0, 1.0, 2.0, 3.0]], requires_grad=True)
    kept = prune_tokens(features, scores, num_keep=[1, 3], packed=packed, backend=backend)
    kept.tokens.masked_fill(~kept.mask[..., None], nan).nansum().backward()
    assert features.grad[..., 0].tolist() == [[0, 1, 0, 0], [1, 0, 1, 1]]
    assert scores.grad is None


F, S = torch.zeros(2, 6, 4), torch.rand(2, 6)
BAD = [
    ({"num_keep": 7}, ShapeError, "num_keep must be at most the number of tokens, 6; got 7"),
    ({"num_keep": 0}, ShapeError, "num_keep must be at least 1; got 0"),
    ({"num_keep": [2, 9]}, ShapeError, "num_keep must be at most"),
    ({"num_keep": [2]}, ShapeError, "num_keep must have shape"),
    ({"num_keep": 0.5}, DtypeError, "num_keep must be an int"),
    ({"num_keep": True}, DtypeError, "num_keep must be an int"),
    ({}, ConfigError, "exactly one of num_keep, keep_ratio and keep_mass must be given; got none"),
    ({"num_keep": 2, "keep_ratio": 0.5}, ConfigError, "got num_keep and keep_ratio"),
    ({"keep_ratio": 0.0}, ConfigError, "keep_ratio must be in"),
    ({"keep_mass": 1.5}, ConfigError, "keep_mass must be in"),
    ({"keep_mass": "0.5"}, DtypeError, "keep_mass must be a number"),
    ({"keep_mass": 0.5, "scores": -S}, DataError, "scores must be >= 0"),
    ({"num_keep": 2, "scores": S.clone().fill_(nan)}, DataError, "got NaN for token 0 of sample 0"),
    ({"num_keep": 2, "scores": torch.rand(2, 7)}, ShapeError, "scores must have shape"),
    ({"num_keep": 2, "scores": torch.ones(2, 6).long()}, DtypeError, "scores must be float32"),
    ({"num_keep": 2, "scores": S.to("meta")}, DeviceError, "scores must be on cpu"),
    ({"num_keep": 2, "features": torch.zeros(6, 4)}, ShapeError, "features must have shape"),
    ({"num_keep": 2, "mask": torch.ones(2, 6)}, DtypeError, "mask must be bool"),
    ({"num_keep": 2, "position_ids": torch.ones(2, 6)}, DtypeError, "position_ids must be int32"),
    ({"num_keep": 2, "packed": 1}, ConfigError, "packed must be True or False"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message) as caught:
        prune_tokens(**{"features": F, "scores": S, **change})
    assert str(caught.value).startswith("prune_tokens: ")


Q, K = torch.zeros(2, 1, 4, 8), torch.zeros(2, 5, 4, 8)
BAD_SCORES = [
    ({"q": Q[:, 0]}, ShapeError, "q must have shape"),
    ({"q": Q[:, :0]}, ShapeError, "q must have at least one row"),
    ({"k": K[:, :, :3]}, ShapeError, "nkvheads must divide nheads"),
    ({"k": K.bfloat16()}, DtypeError, "k must have the dtype of q"),
    ({"k": K.to("meta")}, DeviceError, "k must be on cpu"),
    ({"num_prefix": 6}, ShapeError, "num_prefix must be in 0 .. seqlen=5; got 6"),
    ({"num_prefix": -1}, ShapeError, "num_prefix must be in"),
    ({"lse": torch.zeros(2, 1, 4)}, ShapeError, "lse must have shape"),
    ({"accumulate": torch.zeros(2, 5)}, ShapeError, "accumulate must have shape"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_SCORES)
def test_bad_score_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message) as caught:
        cls_attention_scores(**{"q": Q, "k": K, **change})
    assert str(caught.value).startswith("cls_attention_scores: ")


def test_a_nan_in_a_compiled_call_ranks_below_every_number():
    compiled = torch.compile(prune_tokens, fullgraph=True, backend="eager")
    scores = torch.tensor([[nan, -inf, nan, 2.0]])
    for backend in READY:
        assert compiled(torch.ones(1, 4, 2), scores, num_keep=2, backend=backend).keep_indices.tolist() == [[1, 3]]
        assert compiled(torch.ones(1, 4, 2), scores, num_keep=3, backend=backend).keep_indices.tolist() == [[0, 1, 3]]
