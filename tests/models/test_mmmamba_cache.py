"""One sequence, any way of feeding it: whole, token by token, in chunks, padded, packed, through generate and beams."""

import copy
import itertools

import pytest
import torch
from transformers import DynamicCache

from mmkernels.errors import ConfigError, ShapeError

# float64 throughout.  Paths differ in the order of sums; the scan's decays are exponentials of differences of sums that
# reach some tens, and four layers amplify: 1e4 roundings, still 1e-4 of what float32 would lose.
TOLERANCE = 1e4 * torch.finfo(torch.float64).eps


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE)


def tokens(batch: int, seqlen: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 48, (batch, seqlen), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("cuts", [(0, 11), (0, 5, 6, 7, 8, 9, 10, 11), (0, 1, 2, 11), (0, 4, 8, 11)])
def test_any_split_of_the_sequence_gives_the_logits_of_the_whole(tiny_model, kind, cuts):
    model, ids = tiny_model(kind), tokens(2, 11)
    whole = model(ids, use_cache=False)
    assert whole.past_key_values is None
    assert whole.logits.std() > 0.1  # else equality means nothing
    cache = DynamicCache(config=model.config)
    parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in itertools.pairwise(cuts)]
    assert close(torch.cat(parts, 1), whole.logits)
    assert cache.get_seq_length() == 11


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_left_padding_changes_nothing_at_real_tokens(tiny_model, kind, implementation):
    model, ids = tiny_model(kind), tokens(1, 9)
    model.set_attn_implementation(implementation)
    alone = model(ids).logits
    long = tokens(1, 12, seed=1)
    batch = torch.cat([long, torch.cat([torch.full((1, 3), 0), ids], 1)])
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :3] = 0
    logits = model(batch, attention_mask=mask).logits
    assert torch.isfinite(logits).all()
    assert close(logits[1:, 3:], alone)
    assert close(logits[:1], model(long).logits)


def test_left_padding_fed_token_by_token(tiny_model, kind):
    """The first column is padding for one row: taking single tokens for unpadded would pollute its state."""
    model, ids = tiny_model(kind), tokens(1, 6)
    batch = torch.cat([tokens(1, 8, seed=1), torch.cat([torch.full((1, 2), 7), ids], 1)])
    mask = torch.tensor([[1] * 8, [0, 0] + [1] * 6])
    cache = DynamicCache(config=model.config)
    steps = [
        model(batch[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache).logits for t in range(8)
    ]
    assert close(torch.cat(steps, 1)[1:, 2:], model(ids).logits)


def test_right_padding_changes_nothing_at_real_tokens(tiny_model, kind):
    model, ids = tiny_model(kind), tokens(1, 7)
    padded = torch.cat([ids, torch.full((1, 3), 5)], 1)
    logits = model(padded, attention_mask=torch.tensor([[1] * 7 + [0] * 3])).logits
    assert close(logits[:, :7], model(ids).logits)


def test_packed_positions_keep_sequences_apart(tiny_model, kind):
    model, one, two = tiny_model(kind), tokens(1, 5), tokens(1, 6, seed=1)
    positions = torch.cat([torch.arange(5), torch.arange(6)])[None]
    packed = model(torch.cat([one, two], 1), position_ids=positions, use_cache=False).logits
    assert close(packed, torch.cat([model(one).logits, model(two).logits], 1))


def test_generate_with_cache_equals_without(tiny_model, kind):
    model = tiny_model(kind)
    batch = torch.cat([tokens(1, 10), torch.cat([torch.zeros(1, 4, dtype=torch.long), tokens(1, 6, seed=1)], 1)])
    mask = (batch != 0).long()
    run = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    cached = model.generate(batch, **run)
    assert cached.shape == (2, 16)
    assert torch.equal(cached, model.generate(batch, use_cache=False, **run))
    assert torch.equal(cached[1:, 4:], model.generate(batch[1:, 4:], max_new_tokens=6, do_sample=False))
    assert torch.equal(cached, model.generate(batch, prefill_chunk_size=3, **run))


def test_generate_from_embeddings(tiny_model, kind):
    model, ids = tiny_model(kind), tokens(2, 7)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    run = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embeds, **run), model.generate(ids, **run)[:, 7:])


def test_beams_reorder_every_kind_of_state(tiny_model, kind, monkeypatch):
    model, ids, moved = tiny_model(kind), tokens(2, 7), []
    reorder = DynamicCache.reorder_cache

    def spy(cache, beam_idx):
        moved.append(not torch.equal(beam_idx, torch.arange(len(beam_idx))))
        reorder(cache, beam_idx)

    monkeypatch.setattr(DynamicCache, "reorder_cache", spy)
    run = {"max_new_tokens": 8, "num_beams": 4, "num_return_sequences": 4, "do_sample": False}
    cached = model.generate(ids, **run)
    assert any(moved)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **run))


def test_a_conversation_continues_from_its_cache(tiny_model, kind):
    model, ids = tiny_model(kind), tokens(2, 5)
    cache = DynamicCache(config=model.config)
    turn = model.generate(ids, max_new_tokens=3, do_sample=False, past_key_values=cache)
    longer = torch.cat([turn, tokens(2, 4, seed=2)], 1)
    fork = copy.deepcopy(cache)
    run = {"max_new_tokens": 4, "do_sample": False}
    fresh = model.generate(longer, **run)
    assert torch.equal(model.generate(longer, past_key_values=cache, **run), fresh)
    assert torch.equal(model.generate(longer, past_key_values=fork, **run), fresh)


