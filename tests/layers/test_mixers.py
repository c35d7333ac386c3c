"""What both mixers owe: states that continue exactly, inert padding, packing, gradients, compilation, dtypes."""

import copy
import itertools

import pytest
import torch

import mmkernels
from mmkernels import ConfigError, ShapeError
from mmkernels.layers import GroupedMamba2Mixer, Mamba2Mixer

D = 12  # d_model of every mixer here


def mamba2(**options):
    return Mamba2Mixer(D, headdim=4, d_state=5, ngroups=2, **options)


def gate_only(**options):
    return Mamba2Mixer(
        D, headdim=8, d_state=3, d_conv=2, rmsnorm=False, D_has_hdim=True, dt_limit=(0.01, 0.5), **options
    )


def grouped(**options):
    mixer = GroupedMamba2Mixer(D, nheads=4, nkvheads=2, headdim=4, **options)
    mixer.reset_new_parameters("default")
    return mixer


def grouped_options(**options):
    mixer = GroupedMamba2Mixer(
        D, nheads=3, nkvheads=3, headdim=4, d_conv=4, use_D=True, use_qk_norm=True, scale_input_by_dt=False, **options
    )
    mixer.reset_new_parameters("default")
    return mixer


MIXERS = [mamba2, gate_only, grouped, grouped_options]
every_mixer = pytest.mark.parametrize("make", MIXERS, ids=lambda f: f.__name__)
# float64 throughout; chunks and steps add the same terms in another order.
CLOSE = {"rtol": 1e-10, "atol": 1e-11}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def wide(make):
    return make(dtype=torch.float64).requires_grad_(False)


def tokens(batch, seqlen):
    return torch.randn(batch, seqlen, D, dtype=torch.float64)


def states(mixer, batch):
    return [torch.randn_like(state) for state in mixer.init_states(batch)]


@every_mixer
@pytest.mark.parametrize("started", [False, True])
def test_steps_equal_one_call(make, started):
    mixer, u = wide(make), tokens(2, 7)
    conv_state, ssm_state = states(mixer, 2) if started else mixer.init_states(2)
    given = {"conv_state": conv_state.clone(), "ssm_state": ssm_state.clone()} if started else {}
    whole, final_conv, final_ssm = mixer(u, return_states=True, **given)
    stepped = [mixer.step(u[:, t], conv_state, ssm_state) for t in range(7)]
    torch.testing.assert_close(torch.stack(stepped, 1), whole, **CLOSE)
    torch.testing.assert_close(conv_state, final_conv, **CLOSE)
    torch.testing.assert_close(ssm_state, final_ssm, **CLOSE)


@every_mixer
@pytest.mark.parametrize("cuts", [[3], [1, 2, 6], [0, 7]])
def test_pieces_equal_one_call_and_leave_their_states_alone(make, cuts):
    mixer, u = wide(make), tokens(2, 7)
    whole, *final = mixer(u, return_states=True)
    outs, given = [], {}
    for start, stop in itertools.pairwise([0, *cuts, 7]):
        before = {name: state.clone() for name, state in given.items()}
        out, conv_state, ssm_state = mixer(u[:, start:stop], return_states=True, **given)
        assert all(torch.equal(before[name], given[name]) for name in given)
        outs.append(out)
        given = {"conv_state": conv_state, "ssm_state": ssm_state}
    torch.testing.assert_close(torch.cat(outs, 1), whole, **CLOSE)
    torch.testing.assert_close((conv_state, ssm_state), tuple(final), **CLOSE)


@every_mixer
@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_there(make, side, started):
    mixer, lengths, width = wide(make), [9, 4, 1, 0], 9
    u, given = tokens(4, width), {}
    if started:
        given = dict(zip(("conv_state", "ssm_state"), states(mixer, 4), strict=True))
    position = torch.arange(width)
    mask = torch.stack([position >= width - n if side == "left" else position < n for n in lengths])
    out, conv_state, ssm_state = mixer(u, attention_mask=mask.int(), return_states=True, **given)
    for row, length in enumerate(lengths):
        own = {name: state[row : row + 1] for name, state in given.items()}
        want, want_conv, want_ssm = mixer(u[row : row + 1, mask[row]], return_states=True, **own)
        torch.testing.assert_close(out[row : row + 1, mask[row]], want, **CLOSE)
        torch.testing.assert_close(conv_state[row : row + 1], want_conv, **CLOSE)
        torch.testing.assert_close(ssm_state[row : row + 1], want_ssm, **CLOSE)
        if length == 0 and started:
            assert torch.equal(conv_state[row], given["conv_state"][row])
            assert torch.equal(ssm_state[row], given["ssm_state"][row])


