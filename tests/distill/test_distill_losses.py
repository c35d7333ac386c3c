import math

import pytest
import torch
from torch.nn import functional as F

from mmkernels.distill import layer_errors, layerwise_mse, logit_kl, token_mask
from mmkernels.distill import losses as module
from mmkernels.errors import ConfigError, DataError, ShapeError


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture
def contexts():
    return [draw(2, 5, 4, 3, seed=s) for s in range(3)], [draw(2, 5, 4, 3, seed=s + 10) for s in range(3)]


@pytest.fixture
def mask():
    return torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()


def test_mse_is_the_written_formula(contexts, mask):
    ours, theirs = contexts
    plain = sum(F.mse_loss(a, b) for a, b in zip(ours, theirs, strict=True)) / 3
    torch.testing.assert_close(layerwise_mse(ours, theirs), 1000 * plain)
    by_hand = sum(((a - b)[mask] ** 2).mean() for a, b in zip(ours, theirs, strict=True)) / 3
    torch.testing.assert_close(layerwise_mse(ours, theirs, mask, scale=2.0), 2 * by_hand)
    torch.testing.assert_close(layerwise_mse(ours, theirs, mask, reduction="token_sum"), 1000 * by_hand * 12)
    assert layer_errors(ours, theirs).shape == (3,)


def test_mse_ignores_what_stands_at_padding(contexts, mask):
    ours, theirs = contexts
    broken = [b.masked_fill(~mask[..., None, None], math.nan) for b in theirs]
    leaves = [a.masked_fill(~mask[..., None, None], math.nan).requires_grad_() for a in ours]
    loss = layerwise_mse(leaves, broken, mask)
    torch.testing.assert_close(loss, layerwise_mse(ours, theirs, mask))
    loss.backward()
    for leaf in leaves:
        assert leaf.grad[mask].isfinite().all()
        assert (leaf.grad[~mask] == 0).all()


def test_mse_in_bfloat16_accumulates_in_float32(contexts):
    ours, theirs = ([x.bfloat16() for x in part] for part in contexts)
    wide = layerwise_mse([x.float() for x in ours], [x.float() for x in theirs])
    assert layerwise_mse(ours, theirs).dtype == torch.float32
    torch.testing.assert_close(layerwise_mse(ours, theirs), wide, rtol=0, atol=0)


def test_mse_gradcheck(contexts, mask):
    ours, theirs = contexts
    ours = [x.requires_grad_() for x in ours]
    for reduction in module.MSE_REDUCTIONS:
        assert torch.autograd.gradcheck(
            lambda *x, r=reduction: layerwise_mse(x, theirs, mask, scale=3.0, reduction=r), ours
        )


def textbook_kl(student, teacher, temperature):
    p, q = ((x / temperature).softmax(-1) for x in (teacher, student))
    return temperature**2 * (p * (p.log() - q.log())).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk", [1, 7 * 3, 1 << 20])
