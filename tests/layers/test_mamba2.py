"""The Mamba-2 mixer against its formula, its official shapes and its initial draws; the residual block."""

import math

import pytest
import torch
import torch.nn.functional as F

from mmkernels import ShapeError
from mmkernels.layers import Mamba2Block, Mamba2Mixer


def plain_mixer(mixer, u):
    """The mixer's formula, one token and one head after the other, without a state from before."""
    batch, seqlen, _ = u.shape
    H, P, N, G = mixer.nheads, mixer.headdim, mixer.d_state, mixer.ngroups
    zxbcdt = u @ mixer.in_proj.weight.T
    if mixer.in_proj.bias is not None:
        zxbcdt = zxbcdt + mixer.in_proj.bias
    z, raw, dt = zxbcdt[..., : H * P], zxbcdt[..., H * P : -H], zxbcdt[..., -H:]
    weight, conv = mixer.conv1d.weight[:, 0], torch.zeros_like(raw)
    for t in range(seqlen):
        for k in range(mixer.d_conv):
            source = t - (mixer.d_conv - 1) + k
            if source >= 0:
                conv[:, t] += weight[:, k] * raw[:, source]
    if mixer.conv1d.bias is not None:
        conv = conv + mixer.conv1d.bias
    conv = conv * torch.sigmoid(conv)
    x = conv[..., : H * P].reshape(batch, seqlen, H, P)
    B = conv[..., H * P : H * P + G * N].reshape(batch, seqlen, G, N)
    C = conv[..., H * P + G * N :].reshape(batch, seqlen, G, N)
    step = torch.log1p(torch.exp(dt + mixer.dt_bias)).clamp(*mixer.dt_limit)
    D = mixer.D.reshape(H, -1)
    y = torch.zeros_like(x)
    for h in range(H):
        g, S = h * G // H, torch.zeros(batch, P, N, dtype=u.dtype)
        for t in range(seqlen):
            d = step[:, t, h, None, None]
            S = torch.exp(-torch.exp(mixer.A_log[h]) * d) * S + d * x[:, t, h, :, None] * B[:, t, g, None, :]
            y[:, t, h] = (S @ C[:, t, g, :, None])[..., 0] + D[h] * x[:, t, h]
    y, gate = y.flatten(-2), z * torch.sigmoid(z)
    if mixer.norm is None:
        y = y * gate
    else:
        v = y if mixer.norm.norm_before_gate else y * gate
        v = v.unflatten(-1, (G, -1))
        v = (v / (v.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2) * mixer.norm.weight
        y = v * gate if mixer.norm.norm_before_gate else v
    out = y @ mixer.out_proj.weight.T
    return out if mixer.out_proj.bias is None else out + mixer.out_proj.bias


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ngroups": 4, "norm_before_gate": True},
        {"ngroups": 2, "rmsnorm": False, "D_has_hdim": True},
        {"bias": True, "conv_bias": False, "d_conv": 2, "dt_limit": (0.02, 0.05)},
        {"expand": 1, "chunk_size": 4, "A_init_range": (0.5, 1.0)},
    ],
    ids=lambda o: "-".join(o) or "default",
)
def test_equals_the_formula(options):
    torch.manual_seed(0)
    mixer = Mamba2Mixer(16, **{"headdim": 4, "d_state": 6, "dtype": torch.float64, **options}).requires_grad_(False)
    for parameter in mixer.parameters():
        parameter += 0.1 * torch.randn_like(parameter)  # no value that hides a term: biases 0, norm and D 1
    u = torch.randn(2, 11, 16, dtype=torch.float64)
    torch.testing.assert_close(mixer(u), plain_mixer(mixer, u), rtol=1e-10, atol=1e-12)


def test_shapes_and_count_of_the_official_130m_layer():
    mixer = Mamba2Mixer(768, device="meta")
    assert {name: tuple(p.shape) for name, p in mixer.named_parameters()} == {
        "in_proj.weight": (3352, 768),
        "conv1d.weight": (1792, 1, 4),
        "conv1d.bias": (1792,),
        "dt_bias": (24,),
        "A_log": (24,),
        "D": (24,),
        "norm.weight": (1536,),
        "out_proj.weight": (768, 1536),
    }
    block = Mamba2Block(768, device="meta")
    layer = sum(p.numel() for p in block.parameters())
    # mamba2-130m: 24 blocks, a tied embedding of 50288 rows and a last norm make the published total.
    assert 24 * layer + 50288 * 768 + 768 == 128_989_632


@pytest.mark.parametrize(
    ("d_model", "in_proj", "conv_dim", "nheads"),
    [(1024, 4384, 2304, 32), (1536, 6448, 3328, 48), (2048, 8512, 4352, 64), (2560, 10576, 5376, 80)],
)
def test_sizes_of_the_official_family(d_model, in_proj, conv_dim, nheads):
    mixer = Mamba2Mixer(d_model, device="meta")
    assert (mixer.in_proj.out_features, mixer.conv_dim, mixer.nheads) == (in_proj, conv_dim, nheads)


