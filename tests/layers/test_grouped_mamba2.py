"""The mmMamba mixer against its formula, its full-size parameter counts and its two ways to start."""

import math

import pytest
import torch
import torch.nn.functional as F

from mmkernels import ConfigError, ShapeError
from mmkernels.layers import GroupedMamba2Mixer


def plain_context(mixer, u, scale=True):
    """The mixer's formula before o_proj, one token and one head after the other, without a state from before."""
    batch, seqlen, _ = u.shape
    H, G, P = mixer.nheads, mixer.nkvheads, mixer.headdim
    v, k, q = (u @ w.weight.T for w in (mixer.v_proj, mixer.k_proj, mixer.q_proj))
    raw = torch.cat([v, k, q], -1)
    weight, conv = mixer.conv1d.weight[:, 0], torch.zeros_like(raw)
    for t in range(seqlen):
        for tap in range(mixer.d_conv):
            source = t - (mixer.d_conv - 1) + tap
            if source >= 0:
                conv[:, t] += weight[:, tap] * raw[:, source]
    if mixer.conv1d.bias is not None:
        conv = conv + mixer.conv1d.bias
    conv = conv * torch.sigmoid(conv)
    v = conv[..., : G * P].reshape(batch, seqlen, G, P)
    k = conv[..., G * P : 2 * G * P].reshape(batch, seqlen, G, P)
    q = conv[..., 2 * G * P :].reshape(batch, seqlen, H, P)
    if mixer.q_norm is not None:
        q, k = (F.layer_norm(t, (P,), n.weight, n.bias) for t, n in ((q, mixer.q_norm), (k, mixer.k_norm)))
    dt = torch.log1p(torch.exp(u @ mixer.in_proj.weight.T + mixer.dt_bias))
    y = torch.zeros_like(q)
    for h in range(H):
        g, S = h // (H // G), torch.zeros(batch, P, P, dtype=u.dtype)
        for t in range(seqlen):
            d = dt[:, t, h, None, None]
            write = v[:, t, g, :, None] * k[:, t, g, None, :]
            S = torch.exp(-torch.exp(mixer.A_log_bias[h]) * d) * S + (d * write if scale else write)
            y[:, t, h] = (S @ q[:, t, h, :, None])[..., 0]
            if mixer.D is not None:
                y[:, t, h] += mixer.D[h] * v[:, t, g]
    o = y / (y.pow(2).mean(-1, keepdim=True) + mixer.g_norm.eps).sqrt() * mixer.g_norm.weight
    if mixer.g_proj is not None:
        gate = (u @ mixer.g_proj.weight.T).reshape(batch, seqlen, H, P)
        o = o * gate * torch.sigmoid(gate)
    return o.flatten(-2)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nkvheads": 4, "use_D": True, "eps": 1e-3},
        {"nkvheads": 1, "use_gate": False, "conv_bias": False, "chunk_size": 3},
        {"use_qk_norm": True, "d_conv": 4},
        {"scale_input_by_dt": False, "use_D": True, "d_conv": 1},
    ],
    ids=lambda o: "-".join(o) or "default",
)
def test_equals_the_formula(options):
    torch.manual_seed(0)
    sizes = {"nheads": 4, "nkvheads": 2, "headdim": 5, "dtype": torch.float64, **options}
    mixer = GroupedMamba2Mixer(12, **sizes).requires_grad_(False)
    for parameter in mixer.parameters():
        parameter += 0.1 * torch.randn_like(parameter)  # no value that hides a term: zeros and ones of the start
    u = torch.randn(2, 8, 12, dtype=torch.float64)
    expected = plain_context(mixer, u, options.get("scale_input_by_dt", True))
    torch.testing.assert_close(mixer.context(u), expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(mixer(u), expected @ mixer.o_proj.weight.T, rtol=1e-9, atol=1e-11)


def test_full_size_counts_and_shapes():
    mixer = GroupedMamba2Mixer(2048, nheads=16, nkvheads=8, headdim=128, device="meta")
    assert {name: tuple(p.shape) for name, p in mixer.named_parameters()} == {
        "q_proj.weight": (2048, 2048),
        "k_proj.weight": (1024, 2048),
        "v_proj.weight": (1024, 2048),
        "o_proj.weight": (2048, 2048),
        "in_proj.weight": (16, 2048),
        "g_proj.weight": (2048, 2048),
        "conv1d.weight": (4096, 1, 2),
        "conv1d.bias": (4096,),
        "g_norm.weight": (128,),
        "dt_bias": (16,),
        "A_log_bias": (16,),
    }
    inherited = ("q_proj", "k_proj", "v_proj", "o_proj")
    new = sum(p.numel() for name, p in mixer.named_parameters() if not name.startswith(inherited))
    assert new == 4_239_520
    conv_state, ssm_state = mixer.init_states(3, dtype=torch.bfloat16)
    assert (conv_state.shape, ssm_state.shape) == ((3, 4096, 1), (3, 16, 128, 128))
    assert ssm_state.dtype == torch.float32


def tall(style, nheads=1024):
    torch.manual_seed(0)
    mixer = GroupedMamba2Mixer(64, nheads=nheads, nkvheads=nheads // 2, headdim=2)
    mixer.reset_new_parameters(style)
    return mixer


def test_mimic_start():
    mixer = tall("mimic")
    taps = mixer.conv1d.weight[:, 0]
    assert torch.equal(taps, torch.tensor([0.0, 1.0]).expand_as(taps))
    assert not mixer.conv1d.bias.any()
    assert not mixer.in_proj.weight.any()
    assert torch.equal(mixer.A_log_bias, torch.ones(1024))
    assert torch.equal(mixer.g_norm.weight, torch.ones(2))
    dt = F.softplus(mixer.dt_bias.double())
    assert dt.min() > 0.999e-3
    assert dt.max() < 1.001e-1
    middle = (math.log(1e-3) + math.log(1e-1)) / 2  # of a uniform distribution: within 4 standard errors
    assert abs(dt.log().mean() - middle) < 4 * math.log(100) / math.sqrt(12 * 1024)
    decay = torch.exp(-math.e * dt)
    assert decay.min() > 0.761
    assert decay.max() < 0.9974
    assert mixer.g_proj.weight.abs().max() <= 2**-2.5 * math.sqrt(6 / (64 + 2048)) * 1.0001
    assert mixer.g_proj.weight.abs().max() > 2**-2.5 * math.sqrt(6 / (64 + 2048)) * 0.999


def test_default_start():
    mixer = tall("default")
    for values in (mixer.conv1d.weight, mixer.conv1d.bias):
        assert 0.70 < values.abs().max() <= 1 / math.sqrt(2)
        assert abs(values.mean()) < 0.05
    assert 0.12 < mixer.in_proj.weight.abs().max() <= 1 / math.sqrt(64)
    assert not mixer.dt_bias.any()
    A = mixer.A_log_bias.double().exp()
    assert A.min() >= 1 - 1e-6
    assert A.max() <= 16 + 1e-5
    assert abs(A.mean() - 8.5) < 4 * 15 / math.sqrt(12 * 1024)


@pytest.mark.parametrize("style", ["mimic", "default"])
def test_reset_of_new_parameters_leaves_the_attention_alone(style):
    torch.manual_seed(0)
    mixer = GroupedMamba2Mixer(12, nheads=4, nkvheads=2, headdim=4, use_D=True, use_qk_norm=True)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter)
    before = {name: p.clone() for name, p in mixer.named_parameters()}
    mixer.reset_new_parameters(style)
    same = {name for name, p in mixer.named_parameters() if torch.equal(before[name], p)}
    assert same == {f"{name}_proj.weight" for name in "qkvo"}


def test_unknown_style():
    mixer = GroupedMamba2Mixer(12, nheads=4, nkvheads=2, headdim=4)
    with pytest.raises(ConfigError, match="Did you mean 'mimic'"):
        mixer.reset_new_parameters("mimmic")


def test_mimic_start_is_decayed_linear_attention():
    torch.manual_seed(0)
    mixer = GroupedMamba2Mixer(12, nheads=4, nkvheads=2, headdim=4, use_gate=False, dtype=torch.float64)
    mixer.requires_grad_(False)
    u = torch.randn(1, 6, 12, dtype=torch.float64)
    q = F.silu(mixer.q_proj(u)).unflatten(-1, (4, 4))
    k, v = (F.silu(p(u)).unflatten(-1, (2, 4)).repeat_interleave(2, 2) for p in (mixer.k_proj, mixer.v_proj))
    dt = F.softplus(mixer.dt_bias)
    distance = torch.arange(6)[:, None] - torch.arange(6)[None]
    weights = torch.where(distance >= 0, torch.exp(-math.e * dt[:, None, None] * distance), 0.0)
    scores = torch.einsum("blhn,bmhn->bhlm", q, k) * weights * dt[:, None, None]
    y = torch.einsum("bhlm,bmhp->blhp", scores, v)
    y = y / (y.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(mixer.context(u), y.flatten(-2), rtol=1e-9, atol=1e-11)


def test_hooks_see_the_context_before_o_proj():
    torch.manual_seed(0)
    mixer = GroupedMamba2Mixer(12, nheads=4, nkvheads=2, headdim=4).requires_grad_(False)
    seen = []
    mixer.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    u = torch.randn(2, 5, 12)
    mixer(u)
    mixer.step(u[:, 0], *mixer.init_states(2))
    torch.testing.assert_close(seen[0], mixer.context(u))
    torch.testing.assert_close(seen[1], mixer.context(u)[:, 0])


def test_tiny_steps_without_the_step_in_the_input_weight_stay_finite():
    mixer = GroupedMamba2Mixer(12, nheads=4, nkvheads=2, headdim=4, scale_input_by_dt=False)
    torch.nn.init.constant_(mixer.dt_bias, -200.0)
    out = mixer(torch.randn(2, 6, 12))
    assert torch.isfinite(out).all()
    assert out.abs().sum() > 0


def test_heads_that_do_not_divide():
    with pytest.raises(ShapeError, match="nkvheads must divide nheads; got nkvheads=3, nheads=4"):
        GroupedMamba2Mixer(12, nheads=4, nkvheads=3, headdim=4)
