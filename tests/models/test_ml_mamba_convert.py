"""ML-Mamba's four-part file: its keys, both directions, damage named, parts put together, totals."""

import json

import pytest
import torch
from ml_mamba_tiny import clip, dinov2, pixels, siglip, tiny_config, tiny_model, tokens
from transformers import CLIPConfig, CLIPModel, CLIPVisionModel, Dinov2WithRegistersModel, SiglipVisionModel

from mmkernels.cli import main as cli
from mmkernels.errors import CheckpointError, ConfigError
from mmkernels.models.mamba2 import Mamba2LMConfig
from mmkernels.models.ml_mamba import (
    MLMambaConfig,
    MLMambaForConditionalGeneration,
    convert_checkpoint,
    from_parts,
    load_checkpoint,
)
from mmkernels.models.ml_mamba.convert_ml_mamba import FILE, our_shapes, to_official

D, INNER, HEADS, STATE, VISION = 32, 64, 8, 6, 40
IN_PROJ, CONV = 2 * INNER + 2 * STATE + HEADS, INNER + 2 * STATE


def block_shapes(suffixes):
    """A mixer of the official file; suffixes "" and "_b" are its directions."""
    shapes = {"in_proj.weight": (IN_PROJ, D), "norm.weight": (INNER,), "out_proj.weight": (D, INNER)}
    for s in suffixes:
        shapes |= {f"conv1d{s}.weight": (CONV, 1, 4), f"conv1d{s}.bias": (CONV,)}
        shapes |= {f"{name}{s}": (HEADS,) for name in ("dt_bias", "A_log", "D")}
    return shapes


def official_shapes():
    """Written down from the released layout, not from our converter."""
    llm = {"backbone.embedding.weight": (16, D), "backbone.norm_f.weight": (D,), "lm_head.weight": (16, D)}
    scan = {"norm_f.weight": (D,), "norm_f.bias": (D,)}
    for i in range(2):
        llm[f"backbone.layers.{i}.norm.weight"] = (D,)
        llm |= {f"backbone.layers.{i}.mixer.{name}": shape for name, shape in block_shapes([""]).items()}
        scan |= {f"layers.{i}.mixer.{name}": shape for name, shape in block_shapes(["", "_b"]).items()}
        scan |= {f"layers.{i}.norm.weight": (D,), f"layers.{i}.norm.bias": (D,)}
        for w in ("w1", "w2", "w3"):
            scan |= {f"layers.{i}.mlp.{w}.weight": (D, D), f"layers.{i}.mlp.{w}.bias": (D,)}
    rows = {0: (4 * D, D), 2: (D, 4 * D), 4: (D, D)}
    projector = {f"projector.{n}.weight": shape for n, shape in rows.items()}
    projector |= {f"projector.{n}.bias": shape[:1] for n, shape in rows.items()}
    mlp = {"0.weight": (D, VISION), "0.bias": (D,)}
    return {"llm_backbone": llm, "mlp": mlp, "bidirectional_mamba": scan, "projector": projector}


def released(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    parts = {
        part: {name: (0.3 * torch.randn(shape, generator=generator)).to(dtype) for name, shape in shapes.items()}
        for part, shapes in official_shapes().items()
    }
    parts["llm_backbone"]["lm_head.weight"] = parts["llm_backbone"]["backbone.embedding.weight"]
    return parts


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("towers")
    Dinov2WithRegistersModel(dinov2()).save_pretrained(folder / "dino")
    SiglipVisionModel(siglip(vision_use_head=True)).save_pretrained(folder / "siglip")
    return [folder / "dino", folder / "siglip"]


def write(folder, parts):
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"model": parts}, folder / FILE)
    return folder / FILE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_file_to_ours_and_back_to_the_bit(tmp_path, vision, dtype):
    parts = released(dtype)
    file = write(tmp_path / "official", parts)
    ours = convert_checkpoint(file, tmp_path / "ours", vision=vision)
    model = MLMambaForConditionalGeneration.from_pretrained(ours)
    assert (model.config.text_config.vocab_size, model.config.num_image_tokens) == (16, 9)
    back = convert_checkpoint(ours, tmp_path / "back", to="official")
    again = torch.load(back / FILE, weights_only=True)["model"]
    assert {part: set(own) for part, own in again.items()} == {
        part: set(own) for part, own in official_shapes().items()
    }
    for part, own in parts.items():
        for name, value in own.items():
            assert again[part][name].shape == official_shapes()[part][name]
            assert torch.equal(again[part][name], value.to(again[part][name].dtype)), (part, name)
    # and by a folder, once more
    assert load_checkpoint(back, vision=vision)[1].to_dict() == load_checkpoint(file, vision=vision)[1].to_dict()


