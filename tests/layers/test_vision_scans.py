"""Vim's and VMamba's mixers on the Mamba-2 scan against their formulas with permuted copies, token by token."""

import pytest
import torch
import torch.nn.functional as F

import mmkernels
from mmkernels import ShapeError
from mmkernels.layers import SS2DMamba2, VimMamba2

KINDS = {"vim": VimMamba2, "ss2d": SS2DMamba2}


def build(kind, dtype=torch.float64, **options):
    torch.manual_seed(0)
    mixer = KINDS[kind](12, headdim=6, **{"d_state": 5, **options}, dtype=dtype)
    with torch.no_grad():
        for parameter in (mixer.dt_bias, mixer.A_log, mixer.D):
            parameter.normal_()
    return mixer


def recurrence(x, dt, A, B, C, D):
    """One head after the other, one token after the other: x (L, H, P), dt (L, H), B and C (L, N)."""
    y = torch.empty_like(x)
    for h in range(x.shape[1]):
        state = x.new_zeros(x.shape[2], B.shape[1])
        for t in range(x.shape[0]):
            state = (A[h] * dt[t, h]).exp() * state + dt[t, h] * torch.outer(x[t, h], B[t])
            y[t, h] = state @ C[t] + D[h] * x[t, h]
    return y


def by_formula(kind, m, u, grid):
    outs = []
    for tokens in u:
        x, z = (tokens @ m.in_proj.weight.T).split(m.d_inner, dim=-1)
        if kind == "ss2d":
            cells = x.T.reshape(1, m.d_inner, *grid)
            cells = F.conv2d(cells, m.conv2d.weight, m.conv2d.bias, padding=1, groups=m.d_inner)
            x = F.silu(cells).reshape(m.d_inner, -1).T
        total = 0
        for k, scan in enumerate(m.scans):
            order, inverse = mmkernels.scan_permutation(scan, *grid)
            own = x[order]
            if kind == "vim":
                padded = F.pad(own, (0, 0, m.d_conv - 1, 0))
                taps = [padded[s : s + len(own)] * m.conv_weight[k, :, s] for s in range(m.d_conv)]
                own = F.silu(sum(taps) + m.conv_bias[k])
            dt, B, C = (own @ m.x_proj[k].T).split([m.nheads, m.d_state, m.d_state], dim=-1)
            dt = F.softplus(dt + m.dt_bias[k])
            heads = own.reshape(len(own), m.nheads, m.headdim)
            y = recurrence(heads, dt, -m.A_log[k].exp(), B, C, m.D[k])
            total = total + y.reshape(len(own), -1)[inverse]
        if kind == "ss2d":
            total = F.layer_norm(total, (m.d_inner,), m.out_norm.weight, m.out_norm.bias)
        outs.append((total * F.silu(z)) @ m.out_proj.weight.T)
    return torch.stack(outs)


@pytest.mark.parametrize("grid", [(3, 4), (1, 5)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_formula(kind, grid):
    mixer = build(kind)
    u = torch.randn(2, grid[0] * grid[1], 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(mixer(u, grid), by_formula(kind, mixer, u, grid), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns_in_every_dtype(kind):
    for dtype in (torch.float32, torch.bfloat16):
        mixer = build(kind, dtype)
        assert {mixer.A_log.dtype, mixer.dt_bias.dtype, mixer.D.dtype} == {torch.float32}
        mixer(torch.randn(1, 12, 12).to(dtype), (3, 4)).float().square().mean().backward()
        dead = [
            n for n, p in mixer.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()
        ]
        assert not dead


@pytest.mark.parametrize("kind", KINDS)
def test_drawing_again_draws_everything(kind):
    mixer = build(kind)
    before = {name: p.clone() for name, p in mixer.named_parameters()}
    mixer.reset_parameters()
    same = [name for name, p in mixer.named_parameters() if torch.equal(p, before[name])]
    assert set(same) <= {"out_norm.weight", "out_norm.bias"}


def test_bad_input_is_named():
    with pytest.raises(ShapeError, match=r"grid must have as many cells.*\(3, 3\) and 12"):
        build("vim")(torch.randn(1, 12, 12, dtype=torch.float64), (3, 3))
    with pytest.raises(ShapeError, match="d_conv must be odd"):
        SS2DMamba2(12, headdim=6, d_conv=4)
    with pytest.raises(ShapeError, match="at least one scan"):
        VimMamba2(12, headdim=6, scans=())
    with pytest.raises(ShapeError, match="headdim must divide"):
        VimMamba2(12, headdim=7)
