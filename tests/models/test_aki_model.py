"""AKI: which positions feel a change of the question or the answer, parity with eager, generation, refusals."""

import pytest
import torch
from aki_tiny import BASE, EOS, ID, IMAGE, LATENTS, PAD, TAG, ids, pixels, tiny_config, tiny_model
from transformers import AutoModelForImageTextToText, DynamicCache

from mmkernels import ConfigError, DataError, ShapeError, build_mutual_spans, mma_mask
from mmkernels.models.aki import AkiForConditionalGeneration, PerceiverResampler
from mmkernels.testing import assert_within

# golden case of the mask: expanded length 12, image at [4, 7), span of the question [7, 10), tag included
GOLDEN = "<s> <|system|> be <|user|> <image> what is <|assistant|> a <|endoftext|>"
PROMPT = "<s> be kind <image> what is shown ? <|assistant|>"
OTHER = "<s> be kind <image> what is here ? <|assistant|>"
ANSWER = " a red cat"


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def dense(tokens, attention_mask=None, dtype=torch.float32, policy="prompt"):
    """The additive 4-D mask that eager attention takes."""
    spans = build_mutual_spans(
        tokens, image_token_id=IMAGE, prompt_end_token_id=TAG, attention_mask=attention_mask, policy=policy
    )
    keep = mma_mask(tokens.shape[1], batch=tokens.shape[0], spans=spans, attention_mask=attention_mask).dense()
    return torch.zeros(keep.shape, dtype=dtype).masked_fill(~keep, torch.finfo(dtype).min)[:, None]


def seen_from(model, tokens, images):
    """(layers + 1, seqlen, hidden): the states of every layer, the inputs first."""
    with torch.no_grad():
        out = model(torch.tensor([tokens]), images, output_hidden_states=True, use_cache=True)
    return torch.stack(out.hidden_states)[:, 0], out.past_key_values


def test_golden_mask_through_the_model():
    """Which inputs each output of one layer depends on, by gradients: the 87 pairs of the specification."""
    model = tiny_model(torch.float64, {"num_hidden_layers": 1})
    tokens = torch.tensor([ids(GOLDEN)])
    assert tokens.shape[1] == 12
    embeds = model.embed(tokens, pixels(dtype=torch.float64)).detach().requires_grad_()
    types = (tokens == IMAGE).long()
    # without input_ids the tag cannot be looked for: the text that images read is given
    context = torch.zeros_like(types).bool()
    context[0, 7:10] = True
    rows = model(inputs_embeds=embeds, mm_token_type_ids=types, context_mask=context, output_hidden_states=True)
    by_ids = model(tokens, pixels(dtype=torch.float64), output_hidden_states=True)
    torch.testing.assert_close(rows.logits, by_ids.logits, rtol=0, atol=0)
    depends = torch.zeros(12, 12, dtype=torch.bool)
    for i in range(12):
        (grad,) = torch.autograd.grad(rows.hidden_states[-1][0, i].sin().sum(), embeds, retain_graph=True)
        depends[i] = grad[0].abs().amax(-1) > 0
    assert int(depends.sum()) == 87
    expected = torch.ones(12, 12).tril().bool()
    expected[4:7, 7:10] = True
    assert torch.equal(depends, expected)


def test_image_states_change_with_the_question(model):
    states, _ = seen_from(model, ids(PROMPT + ANSWER), pixels())
    others, _ = seen_from(model, ids(OTHER + ANSWER), pixels())
    image = slice(3, 3 + LATENTS)
    assert torch.equal(states[:, :3], others[:, :3])  # what precedes the image stays causal
    assert torch.equal(states[0, image], others[0, image])
    for layer in range(1, len(states)):
        change = (states[layer, image] - others[layer, image]).norm(dim=-1) / states[layer, image].norm(dim=-1)
        assert change.min() > 1e-3, (layer, change)


def test_answers_do_not_reach_the_image(model):
    """Bit for bit, in every layer's states and in the cached keys and values."""
    one, cache_one = seen_from(model, ids(PROMPT + " a red cat"), pixels())
    two, cache_two = seen_from(model, ids(PROMPT + " a left dog"), pixels())
    until = len(ids(PROMPT)) + 1
    assert torch.equal(one[:, :until], two[:, :until])
    assert not torch.equal(one[:, until], two[:, until])
    for a, b in zip(cache_one.layers, cache_two.layers, strict=True):
        assert torch.equal(a.keys[:, :, :until], b.keys[:, :, :until])
        assert torch.equal(a.values[:, :, :until], b.values[:, :, :until])