def test_every_tensor_has_its_place(vision, tmp_path):
    parts = released()
    state, config = load_checkpoint(write(tmp_path, parts), vision=vision)
    model = MLMambaForConditionalGeneration(config)
    model.load_state_dict(state, strict=True)
    scan = parts["bidirectional_mamba"]
    mixer = model.connector.layers[1].mixer
    assert torch.equal(mixer.conv_weight[1], scan["layers.1.mixer.conv1d_b.weight"][:, 0])
    assert torch.equal(mixer.conv_bias[0], scan["layers.1.mixer.conv1d.bias"])
    assert torch.equal(mixer.A_log, torch.stack([scan["layers.1.mixer.A_log"], scan["layers.1.mixer.A_log_b"]]))
    assert torch.equal(model.connector.projector[4].bias, parts["projector"]["projector.4.bias"])
    assert torch.equal(model.connector.entry.weight, parts["mlp"]["0.weight"])
    dino = Dinov2WithRegistersModel.from_pretrained(vision[0]).state_dict()
    assert all(torch.equal(v, dino[n]) for n, v in model.vision_tower.towers[0].state_dict().items())


def test_a_loaded_connector_computes_the_released_formula(vision, tmp_path):
    """Flip, scan and flip back with the language model's mixer, as the released code does; two blocks."""
    from torch.nn import functional as F

    from mmkernels.layers import Mamba2Mixer

    parts = released()
    state, config = load_checkpoint(write(tmp_path, parts), vision=vision)
    model = MLMambaForConditionalGeneration(config).eval()
    model.load_state_dict(state)
    model.double()
    part = {name: value.double() for name, value in parts["bidirectional_mamba"].items()}
    features = torch.randn(2, 9, VISION, dtype=torch.float64)
    hidden = F.gelu(F.linear(features, parts["mlp"]["0.weight"].double(), parts["mlp"]["0.bias"].double()))
    for i in range(2):
        own = {n.removeprefix(f"layers.{i}."): v for n, v in part.items() if n.startswith(f"layers.{i}.")}
        halves = []
        for suffix in ("", "_b"):
            mixer = Mamba2Mixer(D, headdim=8, d_state=STATE, dtype=torch.float64)
            names = {n: n.replace("conv1d", f"conv1d{suffix}") for n in mixer.state_dict()}
            names |= {n: n + suffix for n in ("dt_bias", "A_log", "D")}
            mixer.load_state_dict({n: own[f"mixer.{theirs}"] for n, theirs in names.items()})
            halves.append(mixer(hidden.flip(1)).flip(1) if suffix else mixer(hidden))
        hidden = hidden + sum(halves) / 2  # out_proj is linear and has no bias: before or after it is one
        normed = F.layer_norm(hidden, (D,), own["norm.weight"], own["norm.bias"])
        w = [F.linear(normed, own[f"mlp.{n}.weight"], own[f"mlp.{n}.bias"]) for n in ("w1", "w2")]
        hidden = hidden + F.linear(F.silu(w[0]) * w[1], own["mlp.w3.weight"], own["mlp.w3.bias"])
    hidden = F.layer_norm(hidden, (D,), part["norm_f.weight"], part["norm_f.bias"])
    for n in (0, 2, 4):
        weight, bias = (parts["projector"][f"projector.{n}.{kind}"].double() for kind in ("weight", "bias"))
        hidden = F.linear(hidden if n == 0 else F.gelu(hidden), weight, bias)
    torch.testing.assert_close(model.connector(features, (3, 3)), hidden, rtol=1e-9, atol=1e-9)


