"""The upstream backend's cutting and merging, with a stand-in for flash-attn: same signatures, plain mathematics."""

import importlib
import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mmkernels
from mmkernels import BackendError, MMAMask, mma_attention, mma_mask
from mmkernels.testing.cases_mma_attention import attention_inputs

CALLS = []


def keep_of(rows, keys, causal, left, right):
    # flash-attn's convention: the last row is aligned with the last key, a window counts keys beside the row's own
    distance = torch.arange(rows)[:, None] + keys - rows - torch.arange(keys)
    keep = torch.ones(rows, keys, dtype=torch.bool)
    if causal or right >= 0:
        keep &= distance >= -max(right, 0)
    return keep & (distance <= left) if left >= 0 else keep


def sequences(cu_q, cu_k):
    return zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), cu_k[:-1].tolist(), cu_k[1:].tolist(), strict=True)


def scores_of(q, k, keep, scale):
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return (scale * torch.einsum("qhd,khd->hqk", q, k)).masked_fill(~keep, float("-inf"))


def varlen_forward(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
    window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False, block_table=None,
):  # fmt: skip
    CALLS.append((causal, window_size_left, q.shape[0], k.shape[0]))
    assert dropout_p == 0
    assert q.shape[0] == cu_seqlens_q[-1]
    assert k.shape[0] == cu_seqlens_k[-1]
    assert (max_seqlen_q, max_seqlen_k) == (cu_seqlens_q.diff().max(), cu_seqlens_k.diff().max())
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    out, lse = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0])
    for a, z, c, e in sequences(cu_seqlens_q, cu_seqlens_k):
        keep = keep_of(z - a, e - c, causal, window_size_left, window_size_right)
        assert keep.any(1).all()
        scores = scores_of(q[a:z], k[c:e], keep, softmax_scale)
        lse[:, a:z] = scores.logsumexp(-1)
        values = v[c:e].repeat_interleave(q.shape[1] // k.shape[1], 1)
        out[a:z] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
    return out, lse.float(), torch.empty(0), torch.empty(2)


def varlen_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
    softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
):  # fmt: skip
    """As the kernel does it: P from the lse given, D from the out given."""
    group = q.shape[1] // k.shape[1]
    for a, z, c, e in sequences(cu_seqlens_q, cu_seqlens_k):
        keep = keep_of(z - a, e - c, causal, window_size_left, window_size_right)
        p = torch.exp(scores_of(q[a:z], k[c:e], keep, softmax_scale) - softmax_lse[:, a:z, None])
        delta = (dout[a:z] * out[a:z]).sum(-1).t()[..., None]
        values, keys = (t[c:e].repeat_interleave(group, 1) for t in (v, k))
        ds = p * (torch.einsum("qhd,khd->hqk", dout[a:z], values) - delta)
        dq[a:z] = softmax_scale * torch.einsum("hqk,khd->qhd", ds, keys)
        dk[c:e] = (softmax_scale * torch.einsum("hqk,qhd->khd", ds, q[a:z])).unflatten(1, (-1, group)).sum(2)
        dv[c:e] = torch.einsum("hqk,qhd->khd", p, dout[a:z]).unflatten(1, (-1, group)).sum(2)
    return torch.empty(0)


@pytest.fixture(scope="module")
def upstream():
    """The backend's module, imported over the stand-in."""
    name = "mmkernels.ops.mma_attention._upstream"
    interface = types.ModuleType("flash_attn.flash_attn_interface")
    interface._flash_attn_varlen_forward, interface._flash_attn_varlen_backward = varlen_forward, varlen_backward
    stand_in = {"flash_attn": types.ModuleType("flash_attn"), "flash_attn.flash_attn_interface": interface}
    before = {key: sys.modules.pop(key, None) for key in (name, *stand_in)}
    sys.modules.update(stand_in)
    yield importlib.import_module(name)
    for key, module in before.items():
        sys.modules.pop(key, None)
        if module is not None:
            sys.modules[key] = module


