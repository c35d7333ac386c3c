"""Official tensors, written by hand from their description, into the model and back: right places, strict names."""

import json

import pytest
import torch
from aki_tiny import ID, IMAGE, ids, pixels, tiny_config
from safetensors.torch import load_file, save_file

from mmkernels.cli import main
from mmkernels.errors import CheckpointError, ConfigError
from mmkernels.models.aki import AkiConfig, AkiForConditionalGeneration, convert_checkpoint, load_checkpoint
from mmkernels.models.aki.convert_aki import config_from_official, official_name, our_shapes

NORM = ("weight", "bias")


def official_shapes(
    vision, depth, latents, inner, mult, text, layers, tower_layers, patch, places, mlp, base_rows, extra
):
    """Every name and shape of a released file.  vision, text: widths; mlp: widths of both MLPs."""
    tower_mlp, text_mlp = mlp
    v, t, r = "vision_encoder", "lang_model.model", "vision_tokenizer"
    shapes = {
        f"{v}.embeddings.patch_embedding.weight": (vision, 3, patch, patch),
        f"{v}.embeddings.patch_embedding.bias": (vision,),
        f"{v}.embeddings.position_embedding.weight": (places, vision),
        f"{v}.head.probe": (1, 1, vision),
        f"{v}.head.attention.in_proj_weight": (3 * vision, vision),
        f"{v}.head.attention.in_proj_bias": (3 * vision,),
        f"{v}.head.attention.out_proj.weight": (vision, vision),
        f"{v}.head.attention.out_proj.bias": (vision,),
    }
    shapes |= {f"{v}.{norm}.{part}": (vision,) for norm in ("post_layernorm", "head.layernorm") for part in NORM}
    for where in [f"{v}.head", *(f"{v}.encoder.layers.{i}" for i in range(tower_layers))]:
        shapes |= {f"{where}.mlp.fc1.weight": (tower_mlp, vision), f"{where}.mlp.fc1.bias": (tower_mlp,)}
        shapes |= {f"{where}.mlp.fc2.weight": (vision, tower_mlp), f"{where}.mlp.fc2.bias": (vision,)}
    for i in range(tower_layers):
        where = f"{v}.encoder.layers.{i}"
        for part in ("q", "k", "v", "out"):
            shapes |= {f"{where}.self_attn.{part}_proj.weight": (vision, vision)}
            shapes |= {f"{where}.self_attn.{part}_proj.bias": (vision,)}
        shapes |= {f"{where}.layer_norm{n}.{part}": (vision,) for n in (1, 2) for part in NORM}
    shapes |= {f"{r}.latents": (latents, vision), f"{r}.projection.weight": (text, vision)}
    shapes |= {f"{r}.projection.bias": (text,)} | {f"{r}.norm.{part}": (vision,) for part in NORM}
    for i in range(depth):
        where = f"{r}.layers.{i}"
        for norm in ("0.norm_media", "0.norm_latents", "1.0"):
            shapes |= {f"{where}.{norm}.{part}": (vision,) for part in NORM}
        shapes |= {f"{where}.0.to_q.weight": (inner, vision), f"{where}.0.to_kv.weight": (2 * inner, vision)}
        shapes |= {f"{where}.0.to_out.weight": (vision, inner), f"{where}.1.1.weight": (mult * vision, vision)}
        shapes |= {f"{where}.1.3.weight": (vision, mult * vision)}
    shapes |= {
        f"{t}.embed_tokens.weight": (base_rows, text),
        f"{t}.embed_tokens.additional_embedding.weight": (extra, text),
        f"{t}.norm.weight": (text,),
        "lang_model.lm_head.weight": (base_rows, text),
        "lang_model.lm_head.bias": (base_rows,),
        "lang_model.lm_head.additional_fc.weight": (extra, text),
        "lang_model.lm_head.additional_fc.bias": (extra,),
    }
    for i in range(layers):
        where = f"{t}.layers.{i}"
        shapes |= {
            f"{where}.self_attn.qkv_proj.weight": (3 * text, text),
            f"{where}.self_attn.o_proj.weight": (text, text),
        }
        shapes |= {f"{where}.mlp.gate_up_proj.weight": (2 * text_mlp, text)}
        shapes |= {f"{where}.mlp.down_proj.weight": (text, text_mlp)}
        shapes |= {f"{where}.{norm}_layernorm.weight": (text,) for norm in ("input", "post_attention")}
    return shapes


