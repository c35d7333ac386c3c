"""What is special to the convolution: invariances, ids, padding, states, bad input (more: test_contract.py)."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import mmkernels
from mmkernels import ConfigError, DeviceError, DtypeError, ShapeError, causal_conv1d, causal_conv1d_update
from mmkernels.ops.causal_conv1d import _torch
from mmkernels.testing import assert_within, poisoned_allocations
from mmkernels.testing.cases_causal_conv1d import conv_inputs, states

BACKENDS = ["torch", "reference"]
PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)
EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64: the two sides add the same few products in another order


@st.composite
def problems(draw, **fixed):
    """Keyword arguments of a random small call, and the generator that made them."""
    batch = fixed.get("batch", draw(st.integers(0, 3)))
    seqlen, dim, width = draw(st.integers(0, 12)), draw(st.integers(1, 5)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    args = conv_inputs(generator, batch, seqlen, dim, width, bias=draw(st.booleans()))
    args["activation"] = draw(st.sampled_from([None, "silu"]))
    if draw(st.booleans()):
        args["initial_states"] = states(generator, batch, dim, width - 1)
    return args, generator


def both(args, **more):
    return causal_conv1d(**{**args, "return_final_states": True, "backend": "torch", **more})


@PROPERTY
@given(problems(), st.booleans())
def test_torch_equals_reference(problem, reverse):
    args, _ = problem
    with poisoned_allocations():
        actual = both(args, reverse=reverse)
    for got, want in zip(actual, both(args, reverse=reverse, backend="reference"), strict=True):
        torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_torch_conv1d(backend):
    args = conv_inputs(torch.Generator().manual_seed(0), 2, 11, 6, 4, activation="silu")
    padded = F.pad(args["x"].transpose(1, 2), (3, 0))
    expected = F.silu(F.conv1d(padded, args["weight"][:, None], args["bias"], groups=6)).transpose(1, 2)
    torch.testing.assert_close(causal_conv1d(**args, backend=backend), expected, **EXACT)


@PROPERTY
@given(problems(), st.integers(0, 12))
def test_chunked_equals_whole(problem, cut):
    args, _ = problem
    x, state = args["x"], args.pop("initial_states", None)
    first, middle = both({**args, "x": x[:, :cut], "initial_states": state})
    second, final = both({**args, "x": x[:, cut:], "initial_states": middle})
    whole, whole_final = both({**args, "initial_states": state})
    torch.testing.assert_close(torch.cat([first, second], 1), whole, **EXACT)
    torch.testing.assert_close(final, whole_final, rtol=0, atol=0)


@PROPERTY
@given(problems(), st.booleans(), st.data())
def test_reverse_is_flip_conv_flip(problem, with_ids, data):
    args, _ = problem
    batch, seqlen, _ = args["x"].shape
    if with_ids:
        ids = data.draw(st.lists(st.integers(-1, 1), min_size=batch * seqlen, max_size=batch * seqlen))
        args["seq_idx"] = torch.tensor(ids, dtype=torch.int32).reshape(batch, seqlen)
    flipped = {**args, "x": args["x"].flip(1)}
    if with_ids:
        flipped["seq_idx"] = args["seq_idx"].flip(1)
    y, final = both(args, reverse=True)
    want, want_final = both(flipped)
    torch.testing.assert_close(y, want.flip(1), **EXACT)
    torch.testing.assert_close(final, want_final, rtol=0, atol=0)


@PROPERTY
@given(problems(batch=1), st.lists(st.integers(0, 12), max_size=4), st.booleans())
def test_cu_seqlens_equals_separate_calls(problem, cuts, reverse):
    args, generator = problem
    args.pop("initial_states", None)
    seqlen, dim = args["x"].shape[1:]
    bounds = [0, *sorted(min(c, seqlen) for c in cuts), seqlen]
    initial = states(generator, len(bounds) - 1, dim, args["weight"].shape[1] - 1)
    packed, finals = both(
        args, cu_seqlens=torch.tensor(bounds, dtype=torch.int32), initial_states=initial, reverse=reverse
    )
    for i in range(len(bounds) - 1):
        piece = slice(bounds[i], bounds[i + 1])
        y, final = both({**args, "x": args["x"][:, piece]}, initial_states=initial[i : i + 1], reverse=reverse)
        torch.testing.assert_close(packed[:, piece], y, **EXACT)
        torch.testing.assert_close(finals[i : i + 1], final, rtol=0, atol=0)


@PROPERTY
@given(problems(), st.data())
def test_seq_idx_equals_a_call_per_run(problem, data):
    args, _ = problem
    batch, seqlen, _ = args["x"].shape
    flat = data.draw(st.lists(st.integers(-1, 2), min_size=batch * seqlen, max_size=batch * seqlen))
    ids = torch.tensor(flat, dtype=torch.int32).reshape(batch, seqlen)
    y, final = both(args, seq_idx=ids)
    for b in range(batch):
        start, initial = 0, args.get("initial_states")
        while start < seqlen:
            stop = start
            while stop < seqlen and ids[b, stop] == ids[b, start]:
                stop += 1
            fresh = start > 0 or ids[b, 0] != 0 or initial is None
            run = {**args, "x": args["x"][b : b + 1, start:stop]}
            run["initial_states"] = None if fresh else initial[b : b + 1]
            want, end = both(run)
            padding = ids[b, start] < 0
            torch.testing.assert_close(y[b : b + 1, start:stop], want * ~padding, **EXACT)
            if stop == seqlen:
                torch.testing.assert_close(final[b : b + 1], end * ~padding, rtol=0, atol=0)
            start = stop


@PROPERTY
@given(problems(), st.integers(0, 3), st.integers(1, 4))
def test_update_continues_the_convolution(problem, extra, step):
    args, generator = problem
    initial = args.pop("initial_states", None)
    batch, seqlen, dim = args["x"].shape
    history = args["weight"].shape[1] - 1
    if initial is None:
        initial = torch.zeros(batch, dim, history, dtype=torch.float64)
    want, final = both(args, initial_states=initial)
    # Older inputs than the filter needs are carried along and change nothing.
    state = torch.cat([states(generator, batch, dim, extra), initial], dim=2)
    options = {"bias": args["bias"], "activation": args["activation"], "backend": "torch"}
    outs = [
        causal_conv1d_update(args["x"][:, t : t + step], state, args["weight"], **options)
        for t in range(0, seqlen, step)
    ]
    torch.testing.assert_close(torch.cat([want[:, :0], *outs], 1), want, **EXACT)
    torch.testing.assert_close(state[:, :, extra:], final, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_update_touches_only_its_slots(backend):
    generator = torch.Generator().manual_seed(1)
    args = conv_inputs(generator, 4, 1, 3, 4)
    pool = states(generator, 6, 3, 3)
    before, x = pool.clone(), args["x"][:, 0].clone()
    x[2] = float("nan")  # a padding row may hold anything
    slots = torch.tensor([5, 0, -1, 3], dtype=torch.int32)
    y = causal_conv1d_update(x, pool, args["weight"], args["bias"], state_indices=slots, backend=backend)
    assert torch.equal(y[2], torch.zeros(3, dtype=torch.float64))
    for slot in (1, 2, 4):
        assert torch.equal(pool[slot], before[slot])
    for row, slot in ((0, 5), (1, 0), (3, 3)):
        assert torch.equal(pool[slot], torch.cat([before[slot, :, 1:], x[row, :, None]], 1))


def test_update_with_only_padding_changes_nothing():
    pool = torch.randn(3, 2, 1)
    before = pool.clone()
    x = torch.full((2, 2), float("nan"))
    y = causal_conv1d_update(x, pool, torch.randn(2, 2), state_indices=torch.tensor([-1, -7]), backend="torch")
    assert torch.equal(pool, before)
    assert torch.equal(y, torch.zeros(2, 2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reverse", [False, True])
def test_nan_stays_in_its_sequence(backend, reverse):
    args = conv_inputs(torch.Generator().manual_seed(2), 1, 9, 3, 4)
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, -1, -1, 2]])
    x = args["x"].clone()
    x[:, 3:8] = float("nan")
    x.requires_grad_()
    y = causal_conv1d(**{**args, "x": x}, seq_idx=ids, reverse=reverse, backend=backend)
    clean = torch.tensor([True] * 3 + [False] * 3 + [True] * 3)
    assert torch.isfinite(y[:, clean]).all()
    assert torch.equal(y[0, 6:8], torch.zeros(2, 3, dtype=torch.float64))
    (grad,) = torch.autograd.grad(y[:, clean].sum(), x)
    assert torch.equal(grad[0, 6:8], torch.zeros(2, 3, dtype=torch.float64))
    assert torch.isfinite(grad[:, [0, 1, 2, 8]]).all()


@pytest.mark.parametrize("twice", [False, True])
def test_nan_in_padding_does_not_reach_the_weights(twice):
    args = conv_inputs(torch.Generator().manual_seed(3), 1, 8, 3, 4, activation="silu")
    ids = torch.tensor([[0, -1, -1, -1, 1, 1, 1, -1]])
    x = torch.where(ids[..., None] < 0, float("nan"), args["x"]).requires_grad_()
    initial = torch.randn(1, 3, 3, dtype=torch.float64)
    args["weight"].requires_grad_()
    y = causal_conv1d(**{**args, "x": x}, seq_idx=ids, initial_states=initial, backend="torch")
    wanted = [x, args["weight"]]
    grads = torch.autograd.grad(y.square().sum(), wanted, create_graph=twice)
    if twice:
        grads = torch.autograd.grad(sum(g.square().sum() for g in grads), wanted)
    assert all(torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "odd"])
def test_any_strides(layout):
    generator = torch.Generator().manual_seed(4)
    args = conv_inputs(generator, 3, 10, 4, 4, activation="silu")
    x = args["x"]
    views = {
        "transposed": lambda: x.transpose(1, 2).contiguous().transpose(1, 2),
        "sliced": lambda: torch.randn(3, 10, 9, generator=generator, dtype=torch.float64)[..., 2:6],
        "expanded": lambda: x[:1].expand(3, -1, -1),
        "odd": lambda: torch.randn(6, 20, 8, generator=generator, dtype=torch.float64)[::2, ::2, 1::2],
    }
    view = views[layout]()
    torch.testing.assert_close(
        causal_conv1d(**{**args, "x": view}, backend="torch"),
        causal_conv1d(**{**args, "x": view.contiguous()}, backend="torch"),
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("ids", [False, True])
def test_block_size_does_not_matter(monkeypatch, reverse, ids):
    generator = torch.Generator().manual_seed(5)
    args = conv_inputs(generator, 2, 23, 3, 4, activation="silu", reverse=reverse)
    if ids:
        args["seq_idx"] = torch.randint(-1, 2, (2, 23), generator=generator).sort(1, descending=True).values
    tensors = [args[name].requires_grad_() for name in ("x", "weight", "bias")]

    def run():
        y = causal_conv1d(**args, backend="torch")
        return y, *torch.autograd.grad(y.square().sum(), tensors)

    whole = run()
    for elements in (6, 12, 30):  # 1, 2 and 5 tokens a block: shorter than, equal to and longer than the reach
        monkeypatch.setattr(_torch, "_BLOCK", elements)
        for got, want in zip(run(), whole, strict=True):
            torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_float32(dtype):
    # 1 + 64 * 2^-9 = 1.125 exactly; in bfloat16 each addition of 2^-9 to 1 is lost (in float16, of 2^-12).
    small = 2.0**-9 if dtype == torch.bfloat16 else 2.0**-12
    width = 65
    x = torch.full((1, width, 1), small, dtype=dtype)
    x[:, 0] = 1
    weight = torch.ones(1, width, dtype=dtype)
    y = causal_conv1d(x, weight, backend="torch")[0, -1, 0]
    assert y.double().item() == torch.tensor(1 + (width - 1) * small).to(dtype).double().item()


def test_16_bit_error_is_one_rounding():
    args = conv_inputs(torch.Generator().manual_seed(6), 2, 40, 16, 4, activation="silu")
    rounded = {k: v.bfloat16() if isinstance(v, torch.Tensor) else v for k, v in args.items()}
    truth = causal_conv1d(
        **{k: v.double() if isinstance(v, torch.Tensor) else v for k, v in rounded.items()}, backend="reference"
    )
    assert_within("y", causal_conv1d(**rounded, backend="torch"), truth, dtype=torch.bfloat16)


def test_weights_may_be_wider_than_activations():
    args = conv_inputs(torch.Generator().manual_seed(7), 2, 6, 4, 4)
    x, weight, bias = args["x"].bfloat16(), args["weight"].float().requires_grad_(), args["bias"].float()
    y = causal_conv1d(x, weight, bias, backend="torch")
    assert y.dtype == torch.bfloat16
    assert torch.autograd.grad(y.float().sum(), weight)[0].dtype == torch.float32


def test_final_states_do_not_alias_the_input():
    x = torch.randn(1, 5, 3)
    for seqlen in (1, 5):
        _, final = causal_conv1d(x[:, :seqlen], torch.randn(3, 2), return_final_states=True, backend="torch")
        kept = final.clone()
        x.add_(1)
        assert torch.equal(final, kept)


def test_inputs_are_not_modified():
    args = conv_inputs(torch.Generator().manual_seed(8), 2, 6, 4, 4)
    initial = torch.randn(2, 4, 3, dtype=torch.float64)
    copies = {**{k: v.clone() for k, v in args.items()}, "initial_states": initial.clone()}
    both(args, initial_states=initial)
    for name, value in {**args, "initial_states": initial}.items():
        assert torch.equal(value, copies[name]), name


def test_gradient_of_update_flows_through_the_state():
    generator = torch.Generator().manual_seed(9)
    args = conv_inputs(generator, 2, 3, 4, 4)
    x = args["x"].requires_grad_()
    state = torch.zeros(2, 4, 3, dtype=torch.float64)
    outs = [causal_conv1d_update(x[:, t], state, args["weight"], args["bias"], backend="torch") for t in range(3)]
    cotangent = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    (stepped,) = torch.autograd.grad(torch.stack(outs, 1), x, cotangent)
    (whole,) = torch.autograd.grad(causal_conv1d(**args, backend="torch"), x, cotangent)
    torch.testing.assert_close(stepped, whole, **EXACT)


X, W = torch.zeros(2, 6, 4), torch.zeros(4, 3)
BAD = [
    ({"x": X[0]}, ShapeError, "x must have shape"),
    ({"x": X.transpose(1, 2)}, ShapeError, "weight must have shape"),
    ({"weight": W[:, None]}, ShapeError, r"squeeze\(1\)"),
    ({"weight": W[:, :0]}, ShapeError, "width >= 1"),
    ({"weight": "w"}, DtypeError, "weight must be a tensor"),
    ({"bias": torch.zeros(3)}, ShapeError, "bias must have shape"),
    ({"x": X.long()}, DtypeError, "x must be float32"),
    ({"activation": "relu"}, ConfigError, "activation must be None or 'silu'"),
    ({"initial_states": torch.zeros(2, 4, 3)}, ShapeError, "initial_states must have shape"),
    ({"seq_idx": torch.zeros(2, 5, dtype=torch.int32)}, ShapeError, "seq_idx must have shape"),
    ({"seq_idx": torch.zeros(2, 6)}, DtypeError, "seq_idx must be int32"),
    ({"cu_seqlens": torch.tensor([0, 6])}, ShapeError, "batch 1"),
    ({"x": X[:1], "cu_seqlens": torch.zeros(0, dtype=torch.int32)}, ShapeError, "boundaries"),
    ({"x": X[:1], "cu_seqlens": torch.tensor([0, 6]), "seq_idx": torch.zeros(1, 6).int()}, ShapeError, "got both"),
    ({"weight": W.to("meta")}, DeviceError, "weight must be on cpu"),
    ({"backend": "upstream"}, mmkernels.BackendError, "no upstream backend"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message) as caught:
        causal_conv1d(**{"x": X, "weight": W, **change})
    assert str(caught.value).startswith("causal_conv1d: ")


UPDATE = {"x": torch.zeros(2, 4), "conv_state": torch.zeros(2, 4, 2), "weight": W}
BAD_UPDATE = [
    ({"conv_state": torch.zeros(2, 4, 1)}, ShapeError, "at least width-1 = 2"),
    ({"conv_state": torch.zeros(3, 4, 2)}, ShapeError, "addressed by state_indices"),
    ({"conv_state": torch.zeros(2, 4, 2).int()}, DtypeError, "conv_state must be float32"),
    ({"state_indices": torch.zeros(3, dtype=torch.int32)}, ShapeError, "state_indices must have shape"),
    ({"state_indices": torch.zeros(2)}, DtypeError, "state_indices must be int32"),
    ({"x": torch.zeros(2, 3)}, ShapeError, "weight must have shape"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_UPDATE)
def test_bad_update_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message) as caught:
        causal_conv1d_update(**{**UPDATE, **change})
    assert str(caught.value).startswith("causal_conv1d_update: ")
