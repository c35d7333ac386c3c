"""The C++ state-space scan: ISA levels, dtypes, lengths, threads, strides; gradients of gradients; opcheck."""

import itertools
import math
import subprocess
import sys

import pytest
import torch

import mmkernels
from mmkernels import _native
from mmkernels.testing import assert_within, error_of, poisoned_allocations
from mmkernels.testing.cases_ssd import ssd_inputs

F32, F64 = torch.float32, torch.float64
DTYPES = [F32, torch.bfloat16, torch.float16, F64]
ops = torch.ops.mmkernels
MIXER = {"skip": "head", "gate": True, "softplus": True, "return_final_states": True}


@pytest.fixture(params=_native.ISA_LEVELS)
def isa(request):
    if request.param not in _native.isa_levels():
        pytest.skip(f"this CPU has no {request.param}")
    with _native.use_isa(request.param):
        yield request.param


def inputs(dtype, *sizes, seed=0, **options):
    made = ssd_inputs(torch.Generator().manual_seed(seed), *sizes, **options)
    return {k: v.to(dtype) if _floating(v) else v for k, v in made.items()}


def _floating(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def run(args, backend, dtype=None, gradients=True):
    """Outputs and gradients in every tensor, by name."""
    args = {k: v.detach().to(dtype or v.dtype).requires_grad_() if _floating(v) else v for k, v in args.items()}
    out = mmkernels.ssd_scan(**args, backend=backend)
    outs = dict(zip(("y", "final"), out if isinstance(out, tuple) else (out,), strict=False))
    if not gradients:
        return {k: v.detach() for k, v in outs.items()}
    generator = torch.Generator().manual_seed(5)
    seeds = [torch.randn(o.shape, generator=generator, dtype=F64).to(o.dtype) for o in outs.values()]
    names = [k for k, v in args.items() if _floating(v)]
    grads = torch.autograd.grad(list(outs.values()), [args[n] for n in names], seeds)
    return {
        **{k: v.detach() for k, v in outs.items()},
        **{f"grad of {n}": g for n, g in zip(names, grads, strict=True)},
    }


def assert_like_torch(args, what, dtype):
    truth, peer = run(args, "reference", F64), run(args, "torch")
    with poisoned_allocations():
        got = run(args, "native")
    for name, value in got.items():
        # A gradient of a few numbers that each sum thousands of products: the peer's error there is luck, so it counts
        # with some roundings.  In float64 the truth itself is as wrong as the result.
        terms = 32 if dtype == F64 else 4 if name in ("grad of A", "grad of dt_bias", "grad of D") else 1
        assert_within(f"{name}, {what}", value, truth[name], peer[name], dtype=dtype, terms=terms)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_bar(isa, dtype):
    # Sizes around the vector widths 4, 8 and 16, one register tile and several; one chunk and two; groups of 1 to 5.
    for seqlen, nheads, headdim, dstate, ngroups in ((19, 2, 3, 5, 1), (70, 6, 17, 33, 2), (66, 5, 72, 8, 1)):
        args = inputs(dtype, 1, seqlen, nheads, headdim, dstate, ngroups, states=1, **MIXER)
        assert_like_torch(args, f"{seqlen} {headdim} {dstate}", dtype)


def segmented_inputs(**options):
    # A task has the 8 heads of a row.  Their states, 128 x 512, are 2 MiB a chunk, and 34 chunks of them exceed what
    # the backward keeps (64 MiB): it goes through the row in segments of 6.
    return inputs(F32, 4, 2150, 8, 128, 512, 1, softplus=True, skip="head", **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"states": 4, "return_final_states": True}, {"reverse": True}], ids=["states", "reverse"]
)
def test_a_row_too_long_for_all_its_states(options):
    args = segmented_inputs(**options)
    truth, peer, got = run(args, "torch", F64), run(args, "torch"), run(args, "native")
    for name, value in got.items():
        assert_within(name, value, truth[name], peer[name], dtype=F32, terms=4)


@pytest.mark.slow
def test_segments_and_sequence_ids():
    ids = torch.arange(2150, dtype=torch.int32).div(900, rounding_mode="floor").expand(4, -1).clone()
    ids[:, 1300:1360] = -1  # a run of padding inside
    args = {**segmented_inputs(), "seq_idx": ids}
    truth, peer, got = run(args, "torch", F64), run(args, "torch"), run(args, "native")
    for name, value in got.items():
        assert_within(name, value, truth[name], peer[name], dtype=F32, terms=4)


@pytest.mark.slow
def test_memory_of_the_backward_grows_with_the_root_of_the_length():
    # 4096 chunks of one head of 64 x 128: 128 MiB of states, of which two times 64 chunks are kept.
    script = (
        "import resource, torch, mmkernels; torch.set_num_threads(1)\n"
        "made = lambda *shape: torch.randn(shape, requires_grad=True)\n"
        "tokens = 4096 * 64; grad = torch.ones(1, tokens, 1, 64); A = (-torch.ones(1)).requires_grad_()\n"
        "args = [made(1, tokens, 1, 64), made(1, tokens, 1), A, made(1, tokens, 1, 128), made(1, tokens, 1, 128)]\n"
        "y = mmkernels.ssd_scan(*args, dt_softplus=True); y.detach()\n"
        "outputs = sum(a.numel() * 4 for a in args) / 2**20\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "y.backward(grad)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before - outputs)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 64, f"{done.stdout.strip()} MiB beyond the gradients"