def run(function, args, leaves):
    out, lse = function(*leaves)
    direction = torch.cos(torch.arange(out.numel(), dtype=out.dtype)).view_as(out)
    return out, lse, *torch.autograd.grad(out, leaves, direction)


def compare(upstream, args):
    mask = args.pop("mask")
    leaves = [args[n].requires_grad_() for n in "qkv"]
    expected = run(lambda *t: mma_attention(*t, mask, return_lse=True, backend="reference"), args, leaves)
    tensors = (mask.row_start, mask.row_end, mask.rects)
    actual = run(
        lambda *t: upstream.mma_attention(*t, *tensors, leaves[0].shape[3] ** -0.5, None, True)[:2], args, leaves
    )
    # The merge keeps float32 sums, as for 16-bit inputs; the stand-in itself is float64.
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_mask_is_cut_into_runs_and_merged(upstream, data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    batch, qlen, klen = (data.draw(st.integers(1, n)) for n in (2, 12, 12))
    rects = torch.stack(
        [torch.randint(0, n + 1, (3,), generator=generator) for n in (batch - 1, qlen, qlen, klen, klen)], 1
    )
    ends = torch.randint(-1, klen + 2, (2, batch, qlen), generator=generator, dtype=torch.int32)
    ends = ends.sort(-1).values if data.draw(st.booleans()) else ends  # some with long runs
    mask = MMAMask(ends[0], ends[1], rects[rects[:, 0].argsort()].int(), klen)
    compare(upstream, attention_inputs(generator, batch, qlen, 4, 2, 5, klen, mask=mask))


@pytest.mark.parametrize(
    ("mask", "calls"),
    [
        (MMAMask.causal(20), [(True, -1, 20, 20)]),
        (MMAMask.full(20), [(False, -1, 20, 20)]),
        (MMAMask.causal(5, 20), [(True, -1, 5, 20)]),
        (mma_mask(20, spans=[(0, 2, 8, 8, 14)]), [(True, -1, 20, 20), (False, -1, 6, 6)]),  # AKI: two calls
        (MMAMask.sliding_window(20, 4), [(True, -1, 4, 4), (True, 3, 16, 19)]),
        (MMAMask.documents(torch.tensor([0, 6, 9, 20]), 20), [(True, -1, 20, 20)]),
    ],
)
def test_usual_masks_take_the_calls_they_should(upstream, mask, calls):
    args = attention_inputs(torch.Generator().manual_seed(0), 1, mask.qlen, 4, 2, 5, mask.klen, mask=mask)
    CALLS.clear()
    compare(upstream, args)
    assert [c for c in CALLS if c[2]] == calls


def test_no_gradient_through_lse(upstream):
    mask = MMAMask.causal(3)
    q = torch.randn(1, 3, 2, 4, requires_grad=True)
    out, lse, _ = upstream.mma_attention(q, q, q, mask.row_start, mask.row_end, mask.rects, 0.5, None, True)
    with pytest.raises(BackendError, match=r"no gradient through lse"):
        (out.sum() + lse.sum()).backward()


def test_it_declines_what_flash_attn_cannot_do():
    from mmkernels.ops.mma_attention.api import MMA_ATTENTION

    declines = MMA_ATTENTION.entries["upstream"].declines
    assert declines(q=torch.zeros(1, 1, 1, 64).half(), mass_weights=None) == []
    reasons = declines(q=torch.zeros(1, 1, 1, 260), mass_weights=torch.ones(1, 1))
    assert [r.split(";")[0] for r in reasons] == [
        "flash-attn takes float16 and bfloat16",
        "flash-attn takes head dimensions up to 256 in steps of 8",
        "flash-attn returns no attention mass",
    ]
    with pytest.raises(BackendError, match=r"it runs on cuda; the tensors are on cpu"):
        mma_attention(*torch.zeros(3, 1, 1, 1, 8).half(), backend="upstream")
    assert "upstream" in mmkernels.backends()["mma_attention"]
