"""The C++ causal convolution: every ISA level, dtype, width and thread count; strides, poison, gradients, opcheck."""

import itertools

import pytest
import torch

import mmkernels
from mmkernels import _native
from mmkernels.testing import assert_within, poisoned_allocations

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NAN = float("nan")
ops = torch.ops.mmkernels
# Runs of 1, 2 and more tokens, one that goes past a piece of 64, an id that returns, padding everywhere.
IDS = torch.tensor(
    [[0] * 3 + [1] * 90 + [2, 0, 0, -1, -1, 7, 7], [-1] * 2 + [3] * 70 + [-1] * 8 + [3] * 18 + [0] * 2]
).int()
BOUNDS = torch.tensor([0, 0, 1, 3, 73, 73, 100], dtype=torch.int32)


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request):
    if request.param not in _native.isa_levels():
        pytest.skip(f"this CPU has no {request.param}")
    with _native.use_isa(request.param):
        yield request.param


def inputs(dtype, dim, width, *, batch=2, seqlen=100, states=None, bias=True, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    made = {"x": normal(batch, seqlen, dim), "weight": normal(dim, width) / width**0.5, **options}
    if bias:
        made["bias"] = normal(dim)
    if states is not None:
        made.update(initial_states=normal(states, dim, width - 1), return_final_states=True)
    return made


def run(args, backend, dtype=None):
    """Outputs and gradients by name."""
    args = {
        k: v.detach().to(dtype or v.dtype).requires_grad_()
        if isinstance(v, torch.Tensor) and v.is_floating_point()
        else v
        for k, v in args.items()
    }
    outputs = mmkernels.causal_conv1d(**args, backend=backend)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(5)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs]
    names = [k for k, v in args.items() if isinstance(v, torch.Tensor) and v.requires_grad]
    used = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    grads = torch.autograd.grad([o for o, _ in used], [args[n] for n in names], [c for _, c in used])
    return {
        "y": outputs[0].detach(),
        **dict(zip(["final"], outputs[1:], strict=False)),
        **dict(zip(names, grads, strict=True)),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("dim", "width", "packing", "reverse"),
    [
        (5, 4, "plain", False),
        (37, 2, "states", True),
        (16, 3, "ids", False),
        (67, 4, "ids", True),
        (20, 4, "packed", False),
        (9, 7, "packed", True),
        (3, 1, "states", False),
        (530, 4, "few", False),
    ],
)
def test_error_bar(isa, dtype, dim, width, packing, reverse):
    packed = {"ids": {"seq_idx": IDS}, "packed": {"cu_seqlens": BOUNDS, "batch": 1}, "few": {"seqlen": 3}}
    rows = {"packed": 6, "plain": None}.get(packing, 2)
    activation = None if width == 3 else "silu"
    args = inputs(dtype, dim, width, states=rows, activation=activation, reverse=reverse, **packed.get(packing, {}))
    truth, peer = run(args, "reference", torch.float64), run(args, "torch")
    with poisoned_allocations():
        got = run(args, "native")
    assert set(got) == set(truth)
    for name, value in got.items():
        assert value.dtype == dtype
        # In float64 the truth is rounded like the result: some ten roundings of its own.
        terms = 16 if dtype == torch.float64 else 1
        assert_within(name, value, truth[name], peer[name], dtype=dtype, terms=terms, summands=200)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(isa, dtype):
    args = inputs(dtype, 530, 4, seqlen=300, states=2, activation="silu")
    results = {}
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results[threads] = run(args, "native")
    finally:
        torch.set_num_threads(before)
    for threads, name in itertools.product((2, 3), results[1]):
        assert torch.equal(results[1][name], results[threads][name]), f"{name} at {threads} threads"


