import math

import pytest
import torch
from torch.nn import functional as F

from mmkernels.distill import fuse_qkv, seed_mixer, split_fused_qkv
from mmkernels.errors import ConfigError, ShapeError
from mmkernels.layers import GroupedMamba2Mixer

WIDTH, HEADS, KV_HEADS, HEADDIM = 48, 64, 32, 4  # many heads: statistics of the draws are worth testing


@pytest.fixture
def weights():
    rng = torch.Generator().manual_seed(3)
    shapes = [
        (HEADS * HEADDIM, WIDTH),
        (KV_HEADS * HEADDIM, WIDTH),
        (KV_HEADS * HEADDIM, WIDTH),
        (WIDTH, HEADS * HEADDIM),
    ]
    return [torch.randn(shape, generator=rng) for shape in shapes]


def mixer_of(strategy, weights, *, seed=0, dtype=None, **options):
    mixer = GroupedMamba2Mixer(WIDTH, nheads=HEADS, nkvheads=KV_HEADS, headdim=HEADDIM, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.fill_(math.nan)  # seeding must write every number
    seed_mixer(mixer, *weights, strategy=strategy, generator=torch.Generator().manual_seed(seed))
    return mixer


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 3), (4, 4, 2), (6, 1, 1), (16, 8, 4)])
def test_split_and_fuse_are_inverse(heads, kv_heads, dim):
    fused = torch.randn((heads + 2 * kv_heads) * dim, 5)
    parts = split_fused_qkv(fused, heads=heads, kv_heads=kv_heads, head_dim=dim)
    assert [p.shape[0] for p in parts] == [heads * dim, kv_heads * dim, kv_heads * dim]
    assert torch.equal(fuse_qkv(*parts, head_dim=dim), fused)
    assert all(p.untyped_storage().data_ptr() != fused.untyped_storage().data_ptr() for p in parts)