def test_the_tag_belongs_to_the_span(model):
    """The released weights were trained with images that read the assistant tag itself."""
    tag = ids(PROMPT).index(TAG)
    with_tag = seen_from(model, ids(PROMPT), pixels())[0]
    without = tiny_model(include_prompt_end=False)
    difference = (seen_from(without, ids(PROMPT), pixels())[0] - with_tag).abs()
    assert difference[1:, 3 : 3 + LATENTS].amax() > 1e-3
    assert difference[1, tag].amax() == 0  # its own row reads the same inputs either way


@torch.no_grad()
def test_logits_equal_eager_with_the_dense_mask():
    tokens = torch.tensor([ids(PROMPT + ANSWER), ids("<s> <image> what ? <|assistant|> a dog left a cat red ?")])
    images = pixels(2)
    eager = {"implementation": {"text_config": "eager"}, "policy": "none"}
    truth = tiny_model(torch.float64, **eager)(tokens, images.double(), dense(tokens, dtype=torch.float64)).logits
    peer = tiny_model(**eager)(tokens, images, dense(tokens)).logits
    ours = tiny_model()(tokens, images).logits
    assert ours.shape == (2, tokens.shape[1], BASE + 2)
    assert_within("logits", ours, truth, peer)
    causal = tiny_model(policy="none")(tokens, images).logits
    assert (ours - causal).abs().max() > 1e-2 * causal.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("policy", ["prompt", "own_segment", "none"])
def test_policies_with_several_images(policy):
    tokens = torch.tensor([ids("<s> <image> what is <image> here ? <|assistant|> a cat")])
    eager = {"implementation": {"text_config": "eager"}, "policy": "none"}
    mask = dense(tokens, dtype=torch.float64, policy=policy)
    truth = tiny_model(torch.float64, **eager)(tokens, pixels(2, dtype=torch.float64), mask).logits
    peer = tiny_model(**eager)(tokens, pixels(2), dense(tokens, policy=policy)).logits
    assert_within("logits", tiny_model(policy=policy)(tokens, pixels(2)).logits, truth, peer)


@torch.no_grad()
def test_a_caption_is_causal():
    """Without a tag nothing is opened: pre-training needs no switch."""
    tokens = torch.tensor([ids("<s> <image> a red cat <|endofchunk|>")])
    expected = tiny_model(policy="none")(tokens, pixels()).logits
    assert torch.equal(tiny_model()(tokens, pixels()).logits, expected)


