"""What is special to the scan: its invariances, packed sequences, layouts, cost (the rest: test_contract.py)."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from mmkernels import ssd_scan, ssd_update
from mmkernels.ops.ssd import _torch
from mmkernels.testing import assert_within, error_of, poisoned_allocations
from mmkernels.testing.cases_ssd import TOKENWISE, cast, leaves, ssd_inputs, tokens

PROPERTY = settings(max_examples=30, deadline=None, derandomize=True)
# float64 prefix sums of up to 64 resets of 1024 have an absolute error of 64 * 1024 * 2^-53 = 7e-12, which becomes the
# relative error of a decay; results here are sums of some tens of such terms.
EXACT = {"rtol": 1e-9, "atol": 1e-9}
MIXER = {"skip": "head", "gate": True, "softplus": True}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def torch_scan(args, **options):
    return ssd_scan(**{**args, **options}, backend="torch")


def reference_scan(args, **options):
    return ssd_scan(**{**args, **options}, backend="reference")


def flipped(args):
    return tokens(args, torch.arange(args["x"].shape[1] - 1, -1, -1))


BATCH, SEQLEN = st.integers(0, 2), st.integers(0, 20)


@st.composite
def problems(draw, batch=BATCH, seqlen=SEQLEN):
    """Keyword arguments of a random small call: any sizes, any options, with states in and out."""
    rows, groups = draw(batch), draw(st.integers(1, 3))
    sizes = (draw(seqlen), groups * draw(st.integers(1, 2)), draw(st.integers(1, 4)), draw(st.integers(1, 4)), groups)
    return ssd_inputs(
        generator(draw(st.integers(0, 2**31))),
        rows,
        *sizes,
        skip=draw(st.sampled_from([None, "head", "channel"])),
        gate=draw(st.booleans()),
        softplus=draw(st.booleans()),
        states=rows if draw(st.booleans()) else None,
        dt_limit=draw(st.sampled_from([(0.0, math.inf), (0.1, 0.7)])),
        chunk_size=draw(st.integers(1, 8)),
        reverse=draw(st.booleans()),
        return_final_states=True,
    )


@st.composite
def ragged(draw):
    """Lengths of sequences to pack, empty ones and ones longer than several chunks among them."""
    return draw(st.lists(st.sampled_from([0, 1, 2, 3, 5, 8, 13]), min_size=1, max_size=5))


# --- the scan is the recurrence -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ngroups", [1, 2, 6])
@pytest.mark.parametrize("seqlen", [1, 3, 4, 5, 63, 64, 65, 255, 257, 729])
def test_chunks_equal_the_recurrence(seqlen, ngroups):
    made = ssd_inputs(generator(seqlen), 1, seqlen, 6, 3, 4, ngroups, **MIXER, states=1, return_final_states=True)
    bare = {k: v for k, v in made.items() if k not in ("D", "z", "initial_states")}
    with poisoned_allocations():
        for args in (made, bare, {**made, "dt_limit": (0.05, 0.5)}):
            for actual, truth in zip(torch_scan(args), reference_scan(args), strict=True):
                torch.testing.assert_close(actual, truth, **EXACT)


@PROPERTY
@given(args=problems())
def test_equals_the_reference(args):
    with poisoned_allocations(), torch.no_grad():
        actual = torch_scan(args)
    for got, want in zip(actual, reference_scan(args), strict=True):
        torch.testing.assert_close(got, want, **EXACT)


@PROPERTY
@given(args=problems(), seed=st.integers(0, 99))
def test_equals_the_reference_with_ids(args, seed):
    # Ids from -2 to 2 in any order: runs of one token, ids that return, padding anywhere, a leading 0 or not.
    args["seq_idx"] = torch.randint(-2, 3, args["dt"].shape[:2], generator=generator(seed)).repeat_interleave(2, 1)
    args["seq_idx"] = args["seq_idx"][:, : args["x"].shape[1]]
    for got, want in zip(torch_scan(args), reference_scan(args), strict=True):
        torch.testing.assert_close(got, want, **EXACT)


@PROPERTY
@given(args=problems())
def test_overwriting_temporaries_changes_nothing(args):
    # Without gradients temporaries are reused and the output is written piece by piece: same arithmetic, same bits.
    traced, _ = leaves(args)
    with torch.no_grad():
        inference = torch_scan(args)
    for got, want in zip(inference, torch_scan(traced), strict=True):
        assert torch.equal(got, want)


@PROPERTY
@given(args=problems())
def test_reverse_is_flip_scan_flip(args):
    y, final = torch_scan(args, reverse=True)
    back, final_back = torch_scan(flipped(args), reverse=False)
    torch.testing.assert_close(y, back.flip(1), **EXACT)
    torch.testing.assert_close(final, final_back, **EXACT)


@PROPERTY
@given(args=problems(seqlen=st.integers(2, 20)), data=st.data())
def test_chunked_prefill_equals_one_call(args, data):
    args["reverse"] = False
    cut = data.draw(st.integers(0, args["x"].shape[1]))
    y, final = torch_scan(args)
    first, state = torch_scan(tokens(args, slice(0, cut)))
    second, last = torch_scan(tokens(args, slice(cut, None)), initial_states=state)
    torch.testing.assert_close(torch.cat([first, second], dim=1), y, **EXACT)
    torch.testing.assert_close(last, final, **EXACT)


@PROPERTY
@given(args=problems(batch=st.integers(1, 2), seqlen=st.integers(1, 9)), several=st.booleans())
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_steps_equal_the_scan(args, several, backend):
    args["reverse"] = False
    y, final = reference_scan(args)
    state = torch.zeros_like(final) if args.get("initial_states") is None else args["initial_states"].clone()
    scan_only = ("initial_states", "chunk_size", "reverse", "return_final_states")
    step = {k: v for k, v in args.items() if k not in scan_only}
    if several:
        out = ssd_update(state, **step, backend=backend)
    else:
        ones = [{k: v[:, t] if k in TOKENWISE else v for k, v in step.items()} for t in range(y.shape[1])]
        out = torch.stack([ssd_update(state, **one, backend=backend) for one in ones], dim=1)
    torch.testing.assert_close(out, y, **EXACT)
    torch.testing.assert_close(state, final, **EXACT)


# --- packed sequences ---------------------------------------------------------------------------------------------


@PROPERTY
@given(lengths=ragged(), args=problems(batch=st.just(1), seqlen=st.just(0)), reverse=st.booleans(), data=st.data())
def test_packed_equals_separate(lengths, args, reverse, data):
    total, (nheads, headdim) = sum(lengths), args["x"].shape[2:]
    ngroups, dstate = args["B"].shape[2:]
    with_states = len(lengths) if data.draw(st.booleans()) else None
    packed = ssd_inputs(generator(total), 1, total, nheads, headdim, dstate, ngroups, **MIXER, states=with_states)
    packed.update(chunk_size=args["chunk_size"], reverse=reverse)
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    y, finals = torch_scan(packed, cu_seqlens=offsets, return_final_states=True)
    assert finals.shape[0] == len(lengths)
    for i, (start, length) in enumerate(zip(offsets.tolist(), lengths, strict=False)):
        one = tokens(packed, slice(start, start + length))
        if with_states:
            one["initial_states"] = packed["initial_states"][i : i + 1]
        want, final = reference_scan(one, return_final_states=True)
        torch.testing.assert_close(y[:, start : start + length], want, **EXACT)
        torch.testing.assert_close(finals[i : i + 1], final, **EXACT)
    if not with_states:  # the path without states never moves the tokens
        torch.testing.assert_close(torch_scan(packed, cu_seqlens=offsets), y, **EXACT)
        ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
        torch.testing.assert_close(torch_scan(packed, seq_idx=ids), y, **EXACT)


def test_gradients_of_packed_sequences_equal_separate_ones():
    made = ssd_inputs(generator(3), 1, 12, 4, 3, 2, 2, **MIXER, states=3, chunk_size=4)
    bounds = [0, 3, 3, 12]
    packed, inputs = leaves(made)
    y, finals = torch_scan(packed, cu_seqlens=torch.tensor(bounds), return_final_states=True)
    weights = torch.randn(y.shape, generator=generator(4), dtype=y.dtype), torch.arange(3.0)[:, None, None, None]
    grads = torch.autograd.grad((y * weights[0]).sum() + (finals * weights[1]).sum(), list(inputs.values()))
    separate, same = leaves(made)
    loss = 0.0
    for i in range(3):
        part = slice(bounds[i], bounds[i + 1])
        one = {**tokens(separate, part), "initial_states": separate["initial_states"][i : i + 1]}
        out, final = reference_scan(one, return_final_states=True)
        loss = loss + (out * weights[0][:, part]).sum() + (final * weights[1][i]).sum()
    for name, got, want in zip(inputs, grads, torch.autograd.grad(loss, list(same.values())), strict=True):
        torch.testing.assert_close(got, want, **EXACT, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("reverse", [False, True])
def test_padding_is_dead(reverse):
    # Whatever is stored at padding - NaN, garbage - reaches no output, no state and no gradient, not even through a
    # cotangent of the final states.
    made = ssd_inputs(generator(5), 2, 11, 2, 3, 2, **MIXER, states=2, chunk_size=4, reverse=reverse)
    ids = torch.tensor([[0, 0, 0, 0, 0, -1, -1, -1, -1, -1, -1], [-1, -1, -3, -1, 0, 0, 0, 0, 1, 1, 1]])
    dead = ids < 0
    clean, clean_inputs = leaves(made)
    made.update({n: made[n].clone() for n in TOKENWISE})
    for name in TOKENWISE:
        made[name][dead] = math.nan
    dirty, dirty_inputs = leaves(made)
    results = []
    for args, inputs in ((clean, clean_inputs), (dirty, dirty_inputs)):
        y, final = torch_scan(args, seq_idx=ids, return_final_states=True)
        results.append((y, final, *torch.autograd.grad(y.sin().sum() + final.exp().sum(), list(inputs.values()))))
        assert not y[dead].any()
        for name, grad in zip(inputs, results[-1][2:], strict=True):
            if name in TOKENWISE:
                assert not grad[dead].any(), name
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)
    if not reverse:
        assert not results[0][1][0].any()  # the first row ends in padding, which has an empty state


def test_initial_states_belong_to_a_leading_run_of_id_0():
    made = ssd_inputs(generator(6), 3, 6, 2, 3, 2, states=3)
    ids = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0], [-1, 0, 0, 0, 0, 0]])
    y = torch_scan(made, seq_idx=ids)
    without = torch_scan({**made, "initial_states": None}, seq_idx=ids)
    assert not torch.equal(y[0, :3], without[0, :3])
    assert torch.equal(y[0, 3:], without[0, 3:])
    assert torch.equal(y[1:], without[1:])


# --- layout, dtypes, devices ----------------------------------------------------------------------------------------


@PROPERTY
@given(args=problems(batch=st.integers(1, 2), seqlen=st.integers(1, 9)), data=st.data())
def test_any_strides(args, data):
    expected = torch_scan(args)
    strange = dict(args)
    for name, value in args.items():
        if isinstance(value, torch.Tensor):
            order = data.draw(st.permutations(range(value.dim())))
            wide = value.permute(order).contiguous().repeat_interleave(2, dim=-1)[..., ::2]  # permuted, and every other
            strange[name] = wide.permute([order.index(axis) for axis in range(value.dim())])
            assert torch.equal(strange[name], value)
    y, final = torch_scan(strange)
    assert y.is_contiguous()
    torch.testing.assert_close(y, expected[0], **EXACT)
    torch.testing.assert_close(final, expected[1], **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    made = ssd_inputs(generator(7), 1, 130, 2, 8, 16, **MIXER, return_final_states=True)
    narrow = {k: made[k].to(dtype) for k in ("x", "B", "C", "z")}
    wide = {**made, **{k: v.double() for k, v in narrow.items()}}
    actual = torch_scan({**made, **narrow, "dt": made["dt"].float(), "A": made["A"].float()})
    truth = reference_scan({**wide, "dt": made["dt"].float(), "A": made["A"].float()})
    assert actual[0].dtype == dtype
    assert actual[1].dtype == torch.float32
    assert_within("y", actual[0], truth[0], dtype=dtype)
    assert error_of(actual[1], truth[1]) < 130**0.5 * 2**-23  # a random walk of 130 float32 roundings


@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_autocast_does_not_reach_inside(mode):
    args, inputs = leaves(cast(ssd_inputs(generator(), 1, 70, 2, 3, 4, **MIXER), torch.float32))
    expected = torch_scan(args)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = torch_scan(args)
    assert torch.equal(actual, expected)
    if mode == "backward":
        grads = [torch.autograd.grad(y.sum(), list(inputs.values())) for y in (actual, expected)]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_state_dtype_is_kept_and_rounded_once_per_call():
    made = ssd_inputs(generator(8), 2, 6, 2, 3, 4, states=2, **MIXER)
    step = cast(made, torch.float32)
    state = step.pop("initial_states").to(torch.bfloat16)
    exact = state.float()
    y, y_exact = ssd_update(state, **step, backend="torch"), ssd_update(exact, **step, backend="torch")
    assert state.dtype == torch.bfloat16
    assert torch.equal(state, exact.to(torch.bfloat16))
    assert torch.equal(y, y_exact)


def test_slots_are_chosen_and_padding_leaves_every_slot_untouched():
    made = ssd_inputs(generator(9), 3, None, 2, 3, 4, states=5, **MIXER)
    state = made.pop("initial_states")
    before = state.clone()
    y = ssd_update(state, **made, state_indices=torch.tensor([3, -1, 0]), backend="torch")
    rows = before[[3, 1, 0]].clone()
    want = ssd_update(rows, **made, backend="torch")
    assert not y[1].any()
    assert torch.equal(y[[0, 2]], want[[0, 2]])
    assert torch.equal(state[[3, 0]], rows[[0, 2]])
    assert torch.equal(state[[1, 2, 4]], before[[1, 2, 4]])
    padded = {**made, "x": torch.full_like(made["x"], math.nan)}
    assert not ssd_update(state, **padded, state_indices=torch.tensor([-1, -2, -1]), backend="torch").any()
    assert not torch.equal(state, before)
    assert torch.isfinite(state).all()


def test_the_gradient_of_a_step_reaches_through_the_state():
    made = ssd_inputs(generator(10), 2, 3, 2, 3, 4, states=4, **MIXER)
    start = made.pop("initial_states")
    grads = []
    for backend in ("torch", "reference"):
        args, inputs = leaves(made)
        state = start.clone()
        slots = torch.tensor([2, -1])
        for t in range(3):
            one = {k: v[:, t] if k in TOKENWISE else v for k, v in args.items()}
            y = ssd_update(state, **one, state_indices=slots, backend=backend)
        grads.append(torch.autograd.grad(y.sum() + state.square().sum(), list(inputs.values())))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, **EXACT)


# --- transformations ------------------------------------------------------------------------------------------------


def test_forward_mode_and_vmap_agree_with_backward_mode():
    made = ssd_inputs(generator(18), 3, 9, 2, 3, 4, skip="head", chunk_size=4)

    def loss(x, B):
        return torch_scan({**made, "x": x, "B": B}).sin().sum()

    x, B = made["x"], made["B"]
    tangents = torch.randn(x.shape, generator=generator(19), dtype=x.dtype), torch.ones_like(B)
    _, forward = torch.func.jvp(loss, (x, B), tangents)
    backward = torch.func.grad(loss, argnums=(0, 1))(x, B)
    torch.testing.assert_close(forward, sum((g * t).sum() for g, t in zip(backward, tangents, strict=True)), **EXACT)
    rows = {name: made[name][:, None] for name in ("x", "dt", "B", "C")}  # every row a batch of its own
    with torch.no_grad():
        each = torch.func.vmap(lambda row: torch_scan({**made, **row}))(rows)
    torch.testing.assert_close(each[:, 0], torch_scan(made), **EXACT)


# --- cost -----------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Remembers the largest tensor any operation made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return out


@pytest.mark.parametrize("grad", [False, True])
def test_no_temporary_grows_with_seqlen_squared_or_with_the_state(grad):
    made = ssd_inputs(generator(), 1, 8192, 2, 8, 16)
    args = {k: v.float().requires_grad_(grad) for k, v in made.items()}
    with Largest() as largest:
        y = torch_scan(args)
        if grad:
            y.sum().backward()
    linear = max(made["B"].numel(), made["x"].numel(), _torch.PIECE_BYTES // 4)
    assert largest.numel <= linear  # a state per token would be 8 times, a score per pair of tokens 256 times as much


# --- compilation ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_compilation_serves_every_length():
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(
        lambda args: ssd_scan(**args, backend="torch"), fullgraph=True, dynamic=True, backend=counter
    )
    for seqlen in (70, 99, 111):  # 5, 7 and 7 chunks, the last of them unfinished
        args = ssd_inputs(generator(seqlen), 2, seqlen, 2, 3, 4, **MIXER, chunk_size=16, return_final_states=True)
        for got, want in zip(compiled(args), torch_scan(args), strict=True):
            torch.testing.assert_close(got, want, **EXACT)
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("reverse", [False, True])
def test_compiled_training_equals_eager(reverse):
    torch._dynamo.reset()
    made = ssd_inputs(generator(16), 1, 50, 4, 3, 4, 2, **MIXER, states=3, chunk_size=8, reverse=reverse)
    offsets = torch.tensor([0, 20, 20, 50])
    compiled = torch.compile(ssd_scan, fullgraph=True, backend="aot_eager")
    grads = []
    for function in (compiled, ssd_scan):
        args, inputs = leaves(made)
        y, final = function(**args, cu_seqlens=offsets, return_final_states=True, backend="torch")
        grads.append(torch.autograd.grad(y.sin().sum() + final.cos().sum(), list(inputs.values())))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, **EXACT)