def test_every_length(isa):
    # Against float64 alone, so that 130 lengths stay cheap: float32 sums of at most 130 terms lose a few digits.
    whole = inputs(F64, 1, 130, 2, 5, 4, states=1, skip="channel", return_final_states=True)
    truth = run(whole, "reference", gradients=False)["y"]
    single = {k: v.float() if _floating(v) else v for k, v in whole.items()}
    for seqlen in range(1, 131):
        part = {k: v[:, :seqlen] if k in ("x", "dt", "B", "C") else v for k, v in single.items()}
        y = run(part, "native", gradients=False)["y"]
        assert error_of(y, truth[:, :seqlen]) < 32 * torch.finfo(F32).eps, seqlen


@pytest.mark.parametrize("seqlen", [1, 15, 16, 17, 63, 64, 65, 127, 128, 129])
def test_gradients_around_chunk_and_tile_sizes(seqlen):
    assert_like_torch(inputs(F32, 2, seqlen, 4, 16, 24, 2, states=2, **MIXER), f"length {seqlen}", F32)


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(isa, dtype):
    # 9 heads of one group are shared by several tasks, whose sums of dB and dC are added up.
    args = inputs(dtype, 1, 200, 9, 32, 64, 1, states=1, **MIXER)
    results, before = {}, torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results[threads] = run(args, "native")
    finally:
        torch.set_num_threads(before)
    for threads, name in itertools.product((2, 3), results[1]):
        assert torch.equal(results[1][name], results[threads][name]), f"{name} at {threads} threads"


def test_chunk_size_changes_rounding_only(isa):
    args = inputs(F64, 1, 100, 2, 8, 8, states=1, **MIXER)
    want = run(args, "native")
    for chunk_size in (1, 2, 7, 33, 1000):
        got = run({**args, "chunk_size": chunk_size}, "native")
        for name, value in got.items():
            torch.testing.assert_close(value, want[name], rtol=1e-10, atol=1e-10, msg=f"{name}, {chunk_size}")


def test_tensors_are_read_through_their_strides(isa):
    dense = inputs(F32, 2, 40, 4, 8, 16, 2, states=2, **MIXER)
    want = run(dense, "native")

    def embedded(t):
        wide = torch.full((*t.shape[:-1], t.shape[-1] + 5), math.nan)
        wide[..., 2:-3] = t
        return wide[..., 2:-3]

    layouts = {
        "slices of wider rows": embedded,
        "heads before tokens": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2) if t.dim() > 2 else t,
        "last dimension not dense": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
        "tokens backwards in memory": lambda t: t.flip(0).contiguous().flip(0),
    }
    for layout, change in layouts.items():
        args = {k: change(v) if _floating(v) else v for k, v in dense.items()}
        y, final = mmkernels.ssd_scan(**args, backend="native")
        assert torch.equal(y, want["y"]), layout
        assert torch.equal(final, want["final"]), layout
    expanded = {**dense, "x": dense["x"][:, :1].expand(-1, 40, -1, -1), "z": dense["z"][:1].expand(2, -1, -1, -1)}
    copied = {k: v.contiguous() if _floating(v) else v for k, v in expanded.items()}
    assert torch.equal(*(mmkernels.ssd_scan(**a, backend="native")[0] for a in (expanded, copied)))


def test_dt_and_parameters_of_another_dtype():
    args = inputs(F32, 1, 20, 2, 8, 8, states=1, **MIXER)
    mixed = {k: v.bfloat16() if k in ("x", "B", "C", "z") else v for k, v in args.items()}
    got, peer, truth = run(mixed, "native"), run(mixed, "torch"), run(mixed, "reference", F64)
    for name, value in got.items():
        assert value.dtype == peer[name].dtype, name
        assert_within(name, value, truth[name], peer[name], dtype=torch.bfloat16)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_a_sequence_cannot_see_the_nan_of_another(isa, reverse):
    # Packed sequences are cut, not masked: 0 * NaN would leak.
    ids = torch.tensor([[0] * 20 + [1] * 20 + [-1] * 5 + [2] * 25])
    args = inputs(F32, 1, 70, 2, 4, 8, seq_idx=ids, reverse=reverse, **MIXER)
    want = run(args, "native")
    for name in ("x", "B", "C", "dt", "z"):
        args[name][:, 20:45] = math.nan
    got = run(args, "native")
    for name in ("y", "grad of x", "grad of dt", "grad of B", "grad of C", "grad of z"):
        for part in (slice(0, 20), slice(45, 70)):
            assert torch.equal(got[name][:, part], want[name][:, part]), name
    for name in ("y", "grad of x", "grad of dt", "grad of B", "grad of C", "grad of z"):
        assert not got[name][:, 40:45].any(), f"{name} of padding"