def test_kl_is_the_written_formula(mask, temperature, chunk, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", chunk)
    ours, theirs = draw(2, 5, 7).requires_grad_(), draw(2, 5, 7, seed=9)
    each = textbook_kl(ours, theirs, temperature)
    options = {"temperature": temperature}
    for reduction in ("sequence_sum", "batchmean"):
        torch.testing.assert_close(logit_kl(ours, theirs, reduction=reduction, **options), each.sum() / 2)
    torch.testing.assert_close(logit_kl(ours, theirs, reduction="token_mean", **options), each.mean())
    torch.testing.assert_close(logit_kl(ours, theirs, mask, reduction="token_mean", **options), each[mask].mean())
    torch.testing.assert_close(logit_kl(ours, theirs, mask, **options), each[mask].sum() / 2)
    assert torch.autograd.gradcheck(lambda x: logit_kl(x, theirs, mask, reduction="token_mean", **options), ours)


def test_kl_equals_torch_batchmean():
    ours, theirs = draw(3, 4, 11), draw(3, 4, 11, seed=1)
    ideal = F.kl_div(ours.log_softmax(-1), theirs.softmax(-1), reduction="batchmean")
    torch.testing.assert_close(logit_kl(ours, theirs, reduction="batchmean"), ideal)


def test_kl_of_equal_logits_is_zero_with_zero_gradient():
    logits = draw(2, 3, 5, dtype=torch.float32).requires_grad_()
    loss = logit_kl(logits, logits.detach().clone())
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.abs().max() == 0


def test_kl_with_forbidden_words_and_nan_at_padding(mask):
    ours, theirs = draw(2, 5, 7), draw(2, 5, 7, seed=3)
    theirs[..., 2] = -math.inf
    theirs[~mask] = math.nan
    ours = ours.requires_grad_()
    loss = logit_kl(ours, theirs, mask)
    loss.backward()
    assert loss.isfinite()
    assert ours.grad.isfinite().all()
    assert (ours.grad[~mask] == 0).all()


def test_kl_empty_mask_is_zero():
    ours = draw(2, 3, 5).requires_grad_()
    loss = logit_kl(ours, draw(2, 3, 5, seed=1), torch.zeros(2, 3).bool(), reduction="token_mean")
    loss.backward()
    assert loss.item() == 0
    assert (ours.grad == 0).all()


def test_kl_in_bfloat16_has_float32_value_and_narrow_gradient():
    ours, theirs = draw(2, 3, 50).bfloat16().requires_grad_(), draw(2, 3, 50, seed=1).bfloat16()
    loss = logit_kl(ours, theirs)
    torch.testing.assert_close(loss, logit_kl(ours.float(), theirs.float()), rtol=0, atol=0)
    loss.backward()
    assert ours.grad.dtype == torch.bfloat16


def test_kl_saves_no_wide_copies():
    # what autograd keeps between forward and backward must be the logits themselves, not float32 probabilities
    ours, theirs = draw(2, 3, 50).bfloat16().requires_grad_(), draw(2, 3, 50, seed=1).bfloat16()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        logit_kl(ours, theirs)
    assert {x.untyped_storage().data_ptr() for x in kept if x.is_floating_point()} == {
        x.untyped_storage().data_ptr() for x in (ours, theirs)
    }


def test_kl_second_derivatives(mask):
    theirs = draw(2, 5, 4, seed=1)
    ours = draw(2, 5, 4).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: logit_kl(x, theirs, mask, temperature=1.5), ours)


def test_masks():
    batch = {"attention_mask": torch.tensor([[0, 1, 1, 1]]), "labels": torch.tensor([[-100, -100, 7, 8]])}
    assert token_mask("all", batch) is None
    assert token_mask("non_pad", {}) is None
    assert token_mask("non_pad", batch).tolist() == [[False, True, True, True]]
    assert token_mask("answer", batch).tolist() == [[False, True, True, False]]  # one position before each label
    given = {**batch, "answer_mask": torch.tensor([[0, 0, 0, 1]])}
    assert token_mask("answer", given).tolist() == [[False, False, False, True]]
    with pytest.raises(DataError, match="answer_mask or labels"):
        token_mask("answer", {"input_ids": batch["labels"]})
    with pytest.raises(ConfigError, match="Did you mean 'non_pad'"):
        token_mask("nonpad", batch)


def test_bad_arguments(contexts, mask):
    ours, theirs = contexts
    with pytest.raises(ShapeError, match="3 and 2"):
        layerwise_mse(ours, theirs[:2])
    with pytest.raises(ShapeError, match=r"student_contexts\[0\]"):
        layerwise_mse([x[:, 1:] for x in ours], theirs)
    with pytest.raises(ShapeError, match="mask"):
        layerwise_mse(ours, theirs, mask[:, 1:])
    with pytest.raises(ConfigError, match="Did you mean 'element_mean'"):
        layerwise_mse(ours, theirs, reduction="elementmean")
    with pytest.raises(ShapeError, match="vocabulary of 7 words; got 6"):
        logit_kl(draw(2, 5, 6), draw(2, 5, 7))
    with pytest.raises(ShapeError, match="same batch"):
        logit_kl(draw(2, 4, 7), draw(2, 5, 7))
    with pytest.raises(ShapeError, match="mask"):
        logit_kl(draw(2, 5, 7), draw(2, 5, 7), mask[:1])
    with pytest.raises(ConfigError, match="temperature must be positive"):
        logit_kl(draw(2, 5, 7), draw(2, 5, 7), temperature=0.0)
    with pytest.raises(ConfigError, match="Known: batchmean"):
        logit_kl(draw(2, 5, 7), draw(2, 5, 7), reduction="mean")
