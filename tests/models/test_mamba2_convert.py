"""Converters of Mamba-2 checkpoints, on files with exactly the keys of state-spaces/mamba2-* and of transformers."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import Mamba2Config, Mamba2ForCausalLM

from mmkernels.errors import CheckpointError, ConfigError
from mmkernels.models.mamba2 import (
    Mamba2LMConfig,
    Mamba2LMForCausalLM,
    config_from_state_spaces,
    convert_checkpoint,
    load_checkpoint,
)

# config.json as released, apart from the sizes.
RELEASED = {
    "d_model": 16,
    "d_intermediate": 0,
    "n_layer": 2,
    "vocab_size": 37,
    "ssm_cfg": {"layer": "Mamba2", "headdim": 8, "d_state": 6},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 16,
    "tie_embeddings": True,
}
D, INNER, HEADS, CONV = 16, 32, 4, 32 + 12


def released_weights(dtype=torch.float32):
    """Keys and shapes of a released pytorch_model.bin: written down here, not taken from our model."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"backbone.embedding.weight": (48, D), "backbone.norm_f.weight": (D,)}
    for i in range(2):
        layer = f"backbone.layers.{i}"
        shapes |= {
            f"{layer}.norm.weight": (D,),
            f"{layer}.mixer.in_proj.weight": (INNER + CONV + HEADS, D),
            f"{layer}.mixer.conv1d.weight": (CONV, 1, 4),
            f"{layer}.mixer.conv1d.bias": (CONV,),
            f"{layer}.mixer.dt_bias": (HEADS,),
            f"{layer}.mixer.A_log": (HEADS,),
            f"{layer}.mixer.D": (HEADS,),
            f"{layer}.mixer.norm.weight": (INNER,),
            f"{layer}.mixer.out_proj.weight": (D, INNER),
        }
    made = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return {**made, "lm_head.weight": made["backbone.embedding.weight"]}


def write(folder, weights, config=RELEASED, kind="pytorch"):
    folder.mkdir(exist_ok=True)
    if kind == "pytorch":
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file({k: v.clone() for k, v in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", ["pytorch", "safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_released_files_load_strictly(tmp_path, kind, dtype):
    weights = released_weights(dtype)
    state, config = load_checkpoint(write(tmp_path / "ss", weights, kind=kind))
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (16, 2, 37)
    assert (config.head_dim, config.state_size, config.padded_vocab_size) == (8, 6, 48)
    model = Mamba2LMForCausalLM(config)
    model.load_state_dict(state, strict=True)
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name].to(value.dtype)), name
    wide = [state[f"backbone.layers.0.mixer.{n}"].dtype for n in ("dt_bias", "A_log", "D")]
    assert wide == [torch.float32] * 3
    assert state["lm_head.weight"].dtype == dtype


def test_convert_and_back(tmp_path):
    weights = released_weights(torch.bfloat16)
    source = write(tmp_path / "ss", weights)
    ours = convert_checkpoint(source, tmp_path / "ours")
    model = Mamba2LMForCausalLM.from_pretrained(ours)
    assert model.lm_head.weight is model.backbone.embedding.weight
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.backbone.layers[1].mixer.A_log.dtype == torch.float32
    back = convert_checkpoint(ours, tmp_path / "back", to="state-spaces")
    again = torch.load(back / "pytorch_model.bin", weights_only=True)
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], weights[name].to(again[name].dtype)) for name in weights)
    assert json.loads((back / "config.json").read_text()) == RELEASED
    assert load_checkpoint(back)[1].to_dict() == load_checkpoint(ours)[1].to_dict() | {
        "dtype": None,
        "architectures": None,
    }


def test_the_layout_of_transformers(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_heads": 4, "head_dim": 8, "state_size": 6, "n_groups": 2, "vocab_size": 37}
    twin = Mamba2ForCausalLM(Mamba2Config(**sizes, num_hidden_layers=2, chunk_size=4, tie_word_embeddings=False)).eval()
    twin.save_pretrained(tmp_path / "hf")
    state, config = load_checkpoint(tmp_path / "hf")
    model = Mamba2LMForCausalLM(config).eval()
    model.load_state_dict(state, strict=True)
    ids = torch.randint(0, 37, (2, 9))
    with torch.no_grad():
        # Float32, two layers of sums of up to 32: a few hundred roundings.
        torch.testing.assert_close(model(ids).logits, twin(ids).logits, rtol=1e-4, atol=1e-5)
    convert_checkpoint(tmp_path / "hf", tmp_path / "ours")
    assert not Mamba2LMConfig.from_pretrained(tmp_path / "ours").tie_word_embeddings


def broken(change):
    weights = released_weights()
    change(weights)
    return weights


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("backbone.layers.1.mixer.D"), r"1 missing \(backbone.layers.1.mixer.D\)"),
        (lambda w: w.update(extra=torch.ones(1)), r"1 unexpected \(extra\)"),
        (lambda w: w.update({"backbone.norm_f.weight": torch.ones(15)}), "of another shape"),
        (lambda w: w["backbone.layers.0.mixer.A_log"].fill_(float("nan")), r"1 not finite"),
        (lambda w: w.update({"lm_head.weight": torch.ones(48, D)}), "one table for embedding and head"),
    ],
)
def test_damage_is_named(tmp_path, change, message):
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(write(tmp_path / "ss", broken(change)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_cut_or_unsafe_file_is_refused(tmp_path):
    folder = write(tmp_path / "ss", released_weights())
    file = folder / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        load_checkpoint(folder)
    torch.save({"backbone.norm_f.weight": print}, file)
    with pytest.raises(CheckpointError, match=r"plain containers|map names to tensors"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ssm_cfg": {"layer": "Mamba1"}}, "Mamba-1 is another model"),
        ({"ssm_cfg": {}}, "Mamba-1 is another model"),
        ({"attn_layer_idx": [1]}, "attn_layer_idx must be"),
        ({"d_intermediate": 64}, "d_intermediate must be 0"),
        ({"rms_norm": False}, "rms_norm must be True"),
        ({"d_modle": 1}, "fields of a Mamba-2 model only; got d_modle"),
        ({"ssm_cfg": {"layer": "Mamba2", "dstate": 3}}, "ssm_cfg.dstate"),
    ],
)
def test_configurations_of_other_models(change, message):
    with pytest.raises(ConfigError, match=message):
        config_from_state_spaces({**RELEASED, **change})


def test_the_released_configuration():
    released = {**RELEASED, "d_model": 768, "n_layer": 24, "vocab_size": 50277, "ssm_cfg": {"layer": "Mamba2"}}
    assert config_from_state_spaces(released).to_dict() == Mamba2LMConfig.official("130m").to_dict()
    with pytest.raises(ConfigError, match="d_model, n_layer and vocab_size"):
        config_from_state_spaces({k: v for k, v in released.items() if k != "d_model"})


def test_options_and_destinations(tmp_path):
    source = write(tmp_path / "ss", released_weights())
    with pytest.raises(ConfigError, match="Did you mean 'state-spaces'"):
        convert_checkpoint(source, tmp_path / "out", to="state-space")
    with pytest.raises(ConfigError, match="Did you mean 'transformers'"):
        load_checkpoint(source, layout="transfomers")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").write_text("x")
    with pytest.raises(CheckpointError, match="destination must not exist yet"):
        convert_checkpoint(source, tmp_path / "out")
    convert_checkpoint(source, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "kept").exists()
    (source / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_checkpoint(source)
    assert load_checkpoint(source, config=load_checkpoint(tmp_path / "out")[1])[1].num_hidden_layers == 2
