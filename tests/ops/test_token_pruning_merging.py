"""What is special to received attention and to token merging: whole maps, ToMe's own formulas, bad input."""

import math

import pytest
import torch

import mmkernels
from mmkernels import (
    ConfigError,
    DataError,
    DtypeError,
    ShapeError,
    attention_column_scores,
    bipartite_soft_matching,
    cls_attention_scores,
    merge_tokens,
)
from mmkernels.testing.cases_token_pruning import score_inputs

READY = [n for n in ("native", "torch") if mmkernels.backends()["attention_column_scores"][n] == "ready"]
every_backend = pytest.mark.parametrize("backend", [*READY, "reference"])
nan = float("nan")


def draw(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


@every_backend
@pytest.mark.parametrize("causal", [False, True])
def test_columns_of_the_full_map(backend, causal):
    made = score_inputs(torch.Generator().manual_seed(1), 2, 30, 4, 8, rows=30)
    q, k = made["q"], made["k"]
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) / 8**0.5
    if causal:
        logits = logits.masked_fill(torch.ones(30, 30, dtype=torch.bool).triu(1), -torch.inf)
    maps = logits.softmax(-1)
    columns = attention_column_scores(q, k, causal=causal, backend=backend)
    torch.testing.assert_close(columns, maps.mean((1, 2))[:, 1:], rtol=1e-12, atol=1e-14)
    rows = torch.zeros(2, 30, dtype=torch.bool)
    rows[0, 20:], rows[1, [3, 29]] = True, True
    some = attention_column_scores(q, k, causal=causal, query_mask=rows, num_prefix=0, backend=backend)
    for b in range(2):
        torch.testing.assert_close(some[b], maps[b, :, rows[b]].mean((0, 1)), rtol=1e-12, atol=1e-14)


@every_backend
def test_one_row_is_cls_attention(backend):
    made = score_inputs(torch.Generator().manual_seed(2), 2, 40, 4, 8, kv_heads=2)
    q, k = made["q"].float(), made["k"].float()
    one = attention_column_scores(q, k, backend=backend)
    torch.testing.assert_close(one, cls_attention_scores(q, k, backend=backend), rtol=1e-5, atol=1e-7)


@every_backend
def test_a_batch_of_columns_is_its_samples(backend):
    made = score_inputs(torch.Generator().manual_seed(3), 3, 29, 2, 8, rows=29)
    q, k = made["q"].float(), made["k"].float()
    together = attention_column_scores(q, k, backend=backend)
    for i in range(3):
        alone = attention_column_scores(q[i : i + 1], k[i : i + 1], backend=backend)
        torch.testing.assert_close(alone[0], together[i], rtol=1e-6 if backend == "torch" else 0, atol=0)


@every_backend
def test_nan_behind_a_mask_stays_there(backend):
    q, k = draw(1, 6, 2, 4), draw(1, 6, 2, 4, seed=1)
    seen = torch.tensor([[True, True, True, True, False, False]])
    clean = attention_column_scores(q[:, :4], k[:, :4], num_prefix=0, backend=backend)
    q[:, 4:], k[:, 4:] = nan, nan
    q.requires_grad_(), k.requires_grad_()
    masked = attention_column_scores(q, k, num_prefix=0, query_mask=seen, key_mask=seen, backend=backend)
    torch.testing.assert_close(masked[:, :4], clean)
    assert (masked[:, 4:] == 0).all()
    (masked * torch.arange(6.0)).sum().backward()
    assert q.grad.isfinite().all()
    assert k.grad.isfinite().all()
    assert (q.grad[:, 4:] == 0).all()
    with torch.no_grad():
        q[:, 2] = nan  # and one in front of it spreads
        assert attention_column_scores(q, k, query_mask=seen, key_mask=seen, backend=backend)[:, :3].isnan().all()


def tome(metric, x, sizes, r, protect):
    """ToMe's section 3 in plain loops: (tokens, sizes), even places that are left, then odd ones."""
    tokens = len(metric)
    links = []
    for a in range(0, tokens, 2):
        best = None
        for b in range(1, tokens, 2):
            if a < protect or b < protect:
                continue
            dot = sum(u * v for u, v in zip(metric[a], metric[b], strict=True))
            norms = math.sqrt(sum(u * u for u in metric[a])) * math.sqrt(sum(v * v for v in metric[b]))
            if best is None or dot / norms > best[0]:
                best = (dot / norms, a, b)
        if best is not None:
            links.append(best)
    links = sorted(links, key=lambda link: -link[0])[:r]
    weighted, total = [[s * v for v in row] for s, row in zip(sizes, x, strict=True)], list(sizes)
    for _, a, b in links:
        weighted[b] = [u + v for u, v in zip(weighted[b], weighted[a], strict=True)]
        total[b] += sizes[a]
    gone = {a for _, a, _ in links}
    order = [i for i in range(0, tokens, 2) if i not in gone] + list(range(1, tokens, 2))
    return [[v / total[i] for v in weighted[i]] for i in order], [total[i] for i in order]