def test_split_gives_each_query_head_its_group():
    # row r of the fused matrix is the number r: q heads 2g, 2g+1, then k_g, v_g, 10 rows each
    rows = torch.arange(160.0)[:, None]
    q, k, v = split_fused_qkv(rows, heads=8, kv_heads=4, head_dim=10)
    for head in range(8):
        assert q[10 * head].item() == 40 * (head // 2) + 10 * (head % 2)
    for group in range(4):
        assert k[10 * group].item() == 40 * group + 20
        assert v[10 * group].item() == 40 * group + 30


def test_split_errors():
    with pytest.raises(ShapeError, match="= 32 rows"):
        split_fused_qkv(torch.zeros(31, 4), heads=4, kv_heads=2, head_dim=4)
    with pytest.raises(ShapeError, match="kv_heads must divide heads"):
        split_fused_qkv(torch.zeros(40, 4), heads=4, kv_heads=3, head_dim=4)
    with pytest.raises(ShapeError, match="v_weight must have the shape of k_weight"):
        fuse_qkv(torch.zeros(8, 4), torch.zeros(4, 4), torch.zeros(8, 4), head_dim=4)


@pytest.mark.parametrize("strategy", ["scratch", "inherit", "inherit_mimic"])
def test_what_is_inherited(weights, strategy):
    mixer = mixer_of(strategy, weights)
    assert all(p.isfinite().all() for p in mixer.parameters())
    for name, weight in zip(("q_proj", "k_proj", "v_proj"), weights, strict=False):
        assert torch.equal(getattr(mixer, name).weight, weight) == (strategy != "scratch")
    assert torch.equal(mixer.o_proj.weight, weights[3])  # even from scratch
    assert mixer.o_proj.weight.data_ptr() != weights[3].data_ptr()
    assert (mixer.g_norm.weight == 1).all()
    bound = 2**-2.5 * math.sqrt(6 / (WIDTH + HEADS * HEADDIM))
    assert 0.95 * bound < mixer.g_proj.weight.abs().max() <= bound


def test_mimic_invariants(weights):
    mixer = mixer_of("inherit_mimic", weights)
    u = torch.randn(2, 9, WIDTH)
    # the convolution passes the current token on, before SiLU
    raw = torch.cat([F.linear(u, w) for w in (weights[2], weights[1], weights[0])], -1)
    padded = F.pad(raw.transpose(1, 2), (1, 0))
    passed = F.conv1d(padded, mixer.conv1d.weight, mixer.conv1d.bias, groups=raw.shape[-1]).transpose(1, 2)
    torch.testing.assert_close(passed, raw, rtol=0, atol=0)
    # the step size does not depend on the token, and lies in [1e-3, 1e-1] (float32 rounding of the inverse softplus)
    steps = F.softplus(mixer.in_proj(u) + mixer.dt_bias)
    assert (steps == steps[:1, :1]).all()
    assert steps.min() >= 1e-3 * (1 - 1e-4)
    assert steps.max() <= 1e-1 * (1 + 1e-4)
    assert steps.max() / steps.min() > 20  # log-uniform over two decades, 64 heads
    assert abs(steps[0, 0].log10().mean() + 2) < 0.25  # the mean of the exponent is -2
    # so decay per token is between 0.762 and 0.9973
    assert (mixer.A_log_bias == 1).all()
    gamma = torch.exp(-math.e * steps)
    assert gamma.min() >= 0.7619
    assert gamma.max() <= 0.99729


def test_mimic_is_decayed_linear_attention(weights):
    mixer = mixer_of("inherit_mimic", weights)
    u = torch.randn(1, 6, WIDTH)
    q, k, v = (F.silu(F.linear(u[0], w)).unflatten(-1, (-1, HEADDIM)) for w in weights[:3])
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    step = F.softplus(mixer.dt_bias)
    out = torch.zeros(6, HEADS, HEADDIM)
    for t in range(6):
        for j in range(t + 1):
            weight = torch.exp(-math.e * step * (t - j)) * step * (q[t] * k[j]).sum(-1)
            out[t] += weight[:, None] * v[j]
    normed = F.rms_norm(out, (HEADDIM,), eps=1e-5) * F.silu(mixer.g_proj(u[0])).unflatten(-1, (-1, HEADDIM))
    torch.testing.assert_close(mixer.context(u)[0], normed.flatten(-2), rtol=1e-4, atol=1e-5)


def test_default_invariants(weights):
    mixer = mixer_of("inherit", weights)
    for values, bound in (
        (mixer.conv1d.weight, 2**-0.5),
        (mixer.conv1d.bias, 2**-0.5),
        (mixer.in_proj.weight, WIDTH**-0.5),
    ):
        assert 0.9 * bound < values.abs().max() <= bound
    assert (mixer.dt_bias == 0).all()
    assert mixer.A_log_bias.min() >= 0
    assert mixer.A_log_bias.max() <= math.log(16)
    assert mixer.A_log_bias.exp().max() > 12


def test_options_are_seeded_too(weights):
    mixer = mixer_of("inherit_mimic", weights, use_D=True, use_qk_norm=True, d_conv=4, use_gate=False, conv_bias=False)
    assert all(p.isfinite().all() for p in mixer.parameters())
    assert (mixer.D == 1).all()
    assert mixer.conv1d.weight[..., :3].abs().max() == 0
    assert (mixer.conv1d.weight[..., 3] == 1).all()


def test_seeded_by_the_generator_alone(weights):
    one, two, other = mixer_of("inherit", weights), mixer_of("inherit", weights), mixer_of("inherit", weights, seed=1)
    mixer = GroupedMamba2Mixer(WIDTH, nheads=HEADS, nkvheads=KV_HEADS, headdim=HEADDIM)
    before = torch.get_rng_state()
    seed_mixer(mixer, *weights, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(one.g_proj.weight, other.g_proj.weight)
    assert not torch.equal(one.A_log_bias, other.A_log_bias)


def test_bfloat16_keeps_decay_wide(weights):
    mixer = mixer_of("inherit_mimic", weights, dtype=torch.bfloat16)
    assert mixer.dt_bias.dtype == mixer.A_log_bias.dtype == torch.float32
    assert mixer.q_proj.weight.dtype == torch.bfloat16


def test_bad_arguments(weights):
    mixer = GroupedMamba2Mixer(WIDTH, nheads=HEADS, nkvheads=KV_HEADS, headdim=HEADDIM)
    with pytest.raises(ConfigError, match="Did you mean 'inherit_mimic'"):
        seed_mixer(mixer, *weights, strategy="inherit-mimic")
    with pytest.raises(ShapeError, match="k_weight must have shape"):
        seed_mixer(mixer, weights[0], weights[0], weights[2], weights[3])
