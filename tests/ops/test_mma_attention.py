"""What is special to mma_attention: torch's attention, split sequences, memory, mass, rows without keys, errors."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import mmkernels
from mmkernels import DeviceError, DtypeError, MMAMask, ShapeError, mma_attention, mma_mask
from mmkernels.ops.mma_attention import _torch
from mmkernels.testing.cases_mma_attention import attention_inputs

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)
EXACT = {"rtol": 1e-11, "atol": 1e-11}  # float64: sums of at most a few hundred terms in another order
READY = [name for name in ("native", "torch") if mmkernels.backends()["mma_attention"].get(name) == "ready"]
every_backend = pytest.mark.parametrize("backend", [*READY, "reference"])
fast_backend = pytest.mark.parametrize("backend", READY)


def inputs(seed, *sizes, **options):
    return attention_inputs(torch.Generator().manual_seed(seed), *sizes, **options)


@st.composite
def problems(draw):
    """Keyword arguments of a random small call with a random mask."""
    batch, qlen, klen = draw(st.integers(1, 2)), draw(st.integers(1, 20)), draw(st.integers(1, 20))
    nkvheads, group, headdim = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def random(top, *shape):
        return torch.randint(-1, top + 2, shape, generator=generator, dtype=torch.int32)

    rects = torch.cat([torch.zeros(3, 1).int(), random(qlen, 3, 2), random(klen, 3, 2)], 1)
    rects[1:, 0] = batch - 1
    mask = MMAMask(random(klen, batch, qlen), random(klen, batch, qlen), rects[: draw(st.integers(0, 3))], klen)
    sizes = (batch, qlen, nkvheads * group, nkvheads, headdim, klen)
    return attention_inputs(generator, *sizes, mask=mask, return_lse=True, weigh=draw(st.booleans()))


@fast_backend
@PROPERTY
@given(args=problems())
def test_equals_the_reference_on_any_mask(backend, args):
    equals_the_reference(backend, args)


@PROPERTY
@given(args=problems())
def test_torch_backend_by_tiny_blocks_equals_the_reference(args):
    # As long sequences are cut: several blocks of rows, gaps between live keys, few heads at a time.
    with mock.patch.multiple(_torch, _BLOCK=4, _SMALL=0, _SCORES=32):
        equals_the_reference("torch", args)


def equals_the_reference(backend, args):
    args = {k: v.requires_grad_() if k in "qkv" else v for k, v in args.items()}
    outcomes = []
    for name in (backend, "reference"):
        outputs = mma_attention(**args, backend=name)
        directions = [torch.cos(torch.arange(o.numel(), dtype=o.dtype)).view_as(o) for o in outputs[:2]]
        grads = torch.autograd.grad(outputs[:2], [args[n] for n in "qkv"], directions)
        outcomes.append((*outputs, *grads))
    for actual, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(actual, expected, **EXACT)


@every_backend
@pytest.mark.parametrize("causal", [False, True])
def test_equals_torch_attention(backend, causal):
    args = inputs(0, 2, 70, 6, 2, 24, 70 if causal else 50, mask=None if causal else MMAMask.full(70, 50, batch=2))
    q, k, v = (args[n].transpose(1, 2) for n in "qkv")
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    torch.testing.assert_close(mma_attention(**args, backend=backend), expected.transpose(1, 2), **EXACT)


@every_backend
def test_equals_torch_attention_with_the_dense_mask(backend):
    mask = mma_mask(300, spans=[(0, 20, 164, 164, 205), (1, 140, 170, 170, 171)], batch=2)
    args = inputs(1, 2, 300, 2, 2, 16, mask=mask)
    q, k, v = (args[n].transpose(1, 2) for n in "qkv")
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.dense()[:, None])
    torch.testing.assert_close(mma_attention(**args, backend=backend), expected.transpose(1, 2), **EXACT)


@fast_backend
def test_prefill_in_chunks_and_steps_equals_one_call(backend):
    spans = [(0, 3, 40, 40, 60)]
    args = inputs(2, 1, 150, 4, 2, 8, mask=mma_mask(150, spans=spans))
    q, k, v = args["q"], args["k"], args["v"]
    whole = mma_attention(**args, backend=backend)
    pieces, start = [], 0
    for stop in (2, 60, 149, 150):  # before the span, the whole span, text, one token
        mask = mma_mask(stop - start, stop, spans=[s for s in spans if s[4] <= stop])
        pieces.append(mma_attention(q[:, start:stop], k[:, :stop], v[:, :stop], mask, backend=backend))
        start = stop
    torch.testing.assert_close(torch.cat(pieces, 1), whole, **EXACT)


@fast_backend
def test_packed_documents_equal_separate_ones(backend):
    bounds = torch.tensor([0, 40, 41, 41, 170])
    spans = [(0, 2, 10, 10, 30), (0, 50, 100, 100, 130)]
    args = inputs(3, 1, 170, 2, 1, 8, mask=mma_mask(170, spans=spans, cu_seqlens=bounds))
    together = mma_attention(**args, backend=backend)
    for a, z, own in ((0, 40, [(0, 2, 10, 10, 30)]), (40, 41, []), (41, 170, [(0, 9, 59, 59, 89)])):
        q, k, v = (args[n][:, a:z] for n in "qkv")
        alone = mma_attention(q, k, v, mma_mask(z - a, spans=own), backend=backend)
        torch.testing.assert_close(together[:, a:z], alone, **EXACT)


@fast_backend
def test_padding_on_either_side_changes_nothing(backend):
    args = inputs(4, 1, 20, 4, 2, 8, mask=mma_mask(20, spans=[(0, 2, 9, 9, 14)]))
    alone = mma_attention(**args, backend=backend)
    rows = torch.zeros(2, 27, dtype=torch.int64)
    rows[0, 7:], rows[1, :20] = 1, 1
    mask = mma_mask(27, spans=[(0, 9, 16, 16, 21), (1, 2, 9, 9, 14)], attention_mask=rows)
    q, k, v = (
        torch.cat([F.pad(args[n], (0, 0, 0, 0, 7, 0), value=5.0), F.pad(args[n], (0, 0, 0, 0, 0, 7))]) for n in "qkv"
    )
    out, lse = mma_attention(q, k, v, mask, return_lse=True, backend=backend)
    torch.testing.assert_close(out[:1, 7:], alone, **EXACT)
    torch.testing.assert_close(out[1:, :20], alone, **EXACT)
    assert not out[0, :7].any()
    assert (lse[1, :, 20:] == float("-inf")).all()


@every_backend
def test_rows_without_keys_take_no_part(backend):
    mask = MMAMask(torch.tensor([[0, 2, 0]]).int(), torch.tensor([[1, 2, 3]]).int(), torch.zeros(0, 5).int(), 3)
    args = inputs(5, 1, 3, 2, 2, 4)
    q, k, v = (args[n].requires_grad_() for n in "qkv")
    out, lse = mma_attention(q, k, v, mask, return_lse=True, backend=backend)
    assert not out[0, 1].any()
    assert (lse[0, :, 1] == float("-inf")).all()
    assert torch.isfinite(lse[0, :, [0, 2]]).all()
    # a cotangent at the dead row, whatever it is, must not reach anything
    direction = torch.ones_like(lse)
    direction[0, :, 1] = 1e6
    grads = torch.autograd.grad([out, lse], [q, k, v], [torch.ones_like(out), direction])
    direction[0, :, 1] = 0
    again = torch.autograd.grad(
        mma_attention(q, k, v, mask, return_lse=True, backend=backend), [q, k, v], [torch.ones_like(out), direction]
    )
    assert not grads[0][0, 1].any()
    for one, other in zip(grads, again, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@every_backend
def test_mass_is_the_weighted_sum_of_attention_rows(backend):
    mask = mma_mask(12, spans=[(0, 1, 6, 6, 9)])
    args = inputs(6, 1, 12, 4, 2, 8, mask=mask)
    weights = torch.zeros(1, 12).index_fill(1, torch.tensor([11]), 1.0)
    out, mass = mma_attention(**args, mass_weights=weights, backend=backend)
    k = args["k"].repeat_interleave(2, 2)
    scores = torch.einsum("hd,khd->hk", args["q"][0, 11], k[0]) * 8**-0.5
    torch.testing.assert_close(mass[0], scores.softmax(-1), **EXACT)
    torch.testing.assert_close(mass.sum(-1), torch.ones(1, 4, dtype=torch.float64), **EXACT)
    torch.testing.assert_close(out, mma_attention(**args, backend=backend), **EXACT)
    assert mass.dtype == torch.float64
    half = {k: v.bfloat16() if k in "qkv" else v for k, v in args.items()}
    assert mma_attention(**half, mass_weights=weights, backend=backend)[1].dtype == torch.float32


@fast_backend
def test_lse_merges_disjoint_keys(backend):
    args = inputs(7, 1, 9, 2, 2, 4, mask=MMAMask.full(9))
    q, k, v = args["q"], args["k"], args["v"]
    whole, total = mma_attention(**args, return_lse=True, backend=backend)
    parts = [
        mma_attention(q, k[:, a:z], v[:, a:z], MMAMask.full(9, z - a), return_lse=True, backend=backend)
        for a, z in ((0, 4), (4, 9))
    ]
    torch.testing.assert_close(torch.logaddexp(parts[0][1], parts[1][1]), total, **EXACT)
    merged = sum(out * torch.exp(lse - total).transpose(1, 2)[..., None] for out, lse in parts)
    torch.testing.assert_close(merged, whole, **EXACT)


@fast_backend
def test_large_scores_do_not_overflow(backend):
    args = {k: v.float() * 40 if k in "qk" else v for k, v in inputs(8, 1, 33, 2, 2, 16).items()}
    args["v"] = args["v"].float()
    out, lse = mma_attention(**args, return_lse=True, backend=backend)
    assert torch.isfinite(out).all()
    assert torch.isfinite(lse).all()
    torch.testing.assert_close(out, mma_attention(**args, backend="reference"), rtol=1e-4, atol=1e-4)


def peak_of(function, *args):
    """Largest number of elements alive in tensors that `function` allocates at once, by torch's own bookkeeping."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function(*args)
    peak = held = 0
    for event in sorted(
        (e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    ):
        held += event.nbytes()
        peak = max(peak, held)
    return peak // 4


def test_torch_backend_never_holds_a_square():
    length = 4096
    mask = mma_mask(length, spans=[(0, 10, 3000, 3000, 3100)])
    q = torch.randn(1, length, 1, 8, requires_grad=True)

    def train(backend):
        mma_attention(q, q, q, mask, backend=backend).sum().backward()

    assert peak_of(train, "torch") < length * length // 4
    assert peak_of(train, "reference") > length * length  # that the ruler measures


def test_torch_backend_visits_live_tiles_only(monkeypatch):
    mask = mma_mask(1024, spans=[(0, 0, 256, 640, 768)])
    live, _ = mask.tiles(128, 128)
    visited = []
    original = _torch._Blocks.pick

    def counting(keys, item, heads):
        visited.append((item.start, tuple(item.segments)))
        return original(keys, item, heads)

    monkeypatch.setattr(_torch._Blocks, "pick", staticmethod(counting))
    q = torch.randn(1, 1024, 1, 4)
    mma_attention(q, q, q, mask, backend="torch")
    keys = {start: sum(z - a for a, z in segments) for start, segments in visited}
    assert [keys[128 * i] for i in range(8)] == (live[0].sum(1) * 128).tolist()
    assert dict(visited)[0] == ((0, 128), (640, 768))


def test_torch_func_and_forward_mode():
    args = inputs(9, 1, 6, 2, 1, 4, mask=mma_mask(6, spans=[(0, 1, 3, 3, 5)]))

    def loss(q):
        out, lse = mma_attention(q, args["k"], args["v"], args["mask"], return_lse=True)
        return (out.sin().sum() + lse.cos().sum()) / 7

    q = args["q"].clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(q), q)
    torch.testing.assert_close(torch.func.grad(loss)(args["q"]), expected, **EXACT)
    direction = torch.ones_like(args["q"])
    _, slope = torch.func.jvp(loss, (args["q"],), (direction,))
    torch.testing.assert_close(slope, expected.sum(), **EXACT)