def test_tokens_are_read_through_their_strides(isa):
    wide = torch.randn(2, 9, 40)
    weight, bias = torch.randn(4, 20).t(), torch.randn(40)[::2]
    state = torch.randn(2, 3, 20).transpose(1, 2)
    views = {
        "columns of a projection": wide[..., 3:23],
        "tokens before rows": wide[..., :20].transpose(0, 1).contiguous().transpose(0, 1),
        "channels first": wide[..., :20].transpose(1, 2).contiguous().transpose(1, 2),
        "one token for all": wide[:, :1, :20].expand(-1, 9, -1),
        "one row for all": wide[:1, :, :20].expand(2, -1, -1),
    }
    for name, x in views.items():
        got = mmkernels.causal_conv1d(x, weight, bias, initial_states=state, return_final_states=True, backend="native")
        dense = (x.contiguous(), weight.contiguous(), bias.contiguous())
        want = mmkernels.causal_conv1d(
            *dense, initial_states=state.contiguous(), return_final_states=True, backend="native"
        )
        assert torch.equal(got[0], want[0]), name
        assert torch.equal(got[1], want[1]), name
        assert got[1].is_contiguous()


def test_a_gradient_that_is_one_number_expanded(isa):
    def gradient(backend, dtype):
        args = inputs(dtype, 6, 4, activation="silu")
        args["weight"].requires_grad_()
        (grad,) = torch.autograd.grad(mmkernels.causal_conv1d(**args, backend=backend).sum(), args["weight"])
        return grad

    pairs = (("native", torch.float32), ("reference", torch.float64), ("torch", torch.float32))
    assert_within("grad of weight", *(gradient(b, d) for b, d in pairs), summands=200)


@pytest.mark.parametrize("reverse", [False, True])
def test_padding_and_other_runs_reach_nothing(isa, reverse):
    # Whatever stands at padding, and in the states of a row whose first id is not 0, is never looked at.
    args = inputs(torch.float32, 19, 4, states=2, activation="silu", seq_idx=IDS, reverse=reverse)
    clean = run(args, "native")
    bad = dict(args, x=torch.where((IDS < 0)[..., None], NAN, args["x"]), initial_states=args["initial_states"].clone())
    first = IDS[:, -1] if reverse else IDS[:, 0]
    bad["initial_states"][first != 0] = NAN
    for name, value in run(bad, "native").items():
        assert torch.equal(value, clean[name]), name
    assert (clean["x"][IDS < 0] == 0).all()
    assert (clean["y"][IDS < 0] == 0).all()
    assert (clean["initial_states"][first != 0] == 0).all()


def test_a_nan_stays_in_its_run_and_channel(isa):
    args = inputs(torch.float32, 19, 4, activation="silu", seq_idx=IDS)
    args["x"][0, 5, 7] = NAN  # in the run of tokens 3...92
    got = run(args, "native")
    assert got["y"][0, 5:9, 7].isnan().all()
    assert got["y"].isnan().sum() == 4
    # Its gradient reaches what shares an output with it, in the same run.
    assert got["x"][0, 3:9, 7].isnan().all()
    assert got["x"].isnan().sum() == 6


def test_gradients_of_gradients():
    bounds = torch.tensor([0, 1, 1, 5], dtype=torch.int32)
    for options in ({"seq_idx": torch.tensor([[0, 0, 1, -1, 1]]), "states": 1}, {"cu_seqlens": bounds, "states": 3}):
        args = inputs(torch.float64, 2, 3, batch=1, seqlen=5, activation="silu", **options)
        names = [k for k, v in args.items() if isinstance(v, torch.Tensor) and v.is_floating_point()]
        tensors = tuple(args[n].requires_grad_() for n in names)

        def conv(*values, args=args, names=names):
            return mmkernels.causal_conv1d(**{**args, **dict(zip(names, values, strict=True))}, backend="native")

        def gradients(*values, conv=conv):
            # The incoming gradient itself depends on the inputs: it must not be counted twice.
            y, final = conv(*values)
            return torch.autograd.grad(y.sin().sum() + final.cos().sum(), values, create_graph=True)

        assert torch.autograd.gradcheck(conv, tensors)
        assert torch.autograd.gradcheck(gradients, tensors, fast_mode=True)
        assert torch.autograd.gradgradcheck(gradients, tensors, fast_mode=True)