def test_initial_values():
    torch.manual_seed(0)
    mixer = Mamba2Mixer(512, headdim=1, d_state=2, bias=True)
    heads = mixer.nheads
    assert heads == 1024
    log_dt = F.softplus(mixer.dt_bias.double()).log()
    low, high = math.log(1e-3), math.log(1e-1)
    assert log_dt.min() > low - 1e-3
    assert log_dt.max() < high + 1e-3
    # Uniform: the mean of n draws lies within 4 sigma = 4 width / sqrt(12 n) of the middle; quartiles hold a quarter.
    assert abs(log_dt.mean() - (low + high) / 2) < 4 * (high - low) / math.sqrt(12 * heads)
    A = mixer.A_log.double().exp()
    assert A.min() >= 1 - 1e-6
    assert A.max() <= 16 + 1e-5
    assert abs(A.mean() - 8.5) < 4 * 15 / math.sqrt(12 * heads)
    for values, start, width in ((log_dt, low, high - low), (A, 1.0, 15.0)):
        counts = torch.histc((values - start) / width, 4, 0, 1)
        assert (counts - heads / 4).abs().max() < 4 * math.sqrt(heads * 3 / 16)
    assert torch.equal(mixer.D, torch.ones(heads))
    assert torch.equal(mixer.norm.weight, torch.ones(512 * 2))
    assert not mixer.in_proj.bias.any()
    assert not mixer.out_proj.bias.any()
    assert mixer.conv1d.weight.abs().max() <= 0.5  # U(-1, 1) / sqrt(width)
    assert mixer.conv1d.weight.abs().max() > 0.49


def test_floor_and_range_of_the_initial_step_sizes():
    torch.manual_seed(0)
    mixer = Mamba2Mixer(64, headdim=1, d_state=2, dt_min=1e-6, dt_max=1e-2, dt_init_floor=1e-3)
    dt = F.softplus(mixer.dt_bias.double())
    assert abs(dt.min() / 1e-3 - 1) < 1e-3
    assert dt.max() < 1.001e-2


def test_reset_draws_again():
    torch.manual_seed(0)
    mixer = Mamba2Mixer(16, headdim=4, d_state=6)
    before = {name: p.clone() for name, p in mixer.named_parameters()}
    mixer.reset_parameters()
    same = {name for name, p in mixer.named_parameters() if torch.equal(before[name], p)}
    assert same == {"D", "norm.weight"}


def test_sizes_that_do_not_divide():
    with pytest.raises(ShapeError, match=r"headdim must divide expand \* d_model; got headdim=5"):
        Mamba2Mixer(16, headdim=5)
    with pytest.raises(ShapeError, match="ngroups must divide nheads; got ngroups=3, nheads=8"):
        Mamba2Mixer(16, headdim=4, ngroups=3)


def test_blocks_add_norm_and_mix():
    torch.manual_seed(0)
    blocks = [
        Mamba2Block(16, mixer=Mamba2Mixer(16, headdim=4, d_state=6, dtype=torch.float64), dtype=torch.float64)
        for _ in range(2)
    ]
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    hidden, residual = blocks[0](x)
    hidden, residual = blocks[1](hidden, residual)
    expected = x
    for block in blocks:
        normed = expected / (expected.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        expected = expected + plain_mixer(block.mixer, normed)
    torch.testing.assert_close(hidden + residual, expected, rtol=1e-10, atol=1e-12)


def test_block_states_and_steps():
    torch.manual_seed(0)
    block = Mamba2Block(16, mixer=Mamba2Mixer(16, headdim=4, d_state=6)).requires_grad_(False)
    x, residual = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    hidden, total, conv_state, ssm_state = block(x, residual, return_states=True)
    states = block.mixer.init_states(2)
    for t in range(5):
        stepped, after = block.step(x[:, t], residual[:, t], *states)
        torch.testing.assert_close(stepped, hidden[:, t], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(after, total[:, t])
    torch.testing.assert_close(states, (conv_state, ssm_state), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fp32", [True, False])
def test_the_residual_stream_is_float32(fp32):
    block = Mamba2Block(
        16,
        mixer=Mamba2Mixer(16, headdim=4, d_state=6, dtype=torch.bfloat16),
        residual_in_fp32=fp32,
        dtype=torch.bfloat16,
    )
    hidden, residual = block(torch.randn(1, 3, 16).bfloat16(), torch.randn(1, 3, 16).bfloat16())
    assert hidden.dtype == torch.bfloat16
    assert residual.dtype == (torch.float32 if fp32 else torch.bfloat16)
