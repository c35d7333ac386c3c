"""The multi-directional mixer against an explicit one that flips and copies; the connector against its formula."""

import pytest
import torch
import torch.nn.functional as F

import mmkernels
from mmkernels import ConfigError, ShapeError
from mmkernels.layers import Mamba2Mixer, Mamba2ScanConnector, MultiDirectionalMamba2
from mmkernels.testing import assert_within

CROSS = ("raster", "column", "raster_rev", "column_rev")


def small(scans=("raster", "raster_rev"), dtype=torch.float64, **options):
    torch.manual_seed(0)
    sizes = {"d_state": 8, "headdim": 8} | options
    mixer = MultiDirectionalMamba2(24, scans=scans, **sizes, dtype=dtype)
    for parameter in (mixer.dt_bias, mixer.A_log, mixer.D, mixer.norm.weight):
        torch.nn.init.normal_(parameter)  # so that directions differ in everything that is theirs
    return mixer


def one_direction(mixer, k):
    """The plain Mamba-2 mixer with the parameters of direction k, without its output projection."""
    plain = Mamba2Mixer(
        mixer.d_model,
        d_state=mixer.d_state,
        d_conv=mixer.d_conv,
        headdim=mixer.headdim,
        ngroups=mixer.ngroups,
        dt_limit=mixer.dt_limit,
        dtype=mixer.in_proj.weight.dtype,
    )
    plain.load_state_dict(
        {
            "in_proj.weight": mixer.in_proj.weight,
            "conv1d.weight": mixer.conv_weight[k][:, None],
            "conv1d.bias": mixer.conv_bias[k],
            "dt_bias": mixer.dt_bias[k],
            "A_log": mixer.A_log[k],
            "D": mixer.D[k],
            "norm.weight": mixer.norm.weight,
            "out_proj.weight": mixer.out_proj.weight,
        }
    )
    plain.out_proj = torch.nn.Identity()
    return plain


def with_copies(mixer, u, grid, merge="mean"):
    """What the mixer must compute: permute the tokens, mix them, permute back; add up; project."""
    total = 0
    for k, scan in enumerate(mixer.scans):
        order, inverse = mmkernels.scan_permutation(scan, *grid)
        total = total + one_direction(mixer, k)(u[:, order])[:, inverse]
    return mixer.out_proj(total / len(mixer.scans) if merge == "mean" else total)


@pytest.mark.parametrize("grid", [(3, 5), (1, 4), (9, 8)], ids=str)
@pytest.mark.parametrize(
    ("scans", "options"),
    [
        (("raster", "raster_rev"), {}),
        (CROSS, {"ngroups": 2, "merge": "sum"}),
        (("hilbert", "window:2", "diagonal_rev"), {"d_conv": 2, "dt_limit": (0.1, 0.9)}),
    ],
    ids=["bidirectional", "cross", "paths"],
)
def test_the_mixer_is_the_one_with_copies(scans, options, grid):
    mixer, u = small(scans, **options), torch.randn(2, grid[0] * grid[1], 24, dtype=torch.float64)
    torch.testing.assert_close(mixer(u, grid), with_copies(mixer, u, grid, options.get("merge", "mean")))


def test_bidirectional_is_flip_mix_flip():
    """Section 5.3's formula, with the flips written out."""
    mixer, u = small(), torch.randn(2, 15, 24, dtype=torch.float64)
    ahead = one_direction(mixer, 0)(u)
    back = one_direction(mixer, 1)(u.flip(1)).flip(1)
    torch.testing.assert_close(mixer(u, (3, 5)), (ahead + back) / 2 @ mixer.out_proj.weight.T)