def test_mixed_dtypes():
    args = inputs(torch.float32, 6, 4, states=2, activation="silu")
    mixed = {**args, "x": args["x"].bfloat16()}
    got, peer, truth = run(mixed, "native"), run(mixed, "torch"), run(mixed, "reference", torch.float64)
    for name, value in got.items():
        assert value.dtype == peer[name].dtype
        # Float32 states are rounded to what they stand for, inputs of x's dtype: another half rounding each.
        assert_within(name, value, truth[name], peer[name], dtype=torch.bfloat16, summands=200)


def test_bad_packing_is_refused():
    args = inputs(torch.float32, 4, 3, batch=1, seqlen=6)
    for bounds in ([0, 4], [1, 6], [0, 7], [0, 5, 4, 6], [0, -2, 6]):
        with pytest.raises(RuntimeError, match="cu_seqlens"):
            mmkernels.causal_conv1d(**args, cu_seqlens=torch.tensor(bounds), backend="native")


# ---- the step in place ---------------------------------------------------------------------------------------------


def step(args, backend, dtype=None):
    args = {
        k: v.to(dtype or v.dtype, copy=True) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in args.items()
    }
    y = mmkernels.causal_conv1d_update(**args, backend=backend)
    return {"y": y, "conv_state": args["conv_state"]}