def test_a_reset_cache_starts_afresh(tiny_model, kind):
    model, ids = tiny_model(kind), tokens(2, 5)
    cache = DynamicCache(config=model.config)
    first = model(ids, past_key_values=cache).logits
    cache.reset()
    assert close(model(ids, past_key_values=cache).logits, first)
    assert cache.get_seq_length() == 5


def test_sampling_several_sequences_per_prompt(tiny_model, kind):
    model, ids = tiny_model(kind), tokens(1, 5)
    torch.manual_seed(0)
    drawn = model.generate(ids, max_new_tokens=5, do_sample=True, num_return_sequences=3)
    assert drawn.shape == (3, 10)
    torch.manual_seed(0)
    again = model.generate(ids, max_new_tokens=5, do_sample=True, num_return_sequences=3, use_cache=False)
    assert torch.equal(drawn, again)


def test_states_stay_float32_in_a_bfloat16_model(tiny_model):
    model, ids = tiny_model("linear", dtype=torch.bfloat16), tokens(2, 5)
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    model(ids[:, :1], past_key_values=cache)
    for index in range(4):
        assert cache.get_recurrent_state(index).dtype == torch.float32
        assert cache.get_recurrent_state(index).shape == (2, 4, 8, 8)
        assert cache.get_conv_state(index).dtype == torch.bfloat16
        assert cache.get_conv_state(index).shape == (2, 64, 1)


def test_decoding_with_gradients_leaves_earlier_states_usable(tiny_model):
    model, ids = tiny_model("hybrid"), tokens(1, 6)
    with torch.enable_grad():
        cache = DynamicCache(config=model.config)
        parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 4), (4, 5), (5, 6))]
    assert close(torch.cat(parts, 1), model(ids).logits)


@pytest.mark.parametrize(("kernel", "d", "qk", "gate"), [(1, True, False, False), (4, False, True, True)])
def test_mixer_options_decode_like_they_prefill(tiny_model, kernel, d, qk, gate):
    options = {"mixer_use_d": d, "mixer_use_qk_norm": qk, "mixer_use_gate": gate, "mixer_conv_bias": gate}
    model, ids = tiny_model("hybrid", mixer_conv_kernel=kernel, **options), tokens(2, 6)
    cache = DynamicCache(config=model.config)
    steps = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(6)]
    assert close(torch.cat(steps, 1), model(ids).logits)


def test_logits_to_keep(tiny_model, kind):
    model, ids = tiny_model(kind), tokens(2, 6)
    logits = model(ids).logits
    assert close(model(ids, logits_to_keep=2).logits, logits[:, -2:])
    assert close(model(ids, logits_to_keep=torch.tensor([0, 3])).logits, logits[:, [0, 3]])


def test_dynamic_rope_forgets_long_inputs(tiny_model):
    rope = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}
    model, short, long = (
        tiny_model("teacher", rope_parameters=rope, max_position_embeddings=8),
        tokens(1, 8),
        tokens(1, 30),
    )
    plain = tiny_model("teacher", rope_parameters={"rope_type": "default", "rope_theta": 100.0})
    before = model(short).logits
    stretched = model(long).logits
    assert torch.equal(model(short).logits, before)
    assert close(before, plain(short).logits)  # within max_position_embeddings nothing is scaled
    assert not torch.allclose(stretched, plain(long).logits, atol=1e-3)


def test_dynamic_rope_turns_cached_keys_by_the_current_theta(tiny_model):
    """With one layer, keys depend on nothing but their token: any split must give the last row of the full pass."""
    rope = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}
    sizes = {"num_embedding_layers": 0, "num_hidden_layers": 1, "layer_types": ["full_attention"]}
    model = tiny_model("teacher", rope_parameters=rope, max_position_embeddings=8, **sizes)
    ids = tokens(2, 20)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, :5] = 0
    cache = DynamicCache(config=model.config)
    for a, b in ((0, 6), (6, 12), (12, 19), (19, 20)):
        last = model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache).logits[:, -1]
    assert close(last, model(ids, attention_mask=mask).logits[:, -1])
    assert close(last[1:], model(ids[1:, 5:]).logits[:, -1])


def test_refusals(tiny_model):
    linear, ids = tiny_model("linear"), tokens(2, 5)
    with pytest.raises(ConfigError, match=r"DynamicCache\(config=model.config\)"):
        linear(ids, past_key_values=DynamicCache())
    with pytest.raises(ConfigError, match="layer at index"):
        linear(ids, past_key_values=DynamicCache(config=tiny_model("hybrid").config))
    with pytest.raises(ShapeError, match="attention_mask must have shape"):
        linear(ids, attention_mask=torch.ones(2, 4, dtype=torch.long))
    with pytest.raises(ShapeError, match="padding mask"):
        linear(ids, attention_mask=torch.zeros(2, 1, 5, 5))
    with pytest.raises(ConfigError, match="got both or none"):
        linear()
    with pytest.raises(ConfigError, match="output_attentions"):
        linear(ids, output_attentions=True)
    with pytest.raises(ConfigError, match="cache_implementation"):
        linear.generate(ids, max_new_tokens=2, cache_implementation="static")