@fast_backend
def test_second_derivatives_when_keys_come_from_queries(backend):
    x = torch.randn(1, 5, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def function(x):
        return mma_attention(x, x.sin(), (x * x).cos(), backend=backend)

    assert torch.autograd.gradgradcheck(function, (x,))
    # and the gradient that can be differentiated is the gradient: k's own dependence on q counts once
    (plain,) = torch.autograd.grad(function(x).square().sum(), x)
    (again,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
    torch.testing.assert_close(again, plain, **EXACT)


def test_autocast_leaves_the_arguments_in_charge():
    args = {k: v.float() if k in "qkv" else v for k, v in inputs(10, 1, 9, 2, 2, 8).items()}
    expected = mma_attention(**args)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(mma_attention(**args), expected)


def test_a_compiled_call_may_build_its_mask():
    args = inputs(11, 2, 9, 2, 2, 8)

    def call(q, k, v):
        return mma_attention(q, k, v, mma_mask(q.shape[1], batch=q.shape[0], window=4), backend="torch")

    q, k, v = (args[n] for n in "qkv")
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), call(q, k, v), **EXACT)


def call(**changes):
    q = torch.zeros(2, 4, 4, 8)
    kv = torch.zeros(2, 6, 2, 8)
    return mma_attention(**{"q": q, "k": kv, "v": kv, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": torch.zeros(2, 4, 3, 8)}, ShapeError, r"nkvheads must divide nheads; got nkvheads=2, nheads=3"),
        ({"q": torch.zeros(2, 4, 8)}, ShapeError, r"q must have shape \(batch, qlen, nheads, headdim\)"),
        ({"q": torch.zeros(2, 7, 4, 8)}, ShapeError, r"at least as many tokens as q for the causal mask"),
        (
            {"q": torch.zeros(2, 4, 4, 0), "k": torch.zeros(2, 6, 2, 0), "v": torch.zeros(2, 6, 2, 0)},
            ShapeError,
            "headdim >= 1",
        ),
        ({"v": torch.zeros(2, 5, 2, 8)}, ShapeError, r"v must have shape \(batch=2, klen=6, nkvheads=2, headdim=8\)"),
        ({"k": torch.zeros(2, 6, 2, 8).half()}, DtypeError, r"k must have the dtype of q"),
        ({"q": torch.zeros(2, 4, 4, 8).int()}, DtypeError, r"q must be float32, bfloat16, float16 or float64"),
        ({"mask": torch.ones(2, 1, 4, 6)}, DtypeError, r"mask must be an MMAMask or None; got Tensor"),
        ({"mask": MMAMask.causal(4, 6)}, ShapeError, r"batch=2, qlen=4, klen=6; got batch=1"),
        ({"mask": MMAMask.causal(4, 5, batch=2)}, ShapeError, r"mask must be for .*klen=5"),
        ({"mass_weights": torch.ones(2, 6)}, ShapeError, r"mass_weights must have shape \(batch=2, qlen=4\)"),
        ({"mass_weights": torch.ones(2, 4).int()}, DtypeError, r"mass_weights must be float32"),
        ({"k": torch.zeros(2, 6, 2, 8, device="meta")}, DeviceError, r"k must be on cpu like q"),
    ],
)
def test_bad_input(changes, error, message):
    with pytest.raises(error, match=message):
        call(**changes)