def broken(change):
    parts = released()
    change(parts)
    return parts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p["mlp"].pop("0.bias"), r"1 missing \(mlp/0.bias\)"),
        (lambda p: p["bidirectional_mamba"].pop("layers.1.mixer.D_b"), r"1 missing .*layers.1.mixer.D_b"),
        (lambda p: p["projector"].update({"0.weight": torch.ones(1)}), r"1 unexpected \(projector/0.weight\)"),
        (lambda p: p["projector"].update({"projector.2.bias": torch.ones(3)}), "of another shape"),
        (lambda p: p["llm_backbone"]["backbone.norm_f.weight"].fill_(float("nan")), "1 not finite"),
        (lambda p: p["llm_backbone"].update({"lm_head.weight": torch.ones(16, D)}), "one table"),
        (lambda p: p.pop("mlp"), "with the parts llm_backbone, mlp"),
        (lambda p: p["llm_backbone"].pop("backbone.layers.0.mixer.dt_bias"), "four parts"),
        (lambda p: p["mlp"].update({"0.bias": 3}), "tensors only"),
    ],
)  # fmt: skip
def test_damage_is_named(tmp_path, vision, change, message):
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(write(tmp_path / "in", broken(change)), tmp_path / "out", vision=vision)
    assert not (tmp_path / "out").exists()


def test_cut_unsafe_and_foreign_files(tmp_path, vision):
    file = write(tmp_path, released())
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(CheckpointError, match=r"cut off"):
        load_checkpoint(file, vision=vision)
    torch.save({"model": print}, file)
    with pytest.raises(CheckpointError, match="would run code"):
        load_checkpoint(file, vision=vision)
    write(tmp_path, released())
    with pytest.raises(ConfigError, match="vision must name the pretrained towers"):
        load_checkpoint(file)
    with pytest.raises(ConfigError, match="40 channels together; got 24"):
        load_checkpoint(file, vision=vision[1:])
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_checkpoint(file, vision=[tmp_path])
    with pytest.raises(ConfigError, match="Did you mean 'official'"):
        convert_checkpoint(file, tmp_path / "x", to="offical")
    tiny_model(connector_variant="msc_basic").float().save_pretrained(tmp_path / "basic")
    with pytest.raises(ConfigError, match="No other was released"):
        convert_checkpoint(tmp_path / "basic", tmp_path / "x", to="official")


def test_a_tower_with_a_hole_is_refused(tmp_path, vision):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "dino"
    folder.mkdir()
    (folder / "config.json").write_text((vision[0] / "config.json").read_text())
    weights = load_file(vision[0] / "model.safetensors")
    lost = next(name for name in weights if "norm1" in name)
    save_file({n: v for n, v in weights.items() if n != lost}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="1 missing or misshapen"):
        load_checkpoint(write(tmp_path, released()), vision=[folder, vision[1]])


