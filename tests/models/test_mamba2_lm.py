"""The Mamba-2 language model: official sizes, equality with transformers, caches, padding, generate, decoding."""

import itertools

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, Mamba2Config, Mamba2ForCausalLM

import mmkernels
from mmkernels.errors import ConfigError, ShapeError
from mmkernels.layers.mamba2_stack import StackStep
from mmkernels.models.mamba2 import Mamba2LMConfig, Mamba2LMForCausalLM
from mmkernels.testing import assert_within

# float64: paths differ in the order of sums, and three layers amplify (as in test_mmmamba_cache.py).
TOLERANCE = 1e4 * torch.finfo(torch.float64).eps
SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "head_dim": 8, "state_size": 6}
SMALL = {**SIZES, "bos_token_id": None, "eos_token_id": None}


def build(dtype=torch.float64, **overrides):
    torch.manual_seed(0)
    model = Mamba2LMForCausalLM(Mamba2LMConfig(**{**SMALL, **overrides})).to(dtype).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # nothing that hides a term: no weight of exactly 1, tables that spread the logits
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
            parameter.add_(noise if parameter.ndim == 2 and parameter.shape[1] == 32 else 0.2 * noise, alpha=0.3)
    return model


def tokens(batch, seqlen, seed=0):
    return torch.randint(0, 50, (batch, seqlen), generator=torch.Generator().manual_seed(seed))


def close(a, b):
    return torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize(
    ("size", "total"),
    [
        ("130m", 128_989_632),  # as the official benchmark prints it; the rest by the same table of shapes
        ("370m", 368_346_624),
        ("780m", 780_161_280),
        ("1.3b", 1_343_757_312),
        ("2.7b", 2_702_599_680),
    ],
)
def test_parameter_totals_of_the_official_sizes(size, total):
    config = Mamba2LMConfig.official(size)
    with torch.device("meta"):
        model = Mamba2LMForCausalLM(config)
    d, inner, heads = config.hidden_size, 2 * config.hidden_size, config.num_heads
    conv = inner + 256
    layer = (inner + conv + heads) * d + 5 * conv + 3 * heads + inner + inner * d + d
    assert config.num_hidden_layers * layer + 50288 * d + d == total
    assert sum(p.numel() for p in model.parameters()) == total
    assert model.lm_head.weight.shape == (50288, d)


