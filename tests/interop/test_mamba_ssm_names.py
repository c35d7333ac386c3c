"""mamba-ssm's and causal-conv1d's functions by their own names: signatures, layouts, what they add up to."""

import inspect

import pytest
import torch

import mmkernels
from mmkernels.errors import ConfigError, ShapeError
from mmkernels.interop import causal_conv1d, mamba_ssm

# As published: names and order are what positional and keyword callers rely on.
SIGNATURES = {
    mamba_ssm.mamba_chunk_scan_combined: "x dt A B C chunk_size D z dt_bias initial_states seq_idx cu_seqlens "
    "dt_softplus dt_limit return_final_states return_varlen_states state_dtype",
    mamba_ssm.mamba_split_conv1d_scan_combined: "zxbcdt conv1d_weight conv1d_bias dt_bias A D chunk_size "
    "initial_states seq_idx dt_limit return_final_states activation rmsnorm_weight rmsnorm_eps "
    "outproj_weight outproj_bias headdim ngroups norm_before_gate state_dtype",
    mamba_ssm.selective_state_update: "state x dt A B C D z dt_bias dt_softplus state_batch_indices",
    mamba_ssm.rmsnorm_fn: "x weight bias z eps group_size norm_before_gate",
    causal_conv1d.causal_conv1d_fn: "x weight bias seq_idx initial_states return_final_states "
    "final_states_out activation",
    causal_conv1d.causal_conv1d_update: "x conv_state weight bias activation cache_seqlens conv_state_indices",
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f.__name__)
def test_signature(function):
    assert " ".join(inspect.signature(function).parameters) == SIGNATURES[function]


@pytest.fixture
def scan():
    torch.manual_seed(0)
    return {
        "x": torch.randn(1, 20, 4, 8),
        "dt": torch.rand(1, 20, 4),
        "A": -torch.rand(4) - 0.1,
        "B": torch.randn(1, 20, 2, 5),
        "C": torch.randn(1, 20, 2, 5),
    }


def test_scan_returns_what_is_asked_for(scan):
    y, final = mmkernels.ssd_scan(**scan, return_final_states=True)
    got = mamba_ssm.mamba_chunk_scan_combined(*scan.values(), 16, return_final_states=True, state_dtype=torch.float64)
    torch.testing.assert_close(got[0], y)
    torch.testing.assert_close(got[1], final.double())
    assert torch.equal(mamba_ssm.mamba_chunk_scan_combined(*scan.values(), 16), y)


def test_states_of_packed_sequences(scan):
    bounds = torch.tensor([0, 7, 20], dtype=torch.int32)
    initial = torch.randn(1, 4, 8, 5)
    y, last, each = mamba_ssm.mamba_chunk_scan_combined(
        **scan, initial_states=initial, cu_seqlens=bounds, return_final_states=True, return_varlen_states=True
    )
    parts = [{k: v if k == "A" else v[:, a:b] for k, v in scan.items()} for a, b in ((0, 7), (7, 20))]
    first = mmkernels.ssd_scan(**parts[0], initial_states=initial, return_final_states=True)
    second = mmkernels.ssd_scan(**parts[1], return_final_states=True)
    torch.testing.assert_close(y, torch.cat([first[0], second[0]], dim=1))
    torch.testing.assert_close(each, torch.cat([first[1], second[1]]))
    assert torch.equal(last, each[-1:])
    with pytest.raises(ConfigError, match="cu_seqlens must be given"):
        mamba_ssm.mamba_chunk_scan_combined(**scan, return_varlen_states=True)


def test_expanded_views_at_decode(scan):
    state = torch.randn(1, 4, 8, 5)
    x, dt, B, C = (scan[k][:, 0] for k in ("x", "dt", "B", "C"))
    D, bias = torch.randn(4), torch.randn(4)
    mine, theirs = state.clone(), state.clone()
    want = mmkernels.ssd_update(mine, x, dt, scan["A"], B, C, D=D, dt_bias=bias, dt_softplus=True)
    got = mamba_ssm.selective_state_update(
        theirs,
        x,
        dt[..., None].expand(-1, -1, 8),
        scan["A"][:, None, None].expand(-1, 8, 5),
        B,
        C,
        D[:, None].expand(-1, 8),
        dt_bias=bias[:, None].expand(-1, 8),
        dt_softplus=True,
    )
    assert torch.equal(got, want)
    assert torch.equal(mine, theirs)
    with pytest.raises(ShapeError, match="A must be the same within a head"):
        mamba_ssm.selective_state_update(theirs, x, dt, -torch.rand(4, 8, 5), B, C)
    with pytest.raises(ShapeError, match="Mamba-1"):
        mamba_ssm.selective_state_update(theirs, x[0], dt[0], scan["A"], B[0], C[0])