def test_parts_put_together(tmp_path, vision):
    """What the official training script leaves out: the language model's own weights."""
    lm = tmp_path / "lm"
    lm.mkdir()
    torch.save(released()["llm_backbone"], lm / "pytorch_model.bin")
    raw = {"d_model": D, "n_layer": 2, "vocab_size": 14, "ssm_cfg": {"layer": "Mamba2", "headdim": 8, "d_state": STATE}}
    (lm / "config.json").write_text(json.dumps({**raw, "pad_vocab_size_multiple": 16, "rms_norm": True}))
    torch.manual_seed(0)
    model = from_parts(lm, vision, connector_variant="msc_basic", connector_scan="cross")
    state = released()["llm_backbone"]
    for name, value in model.language_model.state_dict().items():
        assert torch.equal(value, state[name]), name
    dino = Dinov2WithRegistersModel.from_pretrained(vision[0]).state_dict()
    assert all(torch.equal(v, dino[n]) for n, v in model.vision_tower.towers[0].state_dict().items())
    assert (model.config.image_size, model.connector.scans[1]) == (14, "column")
    out = model.eval()(tokens(1, 3) % 14, pixel_values=pixels(dtype=torch.float32))
    assert out.logits.shape == (1, 3, 14)
    # the tower of a whole CLIP model
    torch.manual_seed(0)
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
    CLIPModel(CLIPConfig(text_config=text, vision_config=clip().to_dict())).save_pretrained(tmp_path / "clip")
    single = from_parts(lm, [tmp_path / "clip"])
    theirs = CLIPVisionModel.from_pretrained(tmp_path / "clip").state_dict()
    assert all(torch.equal(v, theirs[n]) for n, v in single.vision_tower.towers[0].state_dict().items())
    with pytest.raises(ConfigError, match="one or two towers"):
        from_parts(lm, [])


def test_the_command_line(tmp_path, vision, capsys):
    file = write(tmp_path / "in", released())
    given = ["convert", "--model", "ml-mamba", str(file), str(tmp_path / "out")]
    towers = [argument for folder in vision for argument in ("--vision", str(folder))]
    assert cli(given) == 2
    assert "vision must name" in capsys.readouterr().err
    assert cli([*given, *towers]) == 0
    assert (
        cli(["convert", "--model", "ml-mamba", str(tmp_path / "out"), str(tmp_path / "back"), "--to", "official"]) == 0
    )
    assert (tmp_path / "back" / FILE).is_file()
    assert cli(["convert", "--model", "aki", *towers, str(file), str(tmp_path / "no")]) == 2
    assert "--vision" in capsys.readouterr().err


# The table of spec sections 1.1 and 3.3, counted on the meta device.
PARTS = {"entry": 5_573_120, "projector": 58_997_760}


def test_parameter_totals_of_the_released_model():
    with torch.device("meta"):
        model = MLMambaForConditionalGeneration(MLMambaConfig.official("2.7b"))
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    assert count(model.language_model) == 2_702_599_680
    for name, total in PARTS.items():
        assert count(getattr(model.connector, name)) == total
    block = model.connector.layers[0]
    assert count(block.mixer.in_proj) == 10576 * 2560
    assert count(block.mixer.out_proj) == 13_107_200
    assert count(block.mlp) == 3 * (2560 * 2560 + 2560)
    assert block.mixer.conv_weight.numel() + block.mixer.conv_bias.numel() == 2 * 26_880
    assert (
        count(block) == 59_914_720
    )  # 27.07 + 13.11 + 19.67 million, two short convolutions, norms, 480 numbers of the scans
    assert count(model.connector.layers) + count(model.connector.norm_f) == 119_834_560
    towers = [count(tower) for tower in model.vision_tower.towers]
    assert round(towers[0] / 1e6) in (304, 305)
    assert model.connector.entry.weight.shape == (2560, 2176)


@pytest.mark.parametrize("size", ["130m", "370m", "780m", "1.3b"])
def test_the_other_sizes_have_their_language_models_total(size):
    totals = {"130m": 128_989_632, "370m": 368_346_624, "780m": 780_161_280, "1.3b": 1_343_757_312}
    config = MLMambaConfig.official(size)
    width = Mamba2LMConfig.official(size).hidden_size
    shapes = our_shapes(config)
    sizes = {n: torch.Size(s).numel() for n, s in shapes.items()}
    lm = sum(v for n, v in sizes.items() if n.startswith("language_model.") and "lm_head" not in n)
    assert lm == totals[size]
    assert sizes["connector.entry.weight"] == width * 2176


def test_official_names_cover_every_tensor_once():
    names = to_official({n: torch.zeros(s) for n, s in our_shapes(tiny_config({"vocab_size": 16})).items()})
    assert {p: {n: tuple(v.shape) for n, v in own.items()} for p, own in names.items()} == official_shapes()