def test_extreme_steps_stay_finite(isa):
    args = inputs(F32, 1, 150, 3, 4, 8, states=1, skip="head", return_final_states=True)
    args["A"] = torch.tensor([-1e20, -1.0, -1e-20])
    args["dt"][:, ::7] = 1e8
    args["dt"][:, 1::7] = 0.0
    got, want = run(args, "native"), run(args, "reference", F64)
    for name in ("y", "final", "grad of x", "grad of B", "grad of C", "grad of dt"):
        assert got[name].isfinite().all(), name
        assert error_of(got[name], want[name]) < 1e-5, name


@pytest.mark.slow
@pytest.mark.parametrize("rate", [-1e-4, -1.0], ids=["remembers-all", "forgets"])
def test_error_does_not_grow_with_length(rate):
    # One head of 32768 tokens: sums over tokens go through the states of 512 chunks.
    args = inputs(F32, 1, 32768, 1, 4, 8, return_final_states=True)
    args["A"] = torch.tensor([rate])
    truth, peer = run(args, "torch", F64), run(args, "torch")
    for name, value in run(args, "native").items():
        assert_within(name, value, truth[name], peer[name], terms=8)


def test_gradients_of_gradients():
    args = inputs(F64, 1, 5, 2, 2, 2, states=1, **MIXER)
    names = [k for k, v in args.items() if _floating(v)]
    tensors = tuple(args[n].requires_grad_() for n in names)

    def scan(*values):
        return mmkernels.ssd_scan(**{**args, **dict(zip(names, values, strict=True))}, backend="native")

    assert torch.autograd.gradcheck(scan, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(scan, tensors, fast_mode=True)

    def gradients(*values):
        y, final = scan(*values)
        return torch.autograd.grad(y.sin().sum() + final.sin().sum(), values, create_graph=True)

    # The incoming gradients depend on the inputs here: they must not be counted twice.
    assert torch.autograd.gradcheck(gradients, tensors, fast_mode=True)


def test_a_gradient_of_the_final_states_alone():
    args = inputs(F32, 1, 70, 2, 4, 8, **MIXER)
    grads = []
    for backend, dtype in (("native", F32), ("reference", F64), ("torch", F32)):
        x = args["x"].to(dtype).requires_grad_()
        made = {k: v.to(dtype) if _floating(v) else v for k, v in args.items()}
        _, final = mmkernels.ssd_scan(**{**made, "x": x}, backend=backend)
        grads.append(torch.autograd.grad(final.sum(), x)[0])
    assert_within("grad of x", *grads)


def positional(args):
    names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states", "seq_idx", "cu_seqlens")
    return (*(args.get(n) for n in names), args.get("dt_softplus", False), 0.0, math.inf, 0, args.get("reverse", False))


# Every argument at once takes the tracer a quarter of a minute.
@pytest.mark.parametrize(
    "full", [pytest.param(True, id="everything", marks=pytest.mark.slow), pytest.param(False, id="plain")]
)
def test_opcheck(full):
    options = {**MIXER, "states": 3, "cu_seqlens": torch.tensor([0, 4, 4, 9])} if full else {}
    args = positional(inputs(F32, 1, 9, 2, 3, 4, **options))
    torch.library.opcheck(ops.ssd_scan.default, (*args, full))
    args = tuple(a.requires_grad_() if _floating(a) else a for a in args)
    torch.library.opcheck(ops.ssd_scan_fwd.default, (*args, full))
    grad_y, grad_final = torch.randn(1, 9, 2, 3), torch.randn(3, 2, 3, 4) if full else None
    torch.library.opcheck(ops.ssd_scan_bwd.default, (grad_y, grad_final, *args))


@pytest.mark.slow  # inductor compiles C++ for some seconds
def test_compiled_with_dynamic_shapes():
    def call(x, dt, A, B, C):
        return mmkernels.ssd_scan(x * 2, dt, A, B, C, dt_softplus=True, backend="native").tanh()

    compiled = torch.compile(call, fullgraph=True, dynamic=True)
    for seqlen in (3, 5, 70):
        made = inputs(F32, 2, seqlen, 4, 8, 16, 2)
        tensors = [made[n].requires_grad_() for n in ("x", "dt", "A", "B", "C")]
        got, want = (torch.autograd.grad(f(*tensors).sum(), tensors) for f in (compiled, call))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


def test_offsets_that_are_none_are_refused():
    args = inputs(F32, 1, 9, 2, 3, 4)
    for bad in ([0, 5, 4, 9], [1, 9], [0, 8], [0, 10], [0, -1, 9]):
        with pytest.raises(mmkernels.ShapeError, match="rise from 0 to seqlen"):
            mmkernels.ssd_scan(**args, cu_seqlens=torch.tensor(bad), backend="native")