TINY = {"vision": 16, "depth": 2, "latents": 3, "inner": 8, "mult": 4, "text": 24, "layers": 3, "tower_layers": 2}
TINY |= {"patch": 2, "places": 16, "mlp": (24, 40), "base_rows": tiny_config().text_config.vocab_size, "extra": 2}
FULL = {"vision": 1152, "depth": 6, "latents": 144, "inner": 512, "mult": 4, "text": 3072, "layers": 32}
FULL |= {"tower_layers": 27, "patch": 14, "places": 729, "mlp": (4304, 8192), "base_rows": 32064, "extra": 2}


def official_tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        for name, shape in official_shapes(**TINY).items()
    }


@pytest.fixture
def released(tmp_path):
    """A folder as the hub has it, at toy sizes."""
    folder = tmp_path / "released"
    folder.mkdir()
    save_file(official_tensors(), folder / "model.safetensors")
    return folder


def test_names_and_shapes_at_full_size():
    shapes = our_shapes(AkiConfig())
    assert {official_name(name): shape for name, shape in shapes.items()} == official_shapes(**FULL)


@torch.no_grad()
def test_values_arrive_where_they_belong(released, tmp_path):
    out = convert_checkpoint(released, tmp_path / "ours", config=tiny_config())
    model, theirs = AkiForConditionalGeneration.from_pretrained(out).eval(), official_tensors()
    tokens = torch.tensor([ids("<s> <image> what ? <|assistant|> a")])
    hidden = model(tokens, pixels(), output_hidden_states=True).hidden_states[-1]
    base = model.config.num_base_tokens
    # the head by hand: with its bias, cut at the base tokens, then the two extra columns with theirs
    big = hidden @ theirs["lang_model.lm_head.weight"].T + theirs["lang_model.lm_head.bias"]
    small = hidden @ theirs["lang_model.lm_head.additional_fc.weight"].T
    small = small + theirs["lang_model.lm_head.additional_fc.bias"]
    torch.testing.assert_close(model(tokens, pixels()).logits, torch.cat([big[..., :base], small], -1))
    embeds = model.embed(torch.tensor([[1, ID["<|endofchunk|>"]]]))[0]
    assert torch.equal(embeds[0], theirs["lang_model.model.embed_tokens.weight"][1])
    assert torch.equal(embeds[1], theirs["lang_model.model.embed_tokens.additional_embedding.weight"][1])
    layer = model.resampler.layers[1]
    assert torch.equal(layer.attention.to_kv.weight, theirs["vision_tokenizer.layers.1.0.to_kv.weight"])
    assert torch.equal(layer.mlp.norm.bias, theirs["vision_tokenizer.layers.1.1.0.bias"])
    assert torch.equal(layer.mlp.up.weight, theirs["vision_tokenizer.layers.1.1.1.weight"])
    assert torch.equal(layer.mlp.down.weight, theirs["vision_tokenizer.layers.1.1.3.weight"])
    assert torch.equal(model.vision_tower.head.probe, theirs["vision_encoder.head.probe"])


def test_there_and_back(released, tmp_path):
    ours = convert_checkpoint(released, tmp_path / "ours", config=tiny_config())
    back = convert_checkpoint(ours, tmp_path / "back", to="official")
    written, first = load_file(back / "model.safetensors"), official_tensors()
    assert written.keys() == first.keys()
    assert all(torch.equal(written[name], first[name]) for name in first)
    fields = json.loads((back / "config.json").read_text())
    assert (fields["initial_tokenizer_len"], fields["num_vision_tokens"]) == (IMAGE, 3)