def test_unknown_size_and_bad_sizes():
    with pytest.raises(ConfigError, match=r"Did you mean '2\.7b'"):
        Mamba2LMConfig.official("2.8b")
    for change, named in (
        ({"head_dim": 7}, "head_dim"),
        ({"n_groups": 3}, "n_groups"),
        ({"pad_vocab_size_multiple": 0}, "pad_vocab_size_multiple"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types"),
    ):
        with pytest.raises(ConfigError, match=named):
            Mamba2LMConfig(**{**SMALL, **change})


def transformers_twin(model):
    """transformers' model with the same weights."""
    config = model.config
    twin = Mamba2ForCausalLM(
        Mamba2Config(
            vocab_size=config.padded_vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_heads=config.num_heads,
            head_dim=config.head_dim,
            state_size=config.state_size,
            n_groups=config.n_groups,
            chunk_size=4,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    )
    state = {k.replace("embedding.", "embeddings."): v for k, v in model.state_dict().items()}
    twin.load_state_dict(state)
    return twin.to(model.lm_head.weight.dtype).eval()


@pytest.mark.parametrize("n_groups", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_equal_transformers(dtype, n_groups):
    """As close to float64 as transformers is: at most twice its error, plus the rounding of the logits."""
    exact = build(n_groups=n_groups)
    for parameter in exact.parameters():
        parameter.copy_(parameter.to(dtype))  # what both hold exactly
    model = build(torch.float32, n_groups=n_groups)
    model.load_state_dict(exact.state_dict())
    model = model.to(dtype)
    twin, ids = transformers_twin(model), tokens(2, 13)
    truth = exact(ids).logits
    theirs = twin(ids).logits[..., :50]
    assert truth.std() > 0.1
    assert_within("logits", model(ids).logits, truth, theirs, dtype=dtype)
    # And token by token, against their own steps.
    ours, peer = DynamicCache(config=model.config), None
    model(ids[:, :5], past_key_values=ours)
    peer = twin(ids[:, :5], use_cache=True).cache_params
    for t in range(5, 13):
        step = model(ids[:, t : t + 1], past_key_values=ours).logits
        their_step = twin(ids[:, t : t + 1], cache_params=peer, use_cache=True).logits[..., :50]
        assert_within(f"logits at {t}", step, truth[:, t : t + 1], their_step, dtype=dtype)


@pytest.mark.parametrize("cuts", [(0, 11), (0, 5, 6, 7, 8, 9, 10, 11), (0, 1, 2, 11), (0, 4, 8, 11)])
def test_any_split_of_the_sequence_gives_the_logits_of_the_whole(cuts):
    model, ids = build(), tokens(2, 11)
    whole = model(ids, use_cache=False)
    assert whole.past_key_values is None
    cache = DynamicCache(config=model.config)
    parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in itertools.pairwise(cuts)]
    assert close(torch.cat(parts, 1), whole.logits)
    assert cache.get_seq_length() == 11


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_at_real_tokens(side):
    model, ids, other = build(), tokens(1, 9), tokens(1, 12, seed=1)
    padding, zeros, ones = torch.full((1, 3), 7), torch.zeros(1, 3), torch.ones(1, 9)
    row = torch.cat([padding, ids] if side == "left" else [ids, padding], 1)
    mask = torch.cat([torch.ones(1, 12), torch.cat([zeros, ones] if side == "left" else [ones, zeros], 1)]).long()
    logits = model(torch.cat([other, row]), attention_mask=mask).logits
    assert close(logits[1:, 3:] if side == "left" else logits[1:, :9], model(ids).logits)
    assert close(logits[:1], model(other).logits)


def test_left_padding_fed_token_by_token():
    model, ids = build(), tokens(1, 6)
    batch = torch.cat([tokens(1, 8, seed=1), torch.cat([torch.full((1, 2), 7), ids], 1)])
    mask = torch.tensor([[1] * 8, [0, 0] + [1] * 6])
    cache = DynamicCache(config=model.config)
    steps = [
        model(batch[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache).logits for t in range(8)
    ]
    assert close(torch.cat(steps, 1)[1:, 2:], model(ids).logits)


def test_generate_equals_repeated_forward_and_batches_with_padding():
    model, ids = build(), tokens(1, 6)
    row = ids
    for _ in range(7):
        row = torch.cat([row, model(row, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(ids, max_new_tokens=7, do_sample=False), row)
    assert torch.equal(model.generate(ids, max_new_tokens=7, do_sample=False, use_cache=False), row)
    batch = torch.cat([torch.cat([torch.full((1, 3), 1), ids], 1), tokens(1, 9, seed=2)])
    mask = torch.tensor([[0] * 3 + [1] * 6, [1] * 9])
    both = model.generate(batch, attention_mask=mask, max_new_tokens=7, do_sample=False)
    assert torch.equal(both[:1, 9:], row[:, 6:])
    beams = model.generate(ids, max_new_tokens=5, num_beams=3, do_sample=False)
    assert beams.shape == (1, 11)


def test_decoding_is_one_step_per_block_and_prefill_is_the_scan(monkeypatch):
    from mmkernels.layers import mamba2 as layer

    calls = []
    step = layer.mamba2_step
    monkeypatch.setattr(layer, "mamba2_step", lambda *a, **k: calls.append("step") or step(*a, **k))
    monkeypatch.setattr(StackStep, "__call__", lambda *a: None)  # all blocks in one call: test_mamba2_stack.py
    model, ids = build(torch.float32), tokens(1, 4)
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    assert calls == []
    model(ids[:, :1], past_key_values=cache)
    assert calls == ["step"] * 3
    with torch.enable_grad():
        model(ids[:, :1], past_key_values=cache)
    assert calls == ["step"] * 3


def test_placed_weights_give_the_same_bits():
    from mmkernels.layers import place_for_decode

    model, ids = build(torch.bfloat16), tokens(2, 7)
    before = model.generate(ids, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True)
    report = place_for_decode(model)
    assert report.left == ()
    assert model.lm_head.weight is model.backbone.embedding.weight
    after = model.generate(ids, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True)
    assert all(torch.equal(a, b) for a, b in zip(before.logits, after.logits, strict=True))


def test_save_and_load(tmp_path):
    model, ids = build(torch.float32), tokens(1, 5)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is Mamba2LMForCausalLM
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="bfloat16")
    kinds = {name.rsplit(".", 1)[-1]: p.dtype for name, p in half.named_parameters()}
    assert [kinds[n] for n in ("dt_bias", "A_log", "D")] == [torch.float32] * 3
    assert half.lm_head.weight.dtype == torch.bfloat16
    read = AutoConfig.from_pretrained(tmp_path).to_dict()
    assert {k: v for k, v in read.items() if k != "_name_or_path"} == {
        k: v for k, v in model.config.to_dict().items() if k != "_name_or_path"
    }


def test_initial_values():
    torch.manual_seed(0)
    config = Mamba2LMConfig(**{**SMALL, "hidden_size": 64, "num_hidden_layers": 4})
    model = Mamba2LMForCausalLM(config)
    for block in model.backbone.layers:
        bound = 1 / 128**0.5 / 4**0.5  # kaiming-uniform over 128 inputs, divided by the root of the blocks
        assert block.mixer.out_proj.weight.abs().max() <= bound
        assert block.mixer.out_proj.weight.abs().max() > 0.95 * bound
        assert torch.equal(block.mixer.D, torch.ones_like(block.mixer.D))
        rates = block.mixer.A_log.exp()
        assert rates.min() >= 1 - 1e-5
        assert rates.max() <= 16 + 1e-4
    assert abs(model.backbone.embedding.weight.std() - 0.02) < 0.002


def test_training_reduces_the_loss():
    with torch.enable_grad():
        model, ids = build(torch.float32).train(), tokens(4, 12)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(12):
            loss = model(ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert all(p.grad is not None for p in model.parameters())
    assert losses[-1] < 0.7 * losses[0]


def test_refusals():
    model, ids = build(), tokens(1, 4)
    with pytest.raises(ConfigError, match="output_attentions"):
        model(ids, output_attentions=True)
    with pytest.raises(ConfigError, match="one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ShapeError, match="attention_mask must have shape"):
        model(ids, attention_mask=torch.ones(1, 3).long())
    with pytest.raises(ConfigError, match="past_key_values"):
        model(ids, past_key_values=DynamicCache())
    assert mmkernels.explain("decode_linear", torch.ones(1, 4), torch.ones(2, 4)).chosen is not None