def test_one_raster_scan_is_the_mamba2_mixer():
    mixer, u = small(("raster",)), torch.randn(2, 20, 24, dtype=torch.float64)
    torch.testing.assert_close(mixer(u, (4, 5)), one_direction(mixer, 0)(u) @ mixer.out_proj.weight.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_those_of_the_one_with_copies(dtype):
    grid, seed = (5, 7), torch.randn(2, 35, 24, dtype=torch.float64)

    def gradients(of, dtype):
        mixer = small(CROSS, dtype=torch.float64).to(dtype)
        u = seed.to(dtype).requires_grad_()
        wanted = {"u": u, **dict(mixer.named_parameters())}
        out = of(mixer, u)
        grads = torch.autograd.grad((out.float() ** 2).sum(), list(wanted.values()))
        return out, dict(zip(wanted, grads, strict=True))

    out, grads = gradients(lambda m, u: m(u, grid), dtype)
    truth_out, truth = gradients(lambda m, u: m(u, grid), torch.float64)
    peer_out, peer = gradients(
        lambda m, u: m(u, grid) if dtype == torch.float64 else with_copies_traceable(m, u, grid), dtype
    )
    # 6 roundings: the projections, the convolution, the scan, the norm and the square are each rounded to dtype.
    assert_within("out", out, truth_out, peer_out, dtype=dtype, terms=6)
    for name, grad in grads.items():
        assert_within(name, grad, truth[name], peer[name], dtype=dtype, terms=6)


def with_copies_traceable(mixer, u, grid):
    """The mixer from the torch backends of its parts."""
    with mmkernels.use_backend("torch"):
        return mixer(u, grid)


def test_gradcheck_in_float64():
    mixer = small(("raster_rev", "column"), d_state=3, headdim=12)
    u = torch.randn(1, 6, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda u, *_: mixer(u, (2, 3)), (u, *mixer.parameters()), fast_mode=True)


def test_parameters_and_first_values():
    mixer = MultiDirectionalMamba2(64, scans=CROSS, headdim=32, d_state=16)
    shapes = {name: tuple(p.shape) for name, p in mixer.named_parameters()}
    assert shapes == {
        "in_proj.weight": (128 + 160 + 4, 64),
        "conv_weight": (4, 160, 4),
        "conv_bias": (4, 160),
        "dt_bias": (4, 4),
        "A_log": (4, 4),
        "D": (4, 4),
        "norm.weight": (128,),
        "out_proj.weight": (64, 128),
    }
    step = F.softplus(mixer.dt_bias)
    assert (step >= 1e-4).all()
    assert (step <= 0.1001).all()
    assert (mixer.D == 1).all()
    assert (mixer.A_log.exp() >= 1).all()
    assert (mixer.A_log.exp() <= 16).all()
    # Directions start equal in step size and rate, and with filters of their own.
    assert torch.equal(mixer.A_log[0], mixer.A_log[3])
    assert torch.equal(mixer.dt_bias[0], mixer.dt_bias[2])
    assert not torch.equal(mixer.conv_weight[0], mixer.conv_weight[1])
    before = mixer.conv_weight.detach().clone()
    mixer.reset_parameters()
    assert not torch.equal(mixer.conv_weight, before)
    assert all(getattr(p, "_no_weight_decay", False) for p in (mixer.dt_bias, mixer.A_log, mixer.D))


def test_sizes_of_the_official_connector():
    """One block of the 2.7b model: 59.9 M parameters, and the whole as in the paper's checkpoint."""
    connector = Mamba2ScanConnector(2176, 2560, device="meta")
    block = sum(p.numel() for p in connector.layers[0].parameters())
    mixer = connector.layers[0].mixer
    assert mixer.in_proj.weight.shape == (10576, 2560)
    assert mixer.conv_weight.shape == (2, 5376, 4)
    assert mixer.out_proj.weight.numel() == 13_107_200
    assert abs(block - 59.9e6) < 0.1e6
    assert sum(p.numel() for p in connector.entry.parameters()) == 5_573_120
    assert sum(p.numel() for p in connector.projector.parameters()) == 58_997_760


def connector(variant, scan="bidirectional", **options):
    torch.manual_seed(0)
    return Mamba2ScanConnector(20, 24, variant=variant, scan=scan, d_state=8, headdim=8, dtype=torch.float64, **options)


def test_the_connector_is_its_formula():
    f = torch.randn(2, 12, 20, dtype=torch.float64)
    for variant in ("mlp", "msc_basic", "msc_advanced"):
        made = connector(variant, "cross")
        hidden = F.gelu(f @ made.entry.weight.T + made.entry.bias)
        for layer in made.layers:
            if variant == "msc_basic":
                hidden = hidden + layer.mixer(F.layer_norm(hidden, (24,), layer.norm.weight, layer.norm.bias), (3, 4))
                continue
            hidden = hidden + layer.mixer(hidden, (3, 4))
            inner = F.layer_norm(hidden, (24,), layer.norm.weight, layer.norm.bias)
            mlp = layer.mlp
            gate = F.silu(inner @ mlp.w1.weight.T + mlp.w1.bias)
            hidden = hidden + (gate * (inner @ mlp.w2.weight.T + mlp.w2.bias)) @ mlp.w3.weight.T + mlp.w3.bias
        if variant != "mlp":
            assert len(made.layers) == 2
            assert made.layers[0].mixer.scans == CROSS
            hidden = F.layer_norm(hidden, (24,), made.norm_f.weight, made.norm_f.bias)
        for i in (0, 2, 4):
            hidden = hidden @ made.projector[i].weight.T + made.projector[i].bias
            hidden = hidden if i == 4 else F.gelu(hidden)
        torch.testing.assert_close(made(f, None if variant == "mlp" else (3, 4)), hidden)


def test_the_connector_is_not_causal():
    """Every patch reaches every embedding, unlike with a single raster scan."""
    for scan, reach in (("bidirectional", 12), ("cross", 12), (("raster",), 7)):
        made = connector("msc_advanced", scan, num_layers=1)
        f = torch.randn(1, 12, 20, dtype=torch.float64, requires_grad=True)
        made(f, (3, 4))[0, 6].sum().backward()
        assert (f.grad[0].abs().sum(-1) > 0).sum() == reach


def test_state_dict_names():
    made = connector("msc_advanced")
    names = set(made.state_dict())
    assert {"entry.weight", "layers.1.mixer.conv_weight", "layers.0.norm.bias", "layers.0.mlp.w3.bias"} <= names
    assert {"norm_f.bias", "projector.0.weight", "projector.2.bias", "projector.4.weight"} <= names
    assert not any("mlp" in name for name in connector("msc_basic").state_dict())
    assert {name.split(".")[0] for name in connector("mlp").state_dict()} == {"entry", "projector"}


def test_bad_input():
    with pytest.raises(ConfigError, match=r"MultiDirectionalMamba2: scan must be one of.*Did you mean 'raster'"):
        MultiDirectionalMamba2(24, headdim=8, scans=("rastre",))
    with pytest.raises(ShapeError, match="headdim must divide"):
        MultiDirectionalMamba2(24, headdim=9)
    with pytest.raises(ConfigError, match="reduction must be 'mean' or 'sum'"):
        MultiDirectionalMamba2(24, headdim=8, merge="max")
    mixer = small()
    with pytest.raises(ShapeError, match=r"u must have shape .*d_model=24"):
        mixer(torch.randn(1, 6, 20), (2, 3))
    with pytest.raises(ShapeError, match="number of tokens, 6; got 2"):
        mixer(torch.randn(1, 6, 24, dtype=torch.float64), (2, 4))
    with pytest.raises(ConfigError, match="Did you mean 'msc_basic'"):
        Mamba2ScanConnector(20, 24, variant="msc_bas")
    with pytest.raises(ConfigError, match="scan must be 'bidirectional' or 'cross'"):
        connector("msc_basic", "crossed")
    with pytest.raises(ConfigError, match="num_layers must be at least 1"):
        connector("msc_basic", num_layers=0)
    with pytest.raises(ShapeError, match=r"grid must be \(height, width\)"):
        connector("msc_basic")(torch.randn(1, 6, 20, dtype=torch.float64))
    with pytest.raises(ShapeError, match="features must have shape"):
        connector("mlp")(torch.randn(1, 6, 24, dtype=torch.float64))