def training_file(path, **changes):
    """As the official trainer saves it: wrapped, prefixed, without the vision encoder."""
    tensors = {f"module.{n}": v for n, v in official_tensors(1).items() if not n.startswith("vision_encoder.")}
    torch.save({"model_state_dict": {**tensors, **changes}, "epoch": 0}, path)
    return path


def test_training_files_need_a_tower(released, tmp_path):
    path = training_file(tmp_path / "step.pt")
    with pytest.raises(ConfigError, match="base"):
        load_checkpoint(path, config=tiny_config())
    siglip = {f"vision_model.{n[15:]}": v for n, v in official_tensors().items() if n.startswith("vision_encoder.")}
    siglip["text_model.unused"] = torch.zeros(1)
    save_file(siglip, tmp_path / "siglip.safetensors")
    ours = convert_checkpoint(released, tmp_path / "ours", config=tiny_config())
    for base in (released, tmp_path / "siglip.safetensors", ours):
        state, config = load_checkpoint(path, base=base, config=None if base == ours else tiny_config())
        assert config.num_base_tokens == tiny_config().num_base_tokens  # from the base, where it is one of ours
        tuned, plain = official_tensors(1), official_tensors()
        for name, value in state.items():
            theirs = official_name(name)
            assert torch.equal(value, (plain if theirs.startswith("vision_encoder.") else tuned)[theirs]), name


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop("lang_model.lm_head.bias"), "1 missing .*lm_head.bias"),
        (lambda t: t.update({"lang_model.lm_head.extra": torch.zeros(1)}), "1 unexpected .*lm_head.extra"),
        (lambda t: t.update({"vision_tokenizer.latents": torch.zeros(4, 16)}), "another shape .*latents"),
        (lambda t: t["lang_model.model.norm.weight"].fill_(torch.nan), "not finite .*norm.weight"),
        (lambda t: [t.pop(n) for n in list(t) if "additional_fc" in n], "2 missing .*additional_fc"),
        (lambda t: t.pop("vision_tokenizer.latents"), "must be an AKI checkpoint"),
    ],
)
def test_every_difference_is_named(change, named, tmp_path):
    tensors = official_tensors()
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=named):
        convert_checkpoint(tmp_path / "model.safetensors", tmp_path / "out", config=tiny_config())
    assert not (tmp_path / "out").exists()


def test_other_refusals(released, tmp_path):
    with pytest.raises(ConfigError, match="aki"):
        convert_checkpoint(released, tmp_path / "out", layout="akii")
    with pytest.raises(ConfigError, match="official"):
        convert_checkpoint(released, tmp_path / "out", to="offical")
    with pytest.raises(CheckpointError, match="another shape"):  # the released sizes are assumed, and do not fit
        convert_checkpoint(released, tmp_path / "out")
    with pytest.raises(CheckpointError, match="must not exist"):
        convert_checkpoint(released, released, config=tiny_config())
    with pytest.raises(ConfigError, match="Llama"):
        config_from_official({"lang_model_path": "Llama-3.2-3B"}, "config.json")
    config = config_from_official({"initial_tokenizer_len": 32012, "num_vision_tokens": 64, "pad_token_id": 32011}, "x")
    assert (config.num_vision_tokens, config.image_token_id, config.text_config.pad_token_id) == (64, 32012, 32011)


def test_the_command_line_converts_it(released, tmp_path, capsys):
    ours = convert_checkpoint(released, tmp_path / "ours", config=tiny_config())
    assert main(["convert", "--model", "aki", str(ours), str(tmp_path / "out"), "--to", "official"]) == 0
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == official_tensors().keys()
    assert main(["convert", "--model", "aki", str(ours), str(ours), str(tmp_path / "x")]) == 2
    assert "one source" in capsys.readouterr().err
    assert main(["convert", "--model", "aki", str(ours), str(tmp_path / "x"), "--to", "training"]) == 2
    assert "mmkernels" in capsys.readouterr().err


def test_training_files_run_no_code(tmp_path):
    class Harm:
        def __reduce__(self):
            return (print, ("ran",))

    torch.save({"model_state_dict": {"x": Harm()}}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="tensors and plain containers"):
        load_checkpoint(tmp_path / "x.pt")