def step_inputs(dtype, dim, width, *, state_len=None, tokens=None, slots=None, state_dtype=None, silu=True):
    made = inputs(dtype, dim, width, batch=3, seqlen=tokens or 1, activation="silu" if silu else None)
    made["x"] = made["x"] if tokens else made["x"][:, 0]
    rows = 3 if slots is None else 6
    generator = torch.Generator().manual_seed(9)
    length = width - 1 if state_len is None else state_len
    made["conv_state"] = torch.randn(rows, dim, length, generator=generator).to(state_dtype or dtype)
    made["state_indices"] = None if slots is None else torch.tensor(slots)
    return made


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("dim", "width", "options"),
    [
        (5, 4, {}),
        (300, 4, {"slots": [4, -1, 0]}),
        (37, 2, {"tokens": 3, "state_len": 2}),
        (33, 3, {"tokens": 7, "slots": [-3, 5, 1], "silu": False}),
        (17, 7, {"state_len": 9}),
        (6, 1, {"state_len": 0}),
    ],
)
def test_step_error_bar(isa, dtype, dim, width, options):
    args = step_inputs(dtype, dim, width, **options)
    truth, peer, got = step(args, "reference", torch.float64), step(args, "torch"), step(args, "native")
    terms = 16 if dtype == torch.float64 else 1
    assert_within("y", got["y"], truth["y"], peer["y"], dtype=dtype, terms=terms)
    assert torch.equal(got["conv_state"], truth["conv_state"].to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("state_dtype", DTYPES, ids=str)
def test_a_state_of_another_dtype(dtype, state_dtype):
    args = step_inputs(dtype, 20, 4, state_len=5, slots=[2, -1, 4], state_dtype=state_dtype)
    got, want = step(args, "native"), step(args, "reference")
    assert torch.equal(got["conv_state"], want["conv_state"])
    assert got["conv_state"].dtype == state_dtype
    assert got["y"].dtype == dtype
    # float64 states are read in full, not rounded to x first.
    bar = 2 * torch.finfo(dtype).eps * want["y"].abs().max().item() * 4
    torch.testing.assert_close(got["y"], want["y"], rtol=0, atol=bar)


def test_states_and_weights_are_walked_through_their_strides(isa):
    args = step_inputs(torch.float32, 300, 4, slots=[5, 2, 0])
    want = step(args, "native")
    state = args["conv_state"].transpose(1, 2).contiguous().transpose(1, 2)
    inside = torch.full((12, 310, 7), NAN)
    inside[::2, 4:304, 2:5] = args["conv_state"]
    for name, view in {"channels last": state, "part of a larger cache": inside[::2, 4:304, 2:5]}.items():
        weight = args["weight"].t().contiguous().t()
        y = mmkernels.causal_conv1d_update(**{**args, "conv_state": view, "weight": weight}, backend="native")
        assert torch.equal(y, want["y"]), name
        assert torch.equal(view, want["conv_state"]), name
    assert inside[1::2].isnan().all()
    assert inside[..., 5:].isnan().all()
    assert inside[..., :2].isnan().all()


def test_padding_rows_touch_nothing():
    args = step_inputs(torch.float32, 20, 4, slots=[3, -1, 1])
    want = step(args, "native")
    bad = {**args, "x": args["x"].clone(), "conv_state": args["conv_state"].clone()}
    bad["x"][1] = NAN
    bad["conv_state"][[0, 2, 4, 5]] = NAN
    got = step(bad, "native")
    assert torch.equal(got["y"], want["y"])
    assert (got["y"][1] == 0).all()
    assert torch.equal(got["conv_state"][[1, 3]], want["conv_state"][[1, 3]])


def test_slots_are_checked_and_gradients_declined():
    args = step_inputs(torch.float32, 4, 3, slots=[0, 6, 1])
    with pytest.raises(RuntimeError, match="state_indices must be below 6"):
        step(args, "native")
    args = step_inputs(torch.float32, 4, 3)
    args["weight"].requires_grad_()
    with pytest.raises(mmkernels.BackendError, match="weight requires a gradient"):
        mmkernels.causal_conv1d_update(**args, backend="native")
    assert mmkernels.causal_conv1d_update(**args).requires_grad


def test_steps_continue_a_convolution(isa):
    args = inputs(torch.float32, 21, 4, seqlen=12, states=2, activation="silu")
    whole, final = mmkernels.causal_conv1d(**args, backend="native")
    state = args["initial_states"].clone()
    filters = {k: args[k] for k in ("weight", "bias", "activation")}
    pieces = [args["x"][:, 0], args["x"][:, 1:6], args["x"][:, 6], args["x"][:, 7:12]]
    with torch.no_grad():
        ys = [mmkernels.causal_conv1d_update(x, state, **filters, backend="native") for x in pieces]
    got = torch.cat([y if y.dim() == 3 else y[:, None] for y in ys], 1)
    assert torch.equal(state, final)
    torch.testing.assert_close(got, whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "nograd"])
def test_opcheck(grad):
    args = inputs(torch.float32, 4, 3, states=2, seqlen=9)
    ids = torch.tensor([[0] * 4 + [-1] * 5, [1] * 9])
    for seq_idx, bias, states, final in ((ids, args["bias"], args["initial_states"], True), (None, None, None, False)):
        tensors = [args["x"], args["weight"], bias, states]
        tensors = [t if t is None else t.clone().requires_grad_(grad) for t in tensors]
        rest = (seq_idx, None, True, False)
        if not grad:
            torch.library.opcheck(ops.causal_conv1d.default, (*tensors, *rest, final))
        torch.library.opcheck(ops.causal_conv1d_fwd.default, (*tensors, *rest, final))
        grad_y = torch.randn(2, 9, 4, requires_grad=grad)
        grad_final = torch.randn(2, 4, 2, requires_grad=grad) if final else None
        torch.library.opcheck(ops.causal_conv1d_bwd.default, (grad_y, grad_final, *tensors, *rest, True))
    if not grad:
        made = step_inputs(torch.float32, 4, 3, slots=[1, -1, 0])
        given = (made["x"], made["conv_state"], made["weight"], made["bias"], True, made["state_indices"])
        torch.library.opcheck(ops.causal_conv1d_update.default, given)