@every_mixer
@pytest.mark.parametrize("started", [False, True])
def test_what_is_in_the_padding_does_not_matter(make, started):
    mixer, u = wide(make), tokens(3, 6)
    given = dict(zip(("conv_state", "ssm_state"), states(mixer, 3), strict=True)) if started else {}
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    real = mask.bool()
    first, *states_first = mixer(u, attention_mask=mask, return_states=True, **given)
    other = torch.where(real[..., None], u, 1e3 * torch.randn_like(u))
    second, *states_second = mixer(other, attention_mask=mask, return_states=True, **given)
    assert torch.equal(first[real], second[real])
    assert all(torch.equal(a, b) for a, b in zip(states_first, states_second, strict=True))


@every_mixer
def test_padding_gets_no_gradient_from_real_tokens(make):
    mixer, u = wide(make), tokens(2, 6).requires_grad_()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    out = mixer(u, attention_mask=mask)
    (grad,) = torch.autograd.grad(out[mask.bool()].square().sum(), u)
    assert torch.equal(grad[mask == 0], torch.zeros(5, D, dtype=torch.float64))
    assert (grad[mask == 1] != 0).any(-1).all()


@every_mixer
def test_packed_sequences_equal_separate_calls(make):
    mixer, u, bounds = wide(make), tokens(1, 11), [0, 4, 4, 5, 11]
    conv_state, ssm_state = states(mixer, 4)
    packed, packed_conv, packed_ssm = mixer(
        u, cu_seqlens=torch.tensor(bounds), conv_state=conv_state, ssm_state=ssm_state, return_states=True
    )
    for i, (start, stop) in enumerate(itertools.pairwise(bounds)):
        own = {"conv_state": conv_state[i : i + 1], "ssm_state": ssm_state[i : i + 1]}
        out, own_conv, own_ssm = mixer(u[:, start:stop], return_states=True, **own)
        torch.testing.assert_close(packed[:, start:stop], out, **CLOSE)
        torch.testing.assert_close(packed_conv[i : i + 1], own_conv, **CLOSE)
        torch.testing.assert_close(packed_ssm[i : i + 1], own_ssm, **CLOSE)
    ids = torch.tensor([[0] * 4 + [1] + [2] * 6])
    fresh = torch.cat([mixer(u[:, a:b]) for a, b in itertools.pairwise([0, 4, 5, 11])], 1)
    torch.testing.assert_close(mixer(u, seq_idx=ids), fresh, **CLOSE)


@every_mixer
def test_gradients_by_finite_differences(make):
    mixer = make(dtype=torch.float64)
    names, parameters = zip(*mixer.named_parameters(), strict=True)
    conv_state, ssm_state = states(mixer, 2)
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]])

    def function(u, conv_state, ssm_state, *values):
        kwargs = {"conv_state": conv_state, "ssm_state": ssm_state, "attention_mask": mask, "return_states": True}
        out, *final = torch.func.functional_call(mixer, dict(zip(names, values, strict=True)), (u,), kwargs)
        return out[mask.bool()], *final

    inputs = [t.detach().requires_grad_() for t in (tokens(2, 5), conv_state, ssm_state, *parameters)]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


def check_compiled(mixer, mask, dynamic, shapes):
    torch._dynamo.reset()

    def run(u, attention_mask, conv_state, ssm_state):
        return mixer(u, attention_mask=attention_mask, conv_state=conv_state, ssm_state=ssm_state, return_states=True)

    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch, seqlen in shapes:
        u = torch.randn(batch, seqlen, D, requires_grad=True)
        attention_mask = torch.ones(batch, seqlen, dtype=torch.int64) if mask else None
        args = (u, attention_mask, *states(mixer, batch))
        expected, actual = run(*args), compiled(*args)
        torch.testing.assert_close(actual, expected)
        grads = [torch.autograd.grad(o[0].square().sum(), [u, *mixer.parameters()]) for o in (expected, actual)]
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("make", "mask"), [(mamba2, False), (grouped, True)])
def test_compiles_to_one_graph(make, mask):
    check_compiled(make(), mask, dynamic=False, shapes=[(2, 7)])


@pytest.mark.slow
@every_mixer
@pytest.mark.parametrize("mask", [False, True])
def test_compiles_to_one_graph_for_every_length(make, mask):
    # The lengths differ from every size of the layer, so that one trace serves both.
    check_compiled(make(), mask, dynamic=True, shapes=[(2, 7), (3, 9)])


