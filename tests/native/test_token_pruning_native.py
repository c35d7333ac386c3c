"""The C++ token pruning: every ISA level, thread counts, raw calls that the public function would never make."""

import pytest
import torch

import mmkernels
from mmkernels import _native
from mmkernels.testing import assert_within, poisoned_allocations
from mmkernels.testing.cases_token_pruning import score_inputs

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ops = torch.ops.mmkernels


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request):
    if request.param not in _native.isa_levels():
        pytest.skip(f"this CPU has no {request.param}")
    with _native.use_isa(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_error_bar(isa, dtype):
    # Keys around blocks of 4 and 32, channels around vectors of 4, 8 and 16.
    for seqlen, headdim, rows in ((1, 1, 1), (4, 7, 2), (33, 16, 1), (37, 33, 3), (70, 64, 1)):
        made = score_inputs(torch.Generator().manual_seed(seqlen), 2, seqlen, 4, headdim, rows=rows, kv_heads=2)
        args = {name: value.to(dtype) for name, value in made.items()}
        wide = {name: value.double() for name, value in args.items()}
        truth = mmkernels.cls_attention_scores(**wide, num_prefix=0, backend="reference")
        with poisoned_allocations():
            scores = mmkernels.cls_attention_scores(**args, num_prefix=0, backend="native")
        # A rounding of each logit is a relative error of its exponential: logits are of size 1 to 4 here.
        terms = 8 + 4 * headdim**0.5
        assert_within(f"{seqlen} keys", scores, truth, dtype=torch.promote_types(dtype, torch.float32), terms=terms)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_columns_error_bar(isa, dtype):
    # Keys around vectors of 2 to 16, rows around blocks of 24.
    for seqlen, headdim, rows, causal in ((1, 1, 1, False), (7, 5, 25, False), (33, 17, 33, True), (50, 64, 24, True)):
        made = score_inputs(torch.Generator().manual_seed(seqlen), 2, seqlen, 4, headdim, rows=rows, kv_heads=2)
        masks = {"query_mask": torch.arange(rows) % 3 != 1, "key_mask": torch.arange(seqlen) % 4 != 3}
        masks = {name: value.expand(2, -1) for name, value in masks.items()}
        args = {name: value.to(dtype) for name, value in made.items()}
        wide = {name: value.double() for name, value in args.items()} | masks | {"causal": causal, "num_prefix": 0}
        truth = mmkernels.attention_column_scores(**wide, backend="reference")
        for name, mask in (("q", masks["query_mask"]), ("k", masks["key_mask"])):
            args[name][~mask] = float("nan")
        with poisoned_allocations():
            scores = mmkernels.attention_column_scores(**(wide | args), backend="native")
        terms = 8 + 4 * headdim**0.5
        assert_within(f"{seqlen} keys", scores, truth, dtype=torch.promote_types(dtype, torch.float32), terms=terms)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matching_is_the_slow_one(isa, dtype):
    # Places around vectors, panels of 8 to 64 columns and blocks of 24 rows; cosines that are far apart in any dtype.
    for tokens, dim, protect, r in ((3, 1, 0, 1), (35, 7, 1, 17), (101, 33, 2, 20), (131, 16, 0, 65)):
        metric = torch.randn(2, tokens, dim, generator=torch.Generator().manual_seed(tokens)).to(dtype)
        views = metric.repeat(1, 2, 1)[:, 1 : 1 + tokens]
        slow = mmkernels.bipartite_soft_matching(views.double(), r, protect=protect, order="sets", backend="torch")
        with poisoned_allocations():
            plan = mmkernels.bipartite_soft_matching(views, r, protect=protect, order="sets", backend="native")
        assert torch.equal(plan.keep_indices, slow.keep_indices)
        assert torch.equal(plan.assignment, slow.assignment)
        torch.testing.assert_close(plan.similarity.double(), slow.similarity, rtol=1e-5, atol=1e-6)


def test_a_plan_that_points_elsewhere_is_refused():
    plan = mmkernels.bipartite_soft_matching(torch.randn(2, 6, 4), 2)
    for name, wrong in (("keep_indices", 6), ("assignment", 4), ("source", -1)):
        bent = plan._replace(**{name: getattr(plan, name).clone().index_fill_(1, torch.tensor([1]), wrong)})
        with pytest.raises(RuntimeError, match=f"{name} must be in 0"):
            mmkernels.merge_tokens(torch.randn(2, 6, 3), bent, backend="native")


def test_bits_do_not_depend_on_the_number_of_threads(isa):
    made = score_inputs(torch.Generator().manual_seed(0), 3, 300, 8, 64)
    q, k = made["q"].float(), made["k"].float()
    features, results, before = torch.randn(3, 299, 512), [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            scores = mmkernels.cls_attention_scores(q, k, backend="native")
            columns = mmkernels.attention_column_scores(k, k, backend="native")
            kept = mmkernels.prune_tokens(features, scores, num_keep=99, backend="native")
            plan = mmkernels.bipartite_soft_matching(features, 99, protect=1, backend="native")
            merged = mmkernels.merge_tokens(features, plan, backend="native")
            results.append((scores, columns, *kept, *plan, *merged))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_raw_calls_with_more_to_keep_than_there_is_write_padding():
    mask = torch.tensor([[True, False, True]])
    tokens, indices, positions, real, _ = ops.prune_tokens(
        torch.ones(1, 3, 2), torch.rand(1, 3), mask, None, None, 3, -1
    )
    assert indices.tolist() == [[0, 2, -1]]
    assert positions.tolist() == [[0, 1, 0]]
    assert real.tolist() == [[True, True, False]]
    assert tokens[0, 2].tolist() == [0, 0]


def test_raw_calls_are_checked():
    features, scores = torch.ones(2, 3, 2), torch.rand(2, 3)
    with pytest.raises(RuntimeError, match="total must be the sum"):
        ops.prune_tokens(features, scores, None, None, None, 2, 5)
    with pytest.raises(RuntimeError, match="a count must be in"):
        ops.prune_tokens(features, scores, None, None, torch.tensor([1, 3]), 2, -1)
    q, k = torch.ones(1, 1, 1, 2), torch.ones(1, 2, 1, 2)
    with pytest.raises(RuntimeError, match="query_mask has another shape"):
        ops.attention_column_scores(q, k, None, 1.0, 0, torch.ones(1, 2, dtype=torch.bool), None, False)
    with pytest.raises(RuntimeError, match="num_prefix"):
        ops.cls_attention_scores(torch.ones(1, 1, 1, 2), torch.ones(1, 2, 1, 2), None, 1.0, 3, 1.0)


def test_opcheck():
    features, scores = torch.randn(2, 5, 3, requires_grad=True), torch.rand(2, 5)
    for args in (
        (features, scores, None, None, None, 2, -1),
        (features, scores, torch.rand(2, 5) < 0.9, torch.arange(10).view(2, 5), torch.tensor([1, 2]), 2, 3),
    ):
        torch.library.opcheck(ops.prune_tokens_fwd.default, args)
    q, k = torch.randn(2, 1, 2, 4, requires_grad=True), torch.randn(2, 5, 1, 4, requires_grad=True)
    torch.library.opcheck(ops.cls_attention_scores_fwd.default, (q, k, None, 0.5, 1, 1.0))
    seen = torch.ones(2, 5, dtype=torch.bool)
    torch.library.opcheck(ops.attention_column_scores_fwd.default, (q, k, None, 0.5, 1, None, seen, True))
    # Compiling these is the contract's business: opcheck cannot add up outputs of which the first are int64.
    quick = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.bipartite_soft_matching_fwd.default, (features, 2, 1, False), test_utils=quick)
    plan = mmkernels.bipartite_soft_matching(features.detach(), 2, backend="native")[:3]
    weight = (torch.rand(2, 5) + 1).requires_grad_()
    torch.library.opcheck(ops.merge_tokens_fwd.default, (features, *plan, weight), test_utils=quick)
    merged, totals = ops.merge_tokens(features.detach(), *plan, weight.detach())
    args = (merged, totals, features.detach(), *plan, None, totals)
    torch.library.opcheck(ops.merge_tokens_bwd.default, args, test_utils=quick)