@torch.no_grad()
def test_both_kinds_of_padding_leave_tokens_alone(model):
    one, two = ids(PROMPT + ANSWER), ids("<s> what is here ? <|assistant|> a")  # the second has no image
    alone = [model(torch.tensor([one]), pixels()).logits[0], model(torch.tensor([two])).logits[0]]
    for left in (True, False):
        fill = [PAD] * (len(one) - len(two))
        row, own = (fill + two, slice(len(fill), None)) if left else (two + fill, slice(0, len(two)))
        tokens = torch.tensor([one, row])
        logits = model(tokens, pixels(), attention_mask=(tokens != PAD).long()).logits
        torch.testing.assert_close(logits[0], alone[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits[1, own], alone[1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def greedy(model, tokens, images, steps, end=EOS):
    """By full forward passes without a cache."""
    for _ in range(steps):
        logits = model(torch.tensor([tokens]), images, use_cache=False).logits[0, -1]
        logits[IMAGE] = -torch.inf
        tokens = [*tokens, int(logits.argmax())]
        if tokens[-1] == end:
            break
    return tokens


def batch_of(rows):
    width = max(map(len, rows))
    tokens = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    return tokens, (tokens != PAD).long()


def trimmed(row, start):
    """Up to the end token and without the padding in front."""
    row = row.tolist()[start:]
    return row[: row.index(EOS) + 1] if EOS in row else row


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_batches(model, beams):
    """Several images, one, none; left padding; greedily equal to full passes, with beams equal to single calls."""
    rows = [ids("<s> <image> what is <image> here ? <|assistant|>"), ids(PROMPT), ids("<s> what ? <|assistant|>")]
    images = [pixels(2, seed=3), pixels(1, seed=4), None]
    tokens, mask = batch_of(rows)
    together = model.generate(
        tokens,
        attention_mask=mask,
        pixel_values=torch.cat(images[:2]),
        max_new_tokens=6,
        num_beams=beams,
        do_sample=False,
    )
    for row, own, image in zip(together, rows, images, strict=True):
        if beams == 1:
            expected = greedy(model, own, image, 6)[len(own) :]
        else:
            options = {} if image is None else {"pixel_values": image}
            alone = model.generate(torch.tensor([own]), max_new_tokens=6, num_beams=beams, do_sample=False, **options)
            expected = trimmed(alone[0], len(own))
        assert trimmed(row, tokens.shape[1]) == expected


@torch.no_grad()
def test_decoding_from_a_cache_equals_the_full_pass(model):
    tokens, cut = ids(PROMPT + ANSWER), len(ids(PROMPT))
    full = model(torch.tensor([tokens]), pixels()).logits
    cache = DynamicCache(config=model.config.text_config)
    parts = [model(torch.tensor([tokens[:cut]]), pixels(), past_key_values=cache).logits]
    parts += [model(torch.tensor([[token]]), past_key_values=cache).logits for token in tokens[cut:]]
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=1e-4, atol=1e-4)
    cache = DynamicCache(config=model.config.text_config)  # in front of the image one may cut
    model(torch.tensor([tokens[:2]]), past_key_values=cache)
    rest = model(torch.tensor([tokens[2:]]), pixels(), past_key_values=cache).logits
    torch.testing.assert_close(rest, full[:, 2:], rtol=1e-4, atol=1e-4)


def test_prompts_cut_between_image_and_question_are_refused(model):
    tokens = ids(PROMPT)
    cache = DynamicCache(config=model.config.text_config)
    model(torch.tensor([tokens[:7]]), pixels(), past_key_values=cache)
    with pytest.raises(ConfigError, match="one call"):
        model(torch.tensor([tokens[7:]]), past_key_values=cache)
    with pytest.raises(ConfigError, match="prefill_chunk_size"):
        model.generate(torch.tensor([tokens]), pixel_values=pixels(), prefill_chunk_size=5, max_new_tokens=2)


def test_generation_across_the_change_of_rotary_factors():
    """Once a text is longer than original_max_position_embeddings all keys are turned anew, as by one full pass."""
    pairs = 6
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0}
    rope |= {"short_factor": [1.0] * pairs, "long_factor": [1.0 + 3 * i for i in range(pairs)]}
    text = {"rope_parameters": rope, "original_max_position_embeddings": 16, "eos_token_id": None}
    long = tiny_model(text=text)
    rows, images = [ids(PROMPT), ids("<s> <image> what ? <|assistant|>")], pixels(2)
    tokens, mask = batch_of(rows)
    assert tokens.shape[1] == 11
    together = long.generate(tokens, attention_mask=mask, pixel_values=images, max_new_tokens=10, do_sample=False)
    first = greedy(long, rows[0], images[:1], 10, end=None)
    assert together[0].tolist() == first
    with torch.no_grad():  # the rotation did change, and keys of before it would not do
        short = long(torch.tensor([first[:16]]), images[:1]).logits[0]
        longer = long(torch.tensor([first[:17]]), images[:1]).logits[0, :16]
    assert (short - longer).abs().max() > 1e-2


def test_training_loss_is_the_mean_over_labels_and_reaches_everything():
    model = tiny_model().train()
    tokens = torch.tensor([ids(PROMPT + ANSWER)])
    labels = tokens.clone()
    labels[:, : len(ids(PROMPT))] = -100
    out = model(tokens, pixels(), labels=labels)
    logp = out.logits[0].log_softmax(-1)
    start = len(ids(PROMPT))
    expected = -torch.stack([logp[p - 1, tokens[0, p]] for p in range(start, tokens.shape[1])]).mean()
    torch.testing.assert_close(out.loss, expected)
    out.loss.backward()
    unreached = {name for name, p in model.named_parameters() if p.grad is None}
    assert {name.split(".")[1] for name in unreached} == {"head"}  # the tower's pooling head is never read


def test_labels_that_images_read_are_refused(model):
    tokens = torch.tensor([ids(PROMPT + ANSWER)])
    types, context = (tokens == IMAGE).long(), torch.ones_like(tokens).bool()
    labels = torch.full_like(tokens, -100)
    labels[0, -1] = tokens[0, -1]
    model(tokens, pixels(), labels=labels)
    embeds = model.embed(tokens, pixels())
    leaking = torch.tensor([[0, 3, 6, 6, tokens.shape[1]]], dtype=torch.int32)
    with pytest.raises(DataError, match="check_no_label_leak"):
        model(inputs_embeds=embeds, mm_token_type_ids=types, context_mask=context, labels=labels, mma_spans=leaking)


def test_bad_input_is_named(model):
    tokens = torch.tensor([ids(PROMPT)])
    with pytest.raises(ShapeError, match="3 placeholders"):
        model(tokens, pixels(2))
    with pytest.raises(ShapeError, match=r"\[2, 4\]"):
        model(torch.tensor([[IMAGE, IMAGE, 1, 1], [IMAGE] * 4]), pixels(2))
    with pytest.raises(ShapeError, match="pixel_values"):
        model(tokens, torch.zeros(1, 3, 4, 4))
    with pytest.raises(ConfigError, match="pixel_values must be given"):
        model(tokens)
    with pytest.raises(ConfigError, match="input_ids and inputs_embeds"):
        model()
    with pytest.raises(ConfigError, match="inputs_embeds"):
        model(inputs_embeds=torch.zeros(1, 2, 24), pixel_values=pixels())
    with pytest.raises(ShapeError, match="attention_mask"):
        model(torch.tensor([[1, 2, 3]]), attention_mask=torch.ones(1, 2).long())
    with pytest.raises(ConfigError, match="two tables"):
        model.resize_token_embeddings(99)
    with pytest.raises(ConfigError, match="mmkernels_mma"):
        tiny_model(implementation="sdpa")(tokens, pixels())
    with pytest.raises(ConfigError, match="policy"):
        tiny_config(policy="promt")
    with pytest.raises(ShapeError, match="features"):
        model.resampler(torch.zeros(1, 2, 5))


def test_extra_tokens_use_their_own_tables(model):
    extra = ID["<|endofchunk|>"]
    embeds = model.embed(torch.tensor([[1, extra, PAD]]))
    assert torch.equal(embeds[0, 1], model.extra_embedding.weight[extra - BASE])
    assert torch.equal(embeds[0, 0], model.language_model.embed_tokens.weight[1])
    assert torch.equal(embeds[0, 2], model.language_model.embed_tokens.weight[PAD])
    hidden = torch.randn(5, 24)
    logits = model.logits(hidden)
    whole = hidden @ model.lm_head.weight.T + model.lm_head.bias
    torch.testing.assert_close(logits[:, :BASE], whole[:, :BASE])
    torch.testing.assert_close(logits[:, BASE:], hidden @ model.extra_head.weight.T + model.extra_head.bias)


def test_resampler_by_the_formula():
    """Written out with loops over images, heads and latents."""
    torch.manual_seed(0)
    resampler = PerceiverResampler(6, 5, depth=2, heads=3, head_dim=4, num_latents=2, ff_mult=3).double()
    for parameter in resampler.parameters():
        parameter.data.normal_()
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    norm = torch.nn.functional.layer_norm
    for n in range(2):
        latents = resampler.latents
        for layer in resampler.layers:
            a = layer.attention
            own = norm(latents, (6,), a.norm_latents.weight, a.norm_latents.bias)
            media = torch.cat([norm(x[n], (6,), a.norm_media.weight, a.norm_media.bias), own])
            q, kv = own @ a.to_q.weight.T, media @ a.to_kv.weight.T
            heads = []
            for h in range(3):
                part = slice(4 * h, 4 * h + 4)
                scores = q[:, part] @ kv[:, :12][:, part].T / 2
                heads.append(scores.softmax(-1) @ kv[:, 12:][:, part])
            latents = latents + torch.cat(heads, -1) @ a.to_out.weight.T
            inner = norm(latents, (6,), layer.mlp.norm.weight, layer.mlp.norm.bias) @ layer.mlp.up.weight.T
            latents = latents + (0.5 * inner * (1 + torch.erf(inner / 2**0.5))) @ layer.mlp.down.weight.T
        expected = norm(latents, (6,), resampler.norm.weight, resampler.norm.bias) @ resampler.projection.weight.T
        torch.testing.assert_close(resampler(x)[n], expected + resampler.projection.bias)


def test_vision_features_are_the_normed_last_layer(model):
    """All layers and post_layernorm; the pooling head changes nothing."""
    tower, seen = model.vision_tower, {}
    handle = model.resampler.register_forward_pre_hook(lambda _, args: seen.update(features=args[0]))
    model.get_image_features(pixels())
    handle.remove()
    hidden = tower.encoder(inputs_embeds=tower.embeddings(pixels())).last_hidden_state
    torch.testing.assert_close(seen["features"], tower.post_layernorm(hidden))


def test_saved_and_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(loaded) is AkiForConditionalGeneration
    assert loaded.generation_config.suppress_tokens == [IMAGE]
    assert loaded.generation_config.pad_token_id == PAD
    tokens = torch.tensor([ids(PROMPT)])
    with torch.no_grad():
        assert torch.equal(loaded.eval()(tokens, pixels()).logits, model(tokens, pixels()).logits)
