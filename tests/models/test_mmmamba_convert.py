"""Official layouts, written here by hand from their description, into the model and back: same logits, strict names."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from mmkernels.errors import CheckpointError, ConfigError
from mmkernels.models.mmmamba import (
    MMMambaForConditionalGeneration,
    convert_checkpoint,
    layer_types_keeping,
    load_checkpoint,
)
from mmkernels.models.mmmamba.layouts_mmmamba import join_grouped, split_grouped

HIDDEN, HEADS, KV, DIM, MLP, VOCAB, EMBEDDING, DECODER = 32, 4, 2, 8, 48, 50, 1, 3
PREFIXES = [f"embedding_model.encoder.{i}" for i in range(EMBEDDING)] + [
    f"language_model.model.layers.{i}" for i in range(DECODER)
]
KEPT = {"hovle": (0, 1, 2, 3), "linear": (), "hybrid": (0, 3)}


def official_tensors(name: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Exactly the tensors of a released checkpoint, at toy sizes."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    vision = "embedding_model.vision_embeddings"
    tensors = {
        f"{vision}.class_embedding": draw(1, 1, HIDDEN),
        f"{vision}.position_embedding": draw(1, 17, HIDDEN),
        f"{vision}.patch_embedding.weight": draw(HIDDEN, 3, 2, 2),
        f"{vision}.patch_embedding.bias": draw(HIDDEN),
        "embedding_model.pixel_shuffle_proj.0.weight": draw(HIDDEN, 4 * HIDDEN),
        "embedding_model.pixel_shuffle_proj.0.bias": draw(HIDDEN),
        "embedding_model.pixel_shuffle_proj.2.weight": draw(HIDDEN, HIDDEN),
        "embedding_model.pixel_shuffle_proj.2.bias": draw(HIDDEN),
        "embedding_model.llm_text_embeddings.weight": draw(VOCAB, HIDDEN),
        "language_model.model.tok_embeddings.weight": draw(VOCAB, HIDDEN),
        "language_model.model.norm.weight": 1 + draw(HIDDEN),
        "language_model.output.weight": draw(VOCAB, HIDDEN),
    }
    q, kv = HEADS * DIM, KV * DIM
    for index, p in enumerate(PREFIXES):
        tensors |= {
            f"{p}.attention_norm.weight": 1 + draw(HIDDEN),
            f"{p}.ffn_norm.weight": 1 + draw(HIDDEN),
            f"{p}.feed_forward.w1.weight": draw(MLP, HIDDEN),
            f"{p}.feed_forward.w3.weight": draw(MLP, HIDDEN),
            f"{p}.feed_forward.w2.weight": draw(HIDDEN, MLP),
        }
        if index in KEPT[name]:
            tensors |= {
                f"{p}.attention.wqkv.weight": draw(q + 2 * kv, HIDDEN),
                f"{p}.attention.wo.weight": draw(HIDDEN, q),
            }
        else:
            tensors |= {
                f"{p}.attention.wvkqgdt.weight": draw(2 * kv + 2 * q + HEADS, HIDDEN),
                f"{p}.attention.o_proj.weight": draw(HIDDEN, q),
                f"{p}.attention.conv1d.weight": draw(q + 2 * kv, 1, 2),
                f"{p}.attention.conv1d.bias": draw(q + 2 * kv),
                f"{p}.attention.g_norm_swish_gate.weight": 1 + draw(DIM),
                f"{p}.attention.dt_bias": draw(HEADS),
                f"{p}.attention.A_log_bias": draw(HEADS),
            }
    return tensors


def official_config(name: str) -> dict:
    shared = {
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
    }
    embedding = {**shared, "num_hidden_layers": EMBEDDING, "patch_size": 2, "image_size": 8, "img_context_token_id": 49}
    language = {**shared, "num_hidden_layers": DECODER, "vocab_size": VOCAB}
    if name != "hovle":
        blocks = ["mha" if i in KEPT[name] else "mamba2" for i in range(4)]
        embedding["layers_block_type"], language["layers_block_type"] = blocks[:EMBEDDING], blocks[EMBEDDING:]
    return {
        "model_type": "mmMamba_chat",
        "embedding_config": embedding,
        "llm_config": language,
        "downsample_ratio": 0.5,
    }


def write(folder, tensors, config, kind="safetensors"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if kind == "safetensors":
        save_file(tensors, folder / "model.safetensors")
    elif kind == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        names = sorted(tensors)
        shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for file, part in shards.items():
            save_file({n: tensors[n] for n in part}, folder / file)
        index = {"weight_map": {n: file for file, part in shards.items() for n in part}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(params=sorted(KEPT))
def name(request):
    return request.param


@pytest.fixture
def official(tmp_path, name):
    return write(tmp_path / "official", official_tensors(name), official_config(name))


def logits(folder) -> torch.Tensor:
    model = AutoModelForImageTextToText.from_pretrained(folder).double().eval()
    ids = torch.tensor([[3, 49, 49, 49, 49, 5, 6, 7]])
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(3)).double()
    with torch.no_grad():
        return model(ids, pixels).logits


@pytest.mark.parametrize("kind", ["safetensors", "bin", "sharded"])
def test_official_to_ours_and_back(tmp_path, name, kind):
    tensors = official_tensors(name)
    source = write(tmp_path / "official", tensors, official_config(name), kind)
    convert_checkpoint(source, tmp_path / "ours", progress=False)
    convert_checkpoint(tmp_path / "ours", tmp_path / "back", to="official")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == tensors.keys()
    dead = {"embedding_model.vision_embeddings.class_embedding", "language_model.model.tok_embeddings.weight"}
    assert all(torch.equal(back[key], tensors[key]) for key in tensors.keys() - dead)
    assert all(back[key].shape == tensors[key].shape for key in dead)
    convert_checkpoint(tmp_path / "back", tmp_path / "again", progress=False)
    assert torch.equal(logits(tmp_path / "again"), logits(tmp_path / "ours"))


def test_configuration_and_layer_kinds(official, name, tmp_path):
    state, config = load_checkpoint(official)
    assert config.layer_types == layer_types_keeping(4, KEPT[name])
    assert config.rope_parameters["rope_type"] == ("dynamic" if name == "hovle" else "default")
    assert (config.image_token_id, config.image_size, config.patch_size, config.head_dim) == (49, 8, 2, 8)
    MMMambaForConditionalGeneration(config).load_state_dict(state)


def test_rows_of_the_fused_projections():
    """Per kv group g: q_2g | q_2g+1 | k_g | v_g; in a linear layer V | K | Q | G | dt.  Each row carries its number."""
    rows = torch.arange(64.0)[:, None].expand(64, HIDDEN).contiguous()
    tensors, p = official_tensors("hovle"), PREFIXES[1]
    q, k, v = split_grouped(rows, KV, HEADS // KV)
    for head in range(HEADS):
        start = 32 * (head // 2) + 8 * (head % 2)
        assert q[8 * head : 8 * head + 8, 0].tolist() == list(range(start, start + 8))
    for group in range(KV):
        assert k[8 * group : 8 * group + 8, 0].tolist() == list(range(32 * group + 16, 32 * group + 24))
        assert v[8 * group : 8 * group + 8, 0].tolist() == list(range(32 * group + 24, 32 * group + 32))
    assert torch.equal(join_grouped([q, k, v], KV, HEADS // KV), rows)
    assert tensors[f"{p}.attention.wqkv.weight"].shape == rows.shape


def test_parts_of_a_fused_linear_layer(tmp_path):
    tensors = official_tensors("linear")
    state, _ = load_checkpoint(write(tmp_path / "o", tensors, official_config("linear")))
    fused = tensors["language_model.model.layers.2.attention.wvkqgdt.weight"]
    mixer = "model.layers.2.mixer"
    parts = {"v_proj": (0, 16), "k_proj": (16, 32), "q_proj": (32, 64), "g_proj": (64, 96), "in_proj": (96, 100)}
    for part, (a, b) in parts.items():
        assert torch.equal(state[f"{mixer}.{part}.weight"], fused[a:b])
    assert torch.equal(
        state[f"{mixer}.g_norm.weight"], tensors["language_model.model.layers.2.attention.g_norm_swish_gate.weight"]
    )


def training_tensors(stage: int, layers, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "in_proj.weight": (HEADS, HIDDEN),
        "conv1d.weight": (64, 1, 2),
        "conv1d.bias": (64,),
        "g_proj.weight": (HIDDEN, HIDDEN),
        "g_norm.weight": (DIM,),
    }
    if stage < 3:
        shapes |= {"dt_bias": (HEADS,), "A_log_bias": (HEADS,)}
    if stage > 1:
        shapes |= {"q_proj.weight": (32, HIDDEN), "k_proj.weight": (16, HIDDEN), "v_proj.weight": (16, HIDDEN)}
    return {
        f"{PREFIXES[i]}.attention.{part}": torch.randn(shape, generator=generator)
        for i in layers
        for part, shape in shapes.items()
    }


@pytest.fixture
def teacher(tmp_path):
    return write(tmp_path / "hovle", official_tensors("hovle"), official_config("hovle"))


def save_training(path, tensors):
    torch.save({"model_state_dict": tensors, "step": 20000, "metric": 0.5}, path)
    return path


def test_training_files_onto_the_teacher(tmp_path, teacher):
    """A hybrid chosen at stage 3: stage 2 trained all layers, stage 3 the ones that stay linear, without dt and A."""
    two, three = training_tensors(2, range(4), 1), training_tensors(3, (1, 2), 2)
    files = [save_training(tmp_path / "two.pt", two), save_training(tmp_path / "three.pt", three)]
    convert_checkpoint(files, tmp_path / "student", base=teacher)
    state, config = load_checkpoint(tmp_path / "student")
    base, _ = load_checkpoint(teacher)
    assert config.layer_types == layer_types_keeping(4, (0, 3))
    mixer = "language_model.model.layers.0.attention"
    assert torch.equal(state["model.layers.0.mixer.q_proj.weight"], three[f"{mixer}.q_proj.weight"])
    assert torch.equal(state["model.layers.0.mixer.dt_bias"], two[f"{mixer}.dt_bias"])
    assert torch.equal(state["model.layers.0.mixer.o_proj.weight"], base["model.layers.0.mixer.o_proj.weight"])
    assert torch.equal(state["model.layers.2.mixer.q_proj.weight"], base["model.layers.2.mixer.q_proj.weight"])
    again = tmp_path / "stage3.pt"
    convert_checkpoint(tmp_path / "student", again, to="training", stage=3)
    written = torch.load(again, weights_only=True)["model_state_dict"]
    assert written.keys() == three.keys()
    assert all(torch.equal(written[key], three[key]) for key in three)


def test_a_stage_3_file_alone_lacks_steps_and_decays(tmp_path, teacher):
    file = save_training(tmp_path / "three.pt", training_tensors(3, range(4), 2))
    with pytest.raises(CheckpointError, match=r"A_log_bias.*dt_bias.*stage-2 file"):
        load_checkpoint(file, base=teacher)
    with pytest.raises(ConfigError, match="base"):
        load_checkpoint(file)


def test_a_linear_base_cannot_lend_attention(tmp_path, teacher):
    every = save_training(tmp_path / "two.pt", training_tensors(2, range(4), 1))
    convert_checkpoint(every, tmp_path / "linear", base=teacher)
    some = save_training(tmp_path / "three.pt", training_tensors(3, (1, 2), 2))
    with pytest.raises(CheckpointError, match=r"linear layers at \[0, 3\]"):
        load_checkpoint(some, base=tmp_path / "linear")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop("language_model.output.weight"), r"1 missing \(language_model.output.weight\)"),
        (lambda t: t.update(extra=torch.zeros(1)), r"1 unexpected \(extra\)"),
        (
            lambda t: t.update({"language_model.model.norm.weight": torch.zeros(7)}),
            r"language_model.model.norm.weight \(7,\) instead of \(32,\)",
        ),
        (
            lambda t: t["language_model.model.norm.weight"].fill_(float("nan")),
            r"not finite \(language_model.model.norm",
        ),
        (
            lambda t: t.update({"language_model.model.norm.weight": torch.zeros(32, dtype=torch.int8)}),
            "not floating point",
        ),
        (
            lambda t: t.update({"embedding_model.special_text_embeddings.weight": torch.zeros(1)}),
            "special token tables",
        ),
    ],
)
def test_faulty_tensors_are_named(tmp_path, change, named):
    tensors = official_tensors("hybrid")
    change(tensors)
    source = write(tmp_path / "o", tensors, official_config("hybrid"))
    with pytest.raises(CheckpointError, match=named):
        convert_checkpoint(source, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_truncated_files(tmp_path, kind):
    source = write(tmp_path / "o", official_tensors("linear"), official_config("linear"), kind)
    file = next(f for f in source.iterdir() if f.suffix != ".json")
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="download it again"):
        convert_checkpoint(source, tmp_path / "ours")


def test_shards_and_index_must_agree(tmp_path):
    source = write(tmp_path / "o", official_tensors("linear"), official_config("linear"), "sharded")
    index = source / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["ghost"] = "a.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="ghost"):
        load_checkpoint(source)
    (source / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"missing: b\.safetensors"):
        load_checkpoint(source)


class Payload:
    def __reduce__(self):
        return (print, ("ran",))


def test_pickles_with_code_are_not_run(tmp_path, capsys):
    torch.save({"model_state_dict": {"a": Payload()}}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="run code"):
        load_checkpoint(tmp_path / "x.pt", layout="training")
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("section", "field", "value", "error", "named"),
    [
        ("embedding_config", "use_ls", True, ConfigError, "use_ls"),
        ("embedding_config", "pixel_shuffle_loc", "post", ConfigError, "pixel_shuffle_loc"),
        ("llm_config", "bias", True, ConfigError, "bias"),
        ("llm_config", "hidden_size", 64, CheckpointError, "hidden_size"),
        ("llm_config", "layers_block_type", ["mha"] * 3, CheckpointError, "layers_block_type"),
        ("llm_config", "vocab_size", None, CheckpointError, "vocab_size"),
    ],
)
def test_configurations_that_cannot_be_right(tmp_path, section, field, value, error, named):
    config = official_config("hybrid")
    config[section][field] = value
    if value is None:
        del config[section][field]
    source = write(tmp_path / "o", official_tensors("hybrid"), config)
    with pytest.raises(error, match=named):
        load_checkpoint(source)


def test_options_the_official_layout_has_no_room_for(tmp_path, tiny_model):
    tiny_model("hybrid", torch.float32, mixer_use_d=True).save_pretrained(tmp_path / "d")
    with pytest.raises(ConfigError, match=r"mixer\.D"):
        convert_checkpoint(tmp_path / "d", tmp_path / "o", to="official")
    tiny_model("hybrid", torch.float32, mixer_norm_eps=1e-6).save_pretrained(tmp_path / "eps")
    with pytest.raises(ConfigError, match="mixer_norm_eps"):
        convert_checkpoint(tmp_path / "eps", tmp_path / "o", to="official")
    assert not (tmp_path / "o").exists()


def test_tied_tables_are_written_twice(tmp_path, tiny_model):
    model = tiny_model("hybrid", torch.float32, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "tied")
    convert_checkpoint(tmp_path / "tied", tmp_path / "o", to="official")
    convert_checkpoint(tmp_path / "o", tmp_path / "ours", progress=False)
    assert torch.equal(logits(tmp_path / "ours"), logits(tmp_path / "tied"))


def test_bfloat16_files_keep_decays_in_float32(tmp_path):
    tensors = {key: value.bfloat16() for key, value in official_tensors("linear").items()}
    convert_checkpoint(write(tmp_path / "o", tensors, official_config("linear")), tmp_path / "ours", progress=False)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "ours")
    mixer = model.decoder_layers()[0].mixer
    assert mixer.q_proj.weight.dtype == torch.bfloat16
    assert mixer.A_log_bias.dtype == torch.float32


def test_refusals(tmp_path, official, name):
    with pytest.raises(ConfigError, match="Did you mean 'hovle'"):
        convert_checkpoint(official, tmp_path / "x", layout="hovel")
    with pytest.raises(CheckpointError, match="must be a weight file or a folder"):
        load_checkpoint(tmp_path / "nowhere")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="overwrite"):
        convert_checkpoint(official, tmp_path / "full")
    assert (tmp_path / "full" / "file").read_text() == "mine"
    convert_checkpoint(official, tmp_path / "full", overwrite=True, progress=False)
    (official / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_checkpoint(official)
    save_file({"what": torch.zeros(1)}, tmp_path / "odd.safetensors")
    with pytest.raises(CheckpointError, match="what"):
        load_checkpoint(tmp_path / "odd.safetensors")
