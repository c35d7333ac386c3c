"""The C++ attention: ISA levels, dtypes, tile edges, stretches, threads, strides; second derivatives; opcheck."""

import math

import pytest
import torch

import mmkernels
from mmkernels import MMAMask, _native, mma_mask
from mmkernels.testing import assert_within, error_of, poisoned_allocations
from mmkernels.testing.cases_mma_attention import attention_inputs

F32, F64 = torch.float32, torch.float64
BF16 = torch.bfloat16
DTYPES = [F32, BF16, torch.float16, F64]
ops = torch.ops.mmkernels


@pytest.fixture(params=_native.ISA_LEVELS)
def isa(request):
    if request.param not in _native.isa_levels():
        pytest.skip(f"this CPU has no {request.param}")
    with _native.use_isa(request.param):
        yield request.param


def inputs(dtype, *sizes, seed=0, **options):
    made = attention_inputs(torch.Generator().manual_seed(seed), *sizes, **options)
    return {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in made.items()}


def run(args, backend, dtype=None):
    """out, lse, mass if weighed, and the gradients in q, k and v, by name."""
    args = {k: v.detach().to(dtype or v.dtype) if isinstance(v, torch.Tensor) else v for k, v in args.items()}
    leaves = [args[n].requires_grad_() for n in ("q", "k", "v")]
    out, lse, *mass = mmkernels.mma_attention(**args, return_lse=True, backend=backend)
    generator = torch.Generator().manual_seed(5)
    seeds = [torch.randn(t.shape, generator=generator, dtype=F64).to(t.dtype) for t in (out, lse)]
    grads = torch.autograd.grad((out, lse), leaves, seeds)
    found = {"out": out.detach(), "lse": lse.detach(), **({"mass": mass[0]} if mass else {})}
    return {**found, **{f"grad of {n}": g for n, g in zip("qkv", grads, strict=True)}}


def assert_like_torch(args, what, dtype):
    summands = args["k"].shape[1] * (0 if dtype == F64 else 1)
    truth, peer = run(args, "reference", F64), run(args, "torch")
    with poisoned_allocations():
        got = run(args, "native")
    for name, value in got.items():
        # lse is a logarithm near 5, wrong by its own roundings alone; in float64 the truth is as wrong as the result.
        terms = 32 if dtype == F64 else 4
        assert_within(f"{name}, {what}", value, truth[name], peer[name], dtype=dtype, terms=terms, summands=summands)