@every_mixer
def test_a_step_compiles_and_mutates_its_states(make):
    torch._dynamo.reset()
    mixer = make().requires_grad_(False)
    compiled = torch.compile(mixer.step, fullgraph=True, backend="aot_eager")
    u = torch.randn(2, D)
    pairs = [mixer.init_states(2), mixer.init_states(2)]
    torch.testing.assert_close(compiled(u, *pairs[0]), mixer.step(u, *pairs[1]))
    assert pairs[0][1].abs().sum() > 0
    torch.testing.assert_close(pairs[0], pairs[1])


@every_mixer
def test_16_bit_weights_keep_a_float32_recurrence(make):
    mixer = make(dtype=torch.bfloat16)
    rates = [p for name, p in mixer.named_parameters() if name in ("A_log", "A_log_bias", "dt_bias", "D")]
    assert rates
    assert all(p.dtype == torch.float32 for p in rates)
    u = torch.randn(2, 20, D).bfloat16()
    out, conv_state, ssm_state = mixer(u, return_states=True)
    assert (out.dtype, conv_state.dtype, ssm_state.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    # Cast as a whole, A_log and its kin are rounded, and still used in float32: exactly as the rounded values would be.
    cast = copy.deepcopy(mixer).to(torch.bfloat16)
    upcast = copy.deepcopy(cast)
    for name, parameter in upcast.named_parameters():
        if name in ("A_log", "A_log_bias", "dt_bias", "D"):
            parameter.data = parameter.data.float()
    assert torch.equal(cast(u), upcast(u))
    assert mixer.step(u[:, 0], *mixer.init_states(2)).dtype == torch.bfloat16


@every_mixer
def test_16_bit_output_is_as_good_as_the_projections_allow(make):
    mixer = make(dtype=torch.bfloat16).requires_grad_(False)
    u = torch.randn(2, 20, D).bfloat16()
    truth = copy.deepcopy(mixer).double()(u.double())
    # 5 roundings to bfloat16 (unit 2^-8) lie on the way: projection, convolution, scan, norm, output; twice for sums.
    error = (mixer(u).double() - truth).abs().max() / truth.abs().max()
    assert error < 5 * 2.0**-8 * 2


@every_mixer
def test_autocast(make):
    mixer, u = make(), torch.randn(2, 8, D)
    with torch.autocast("cpu", torch.bfloat16):
        out = mixer(u, attention_mask=torch.ones(2, 8))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), mixer(u), rtol=0, atol=5 * 2.0**-8 * 2 * mixer(u).abs().max().item())
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in mixer.parameters())


@every_mixer
def test_backends_agree(make):
    mixer, u = wide(make), tokens(2, 9)
    with mmkernels.use_backend("reference"):
        truth = mixer(u, return_states=True)
    torch.testing.assert_close(mixer(u, return_states=True), truth, **CLOSE)


@every_mixer
def test_no_tokens_and_no_rows(make):
    mixer = wide(make)
    for batch, seqlen in ((2, 0), (0, 3)):
        for mask in (None, torch.ones(batch, seqlen)):
            out, conv_state, ssm_state = mixer(tokens(batch, seqlen), attention_mask=mask, return_states=True)
            assert out.shape == (batch, seqlen, D)
            assert [conv_state.shape, ssm_state.shape] == [state.shape for state in mixer.init_states(batch)]
            assert not conv_state.any()
            assert not ssm_state.any()


@every_mixer
def test_state_dict_round_trip(make):
    first, second = make(), make()
    second.load_state_dict(first.state_dict())
    u = torch.randn(1, 5, D)
    assert torch.equal(first(u), second(u))
    kept = {name for name, p in first.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert kept == {name for name, _ in first.named_parameters() if name in ("A_log", "A_log_bias", "dt_bias", "D")}


@every_mixer
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"u": torch.zeros(2, 5, D + 1)}, ShapeError, "u must have shape"),
        ({"u": torch.zeros(2, D)}, ShapeError, "u must have shape"),
        ({"attention_mask": torch.ones(2, 4)}, ShapeError, "attention_mask must have shape"),
        ({"conv_state": torch.zeros(2, 1, 1)}, ConfigError, "ssm_state must be given together with conv_state"),
        ({"ssm_state": torch.zeros(2, 1, 1)}, ConfigError, "conv_state must be given together with ssm_state"),
        (
            {"attention_mask": torch.ones(2, 5), "seq_idx": torch.zeros(2, 5, dtype=torch.int32)},
            ConfigError,
            "attention_mask must be the only description",
        ),
    ],
)
def test_bad_calls_are_named(make, change, error, message):
    mixer = make()
    with pytest.raises(error, match=message) as caught:
        mixer(**{"u": torch.zeros(2, 5, D), **change})
    assert str(caught.value).startswith(type(mixer).__name__)