@every_backend
@pytest.mark.parametrize(("tokens", "r", "protect"), [(8, 3, 0), (9, 4, 1), (9, 2, 1), (10, 4, 2), (7, 1, 3)])
def test_is_tome(backend, tokens, r, protect):
    metric, x = draw(2, tokens, 5, seed=tokens).double(), draw(2, tokens, 3, seed=r).double()
    sizes = torch.rand(2, tokens, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 1
    plan = bipartite_soft_matching(metric, r, protect=protect, order="sets", backend=backend)
    merged, totals = merge_tokens(x, plan, sizes=sizes, backend=backend)
    for b in range(2):
        rows, counts = tome(metric[b].tolist(), x[b].tolist(), sizes[b].tolist(), r, protect)
        torch.testing.assert_close(merged[b], torch.tensor(rows, dtype=torch.float64))
        torch.testing.assert_close(totals[b], torch.tensor(counts, dtype=torch.float64))
    raster = bipartite_soft_matching(metric, r, protect=protect, backend=backend)
    assert torch.equal(raster.keep_indices, plan.keep_indices.sort(-1).values)
    assert raster.keep_indices[:, :protect].tolist() == [list(range(protect))] * 2
    again, _ = merge_tokens(x, raster, sizes=sizes, backend=backend)
    back = again.gather(1, raster.assignment[..., None].expand_as(x))
    torch.testing.assert_close(back, merged.gather(1, plan.assignment[..., None].expand_as(x)))


@every_backend
def test_equal_cosines_go_to_the_lower_place(backend):
    plan = bipartite_soft_matching(torch.ones(1, 8, 2), 2, backend=backend)
    assert plan.source.tolist() == [[0, 2]]
    assert plan.keep_indices.tolist() == [[1, 3, 4, 5, 6, 7]]
    assert plan.assignment.tolist() == [[0, 0, 0, 1, 2, 3, 4, 5]]
    assert plan.similarity.allclose(torch.ones(1, 2))


@pytest.mark.parametrize("backend", READY)
def test_what_is_not_merged_keeps_every_bit(backend):
    x, sizes = draw(2, 20, 7).bfloat16(), torch.full((2, 20), 3.0)
    plan = bipartite_soft_matching(draw(2, 20, 4), 3, backend=backend)
    merged, totals = merge_tokens(x, plan, sizes=sizes, backend=backend)
    untouched = totals == 3
    assert untouched.sum() >= 2 * 14
    rows = x.gather(1, plan.keep_indices[..., None].expand(-1, -1, 7))
    assert torch.equal(merged[untouched], rows[untouched])
    nothing, _ = merge_tokens(x, bipartite_soft_matching(draw(2, 20, 4), 0, backend=backend), backend=backend)
    assert torch.equal(nothing, x)


M = draw(2, 6, 4)
BAD = [
    ({"r": 4}, ShapeError, r"r must be in 0 \.\. 3, half of the tokens that may merge; got 4"),
    ({"r": 3, "protect": 1}, ShapeError, r"r must be in 0 \.\. 2"),
    ({"r": -1}, ShapeError, "r must be in"),
    ({"r": 1.0}, DtypeError, "r must be an int"),
    ({"protect": 7}, ShapeError, r"protect must be in 0 \.\. tokens=6"),
    ({"order": "score"}, ConfigError, "order must be one of raster, sets"),
    ({"metric": M[0]}, ShapeError, "metric must have shape"),
    ({"metric": M.long()}, DtypeError, "metric must be float32"),
    ({"metric": M.clone().index_fill_(1, torch.tensor([2]), nan)}, DataError, "got NaN for token 2 of sample 0"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_matching_is_named(change, error, message):
    with pytest.raises(error, match=message) as caught:
        bipartite_soft_matching(**{"metric": M, "r": 1, **change})
    assert str(caught.value).startswith("bipartite_soft_matching: ")


Q, K = torch.zeros(2, 3, 4, 8), torch.zeros(2, 5, 4, 8)
BAD_COLUMNS = [
    ({"k": K[:, :, :3]}, ShapeError, "nkvheads must divide nheads"),
    ({"k": K.bfloat16()}, DtypeError, "k must have the dtype of q"),
    ({"num_prefix": 6}, ShapeError, r"num_prefix must be in 0 \.\. seqlen=5; got 6"),
    ({"lse": torch.zeros(2, 4, 5)}, ShapeError, "lse must have shape"),
    ({"query_mask": torch.ones(2, 5, dtype=torch.bool)}, ShapeError, "query_mask must have shape"),
    ({"key_mask": torch.ones(2, 5)}, DtypeError, "key_mask must be bool"),
    ({"causal": 1}, ConfigError, "causal must be True or False"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_COLUMNS)
def test_bad_column_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message) as caught:
        attention_column_scores(**{"q": Q, "k": K, **change})
    assert str(caught.value).startswith("attention_column_scores: ")


def test_a_plan_of_other_tokens_is_refused():
    plan = bipartite_soft_matching(M, 1)
    with pytest.raises(ShapeError, match=r"plan\.assignment must have shape.*Make the plan from these tokens"):
        merge_tokens(draw(2, 7, 4), plan)
    with pytest.raises(ShapeError, match="sizes must have shape"):
        merge_tokens(M, plan, sizes=torch.ones(2, 5))