def aki(seqlen, image=(2, 0.6), question=0.9, batch=1):
    """An image of rows 2 .. 0.6 seqlen that also sees the question after it, up to 0.9 seqlen."""
    end = int(image[1] * seqlen)
    return mma_mask(seqlen, spans=[(b, image[0], end, end, int(question * seqlen)) for b in range(batch)], batch=batch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_bar(isa, dtype):
    # Two query tiles and three key tiles; headdims around the vector widths; rows of two heads in one tile.
    for nheads, nkvheads, headdim in ((2, 2, 3), (4, 2, 17), (3, 1, 72), (2, 1, 128)):
        args = inputs(dtype, 1, 150, nheads, nkvheads, headdim, mask=aki(150), weigh=True)
        assert_like_torch(args, f"{nheads} {nkvheads} {headdim}", dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_rows_over_a_cache(isa, dtype):
    # Decoding: 1 to 3 rows, groups of 1 to 8 heads, headdims read in pairs of vectors and not; keys in stretches.
    for batch, qlen, nheads, nkvheads, headdim, klen in (
        (2, 1, 4, 4, 64, 70),
        (1, 1, 16, 2, 128, 600),
        (1, 3, 5, 1, 37, 1100),
        (3, 2, 6, 2, 96, 65),
    ):
        args = inputs(dtype, batch, qlen, nheads, nkvheads, headdim, klen, weigh=True)
        assert_like_torch(args, f"{qlen} {nheads} {nkvheads} {headdim} {klen}", dtype)


@pytest.mark.parametrize(("dtype", "bar"), [(F32, 3e-6), (BF16, 6e-3)], ids=str)
def test_every_number_of_queries_and_keys(isa, dtype, bar):
    # Against float64 alone, so that it stays cheap: rows and keys around the tiles of 96 and 64.
    whole = inputs(dtype, 1, 200, 2, 1, 5, mask=MMAMask.full(200, 200))
    for qlen, klen in ((n, m) for n in (1, 5, 16, 17, 47, 95, 96, 97, 193) for m in (1, 15, 63, 64, 65, 129, 200)):
        last = torch.arange(qlen).int()[None] + klen - qlen + 1
        rects = torch.tensor([[0, 0, qlen // 2 + 1, klen // 2, klen]]).int()
        mask = MMAMask(torch.zeros_like(last), last, rects, klen)
        args = {"q": whole["q"][:, :qlen], "k": whole["k"][:, :klen], "v": whole["v"][:, :klen], "mask": mask}
        want = run(args, "torch", F64)
        for name, value in run(args, "native").items():
            assert error_of(value, want[name]) < (3e-6 if name == "lse" else bar), f"{name}, {qlen} x {klen}"


def test_many_rows_over_many_keys_in_stretches(isa):
    # One head: too few tasks by rows alone, so that the keys are cut in two and joined.
    args = inputs(F32, 1, 30, 1, 1, 16, 2300, mask=mma_mask(30, 2300, spans=[(0, 2270, 2290, 2290, 2300)]), weigh=True)
    assert_like_torch(args, "stretches", F32)


def test_no_result_depends_on_threads(isa):
    shapes = ((1, 500, 4, 2, 40, None), (2, 1, 8, 2, 64, 1500), (1, 40, 2, 1, 32, 2200))
    before = torch.get_num_threads()
    for sizes in shapes:
        args = inputs(F32, *sizes, mask=aki(500) if sizes[5] is None else None, weigh=True)
        results = []
        try:
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                results.append(run(args, "native"))
        finally:
            torch.set_num_threads(before)
        for threads, result in zip((2, 5), results[1:], strict=True):
            for name, value in result.items():
                assert torch.equal(value, results[0][name]), f"{name} at {threads} threads, {sizes}"


def test_tensors_are_read_through_their_strides(isa):
    def embedded(t):
        wide = torch.full((*t.shape[:-1], t.shape[-1] + 5), math.nan)
        wide[..., 2:-3] = t
        return wide[..., 2:-3]

    layouts = {
        "slices of wider rows": embedded,
        "heads before tokens": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        "last dimension not dense": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
        "tokens first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    }
    for sizes in ((2, 130, 4, 2, 24, None), (2, 1, 4, 2, 40, 300)):
        dense = inputs(F32, *sizes, weigh=True)
        want = run(dense, "native")
        for layout, change in layouts.items():
            changed = {n: change(dense[n]) for n in ("q", "k", "v")}
            leaves = [t.requires_grad_() for t in changed.values()]
            out, lse, mass = mmkernels.mma_attention(**{**dense, **changed}, return_lse=True, backend="native")
            for name, value in (("out", out), ("lse", lse), ("mass", mass)):
                assert torch.equal(value, want[name]), f"{name}, {layout}"
            # A gradient that comes in through strides of 0.
            grads = torch.autograd.grad(out.sum(), leaves)
            plain = mmkernels.mma_attention(
                **{**dense, **{n: dense[n].requires_grad_() for n in "qkv"}}, backend="native"
            )
            ones = torch.autograd.grad(plain[0], [dense[n] for n in "qkv"], torch.ones_like(plain[0]))
            for name, a, b in zip("qkv", grads, ones, strict=True):
                assert torch.equal(a, b), f"grad of {name}, {layout}"


@pytest.mark.parametrize(("dtype", "bar"), [(F32, 1e-5), (BF16, 2e-2)], ids=str)
def test_keys_behind_every_interval_are_not_read(isa, dtype, bar):
    # A cache longer than what is in it, filled with NaN behind: as torch.empty may be.
    for qlen, klen, used in ((1, 300, 130), (120, 300, 137)):
        args = inputs(dtype, 1, qlen, 4, 2, 24, klen, mask=mma_mask(qlen, used))
        cut = {**args, "k": args["k"][:, :used], "v": args["v"][:, :used]}
        want = run(cut, "native")
        mask = cut["mask"]
        args["mask"] = MMAMask(mask.row_start, mask.row_end, mask.rects, klen)
        args["k"][:, used:] = math.nan
        args["v"][:, used:] = math.nan
        got = run(args, "native")
        for name in ("out", "lse", "grad of q"):
            # Where keys are cut in stretches more keys are cut elsewhere.
            torch.testing.assert_close(got[name], want[name], rtol=bar, atol=bar / 10, msg=f"{name}, {qlen}")
        for name in ("grad of k", "grad of v"):
            assert not got[name][:, used:].any(), name


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_keys_before_every_interval_or_rectangle_are_not_read(isa, dtype):
    # An odd number of them: the other half of a pair of keys.
    ends = torch.arange(41, 141).int()[None]
    rects = torch.tensor([[0, 3, 90, 150, 163]]).int()
    mask = MMAMask(torch.full_like(ends, 41), ends.clamp(max=121), rects, 170)
    args = inputs(dtype, 1, 100, 2, 1, 24, 170, mask=mask)
    want = run(args, "native")
    for name in ("k", "v"):
        args[name] = args[name].detach()
        args[name][:, :41] = args[name][:, 163:] = math.nan
    got = run(args, "native")
    for name in ("out", "lse", "grad of q"):
        assert torch.equal(got[name], want[name]), name


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_scales_of_no_and_of_the_other_sign(isa, dtype):
    for scale in (0.0, -0.4):
        assert_like_torch(inputs(dtype, 1, 150, 2, 1, 17, mask=aki(150), scale=scale), f"scale {scale}", dtype)


def test_nan_of_a_query_stays_in_its_row(isa):
    for qlen, klen in ((1, 70), (130, 130)):
        args = inputs(F32, 2, qlen, 2, 1, 24, klen)
        want = mmkernels.mma_attention(**args, backend="native")
        args["q"][1, 0, 1, 3] = math.nan
        got = mmkernels.mma_attention(**args, backend="native")
        assert got[1, 0, 1].isnan().all()
        got[1, 0, 1] = want[1, 0, 1]
        assert torch.equal(got, want)


def test_large_scores(isa):
    # exp of a score of 1e4 overflows, of -1e4 vanishes; the softmax depends on differences alone.
    for qlen in (1, 100):
        args = inputs(F32, 1, qlen, 2, 1, 32, 100, weigh=True, scale=1000.0)
        got, want = run(args, "native"), run(args, "reference", F64)
        for name, value in got.items():
            assert value.isfinite().all(), name
        # Scores of 1e4 in float32 are off by 1e-3, and so are the shares of keys that come close.
        for name in ("out", "lse", "mass"):
            assert error_of(got[name], want[name]) < 2e-2, name


def test_mass_is_shared_out_completely(isa):
    args = inputs(F32, 2, 200, 4, 2, 24, mask=aki(200, batch=2), weigh=True)
    mass = run(args, "native")["mass"]
    torch.testing.assert_close(mass.sum(-1), args["mass_weights"].sum(-1)[:, None].expand(2, 4), rtol=1e-5, atol=1e-5)


def test_rows_without_keys(isa):
    rows = torch.tensor([[[0, 5], [3, 3], [7, 2]] * 40]).int()
    mask = MMAMask(rows[..., 0].contiguous(), rows[..., 1].contiguous(), torch.empty(0, 5, dtype=torch.int32), 9)
    got = run(inputs(F32, 1, 120, 2, 1, 8, 9, mask=mask), "native")
    dead = torch.arange(120) % 3 > 0
    assert not got["out"][:, dead].any()
    assert (got["lse"][..., dead] == -math.inf).all()
    assert not got["grad of q"][:, dead].any()
    assert not got["grad of k"][:, 5:].any()
    assert all(value[:, ~dead].isfinite().all() for value in (got["out"], got["grad of q"]))


def test_hundreds_of_rectangles(isa):
    generator = torch.Generator().manual_seed(3)
    corners = torch.randint(0, 150, (300, 2, 2), generator=generator).sort(-1).values.flatten(1)
    rects = torch.cat([torch.arange(300)[:, None] // 150, corners], 1).int()
    empty = torch.zeros(2, 150, dtype=torch.int32)
    args = inputs(F32, 2, 150, 2, 1, 16, mask=MMAMask(empty, empty, rects, 150), weigh=True)
    assert_like_torch(args, "rectangles", F32)


def test_gradients_of_gradients():
    args = inputs(F64, 1, 5, 2, 1, 2, mask=aki(5))
    tensors = tuple(args[n].requires_grad_() for n in ("q", "k", "v"))

    def attend(*values):
        return mmkernels.mma_attention(*values, args["mask"], return_lse=True, backend="native")

    assert torch.autograd.gradcheck(attend, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(attend, tensors, fast_mode=True)

    def gradients(*values):
        out, lse = attend(*values)
        return torch.autograd.grad(out.sin().sum() + lse.sin().sum(), values, create_graph=True)

    # The incoming gradients depend on the inputs here: they must not be counted twice.
    assert torch.autograd.gradcheck(gradients, tensors, fast_mode=True)


@pytest.mark.parametrize("of", ["out", "lse"])
def test_a_gradient_of_one_output_alone(of):
    args = inputs(F32, 1, 120, 2, 1, 24)
    grads = []
    for backend, dtype in (("native", F32), ("reference", F64), ("torch", F32)):
        leaves = [args[n].to(dtype).requires_grad_() for n in ("q", "k", "v")]
        out, lse = mmkernels.mma_attention(*leaves, return_lse=True, backend=backend)
        chosen = (out if of == "out" else lse).square().sum()
        grads.append(torch.autograd.grad(chosen, leaves, allow_unused=True, materialize_grads=True))
    for name, native, truth, peer in zip("qkv", *grads, strict=True):
        assert_within(f"grad of {name}", native, truth, peer, terms=4)


def test_opcheck():
    args = inputs(F32, 1, 9, 2, 1, 4, mask=aki(9), weigh=True)
    mask = (args["mask"].row_start, args["mask"].row_end, args["mask"].rects)
    tensors = [args[n].requires_grad_() for n in ("q", "k", "v")]
    torch.library.opcheck(ops.mma_attention.default, (*(t.detach() for t in tensors), *mask, None, 0.5))
    torch.library.opcheck(ops.mma_attention_fwd.default, (*tensors, *mask, args["mass_weights"], 0.5))
    out, lse, _ = ops.mma_attention(*(t.detach() for t in tensors), *mask, None, 0.5)
    grads = torch.randn_like(out), torch.randn_like(lse)
    torch.library.opcheck(ops.mma_attention_bwd.default, (*grads, *tensors, *mask, out, lse, 0.5))


@pytest.mark.slow  # inductor compiles C++ for some seconds
def test_compiled_with_dynamic_shapes():
    def call(q, k, v):
        return mmkernels.mma_attention(q * 2, k, v, backend="native").tanh()

    compiled = torch.compile(call, fullgraph=True, dynamic=True)
    for seqlen in (3, 5, 70):
        made = inputs(F32, 2, seqlen, 4, 2, 8)
        tensors = [made[n].requires_grad_() for n in ("q", "k", "v")]
        got, want = (torch.autograd.grad(f(*tensors).sum(), tensors) for f in (compiled, call))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