def test_split_function_is_its_parts():
    torch.manual_seed(1)
    heads, channels, groups, dstate, width = 4, 8, 2, 5, 4
    inner, keys = heads * channels, groups * dstate
    zxbcdt = torch.randn(2, 11, 2 * inner + 2 * keys + heads, requires_grad=True)
    weight, bias = torch.randn(inner + 2 * keys, width), torch.randn(inner + 2 * keys)
    dt_bias, A, D = torch.randn(heads), -torch.rand(heads) - 0.1, torch.randn(heads)
    norm, out = torch.rand(inner), torch.randn(6, inner)
    got, final = mamba_ssm.mamba_split_conv1d_scan_combined(
        zxbcdt, weight, bias, dt_bias, A, D, 8, rmsnorm_weight=norm, outproj_weight=out, headdim=channels,
        ngroups=groups, norm_before_gate=False, return_final_states=True,
    )  # fmt: skip
    z, mixed, dt = zxbcdt.split([inner, inner + 2 * keys, heads], dim=-1)
    x, B, C = mmkernels.causal_conv1d(mixed, weight, bias, activation="silu").split([inner, keys, keys], dim=-1)
    y, state = mmkernels.ssd_scan(
        x.unflatten(-1, (heads, channels)), dt, A, B.unflatten(-1, (groups, dstate)), C.unflatten(-1, (groups, dstate)),
        D=D, dt_bias=dt_bias, dt_softplus=True, return_final_states=True,
    )  # fmt: skip
    y = mmkernels.gated_rms_norm(y.flatten(-2), norm, z=z, eps=1e-6, group_size=inner // groups)
    torch.testing.assert_close(got, y @ out.T)
    torch.testing.assert_close(final, state)
    got.sum().backward()
    assert zxbcdt.grad.abs().sum() > 0
    with pytest.raises(ShapeError, match="headdim must be given"):
        mamba_ssm.mamba_split_conv1d_scan_combined(zxbcdt, weight, bias, dt_bias, A, D)
    with pytest.raises(ShapeError, match="zxbcdt must have"):
        mamba_ssm.mamba_split_conv1d_scan_combined(zxbcdt, weight, bias, dt_bias, A, D, headdim=16)


def test_channels_first_convolution():
    x, weight, bias = torch.randn(2, 6, 9), torch.randn(6, 4), torch.randn(6)
    room = torch.zeros(2, 6, 3)
    y, final = causal_conv1d.causal_conv1d_fn(
        x, weight, bias, return_final_states=True, final_states_out=room, activation="swish"
    )
    want = torch.nn.functional.silu(torch.nn.functional.conv1d(x, weight[:, None], bias, padding=3, groups=6)[..., :9])
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-6)
    assert final is room
    assert torch.equal(room, x[..., -3:])
    state, steps = torch.zeros(2, 6, 4), []
    for t in range(9):
        steps.append(causal_conv1d.causal_conv1d_update(x[..., t], state, weight, bias, "silu"))
    torch.testing.assert_close(torch.stack(steps, dim=-1), want, rtol=1e-5, atol=1e-6)
    several = causal_conv1d.causal_conv1d_update(x, torch.zeros(2, 6, 3), weight, bias, "silu")
    torch.testing.assert_close(several, want, rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match="cache_seqlens must be None"):
        causal_conv1d.causal_conv1d_update(x, state, weight, cache_seqlens=torch.zeros(2))
    with pytest.raises(ConfigError, match="activation must be"):
        causal_conv1d.causal_conv1d_fn(x, weight, activation="relu")
    with pytest.raises(ShapeError, match=r"\(batch, dim, seqlen\)"):
        causal_conv1d.causal_conv1d_fn(x[0], weight)


def test_norm_defaults_are_the_packages():
    x, z, weight = torch.randn(3, 8), torch.randn(3, 8), torch.rand(8)
    want = mmkernels.gated_rms_norm(x, weight, z=z, eps=1e-6, norm_before_gate=True)
    assert torch.equal(mamba_ssm.rmsnorm_fn(x, weight, None, z), want)
