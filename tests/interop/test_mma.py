"""Modality-mutual attention in stock decoders: parity with eager and a 4-D mask, generate, training, refusals."""

import copy
import inspect

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
    StaticCache,
)
from transformers.masking_utils import create_causal_mask

from mmkernels import BackendError, ConfigError, DataError, ShapeError, build_mutual_spans, mma_mask
from mmkernels.interop import make_modality_mutual
from mmkernels.testing import assert_within

IMAGE, TAG = 9, 3
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
STOCK = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SMALL)),
    "smollm2": (LlamaForCausalLM, LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SMALL)),
    "phi3": (Phi3ForCausalLM, Phi3Config(**SMALL)),
}
#       a system text, an image, a question, the assistant tag, an answer
PROMPT = [1, 5, 6, IMAGE, IMAGE, IMAGE, 20, 21, 22, TAG]
ANSWER = [30, 31, 32]
every_stock = pytest.mark.parametrize("name", STOCK)


def build(name="llama", implementation="eager", dtype=torch.float32, **changes):
    model_class, config = STOCK[name]
    config = copy.deepcopy(config)
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    model = model_class._from_config(config, attn_implementation=implementation).eval()
    for parameter in model.parameters():  # larger than at initialisation, so that attention is not uniform
        parameter.data.mul_(4 if parameter.ndim == 2 else 1)
    return model.to(dtype)


def mutual(name="llama", tag=TAG, dtype=torch.float32, **changes):
    return make_modality_mutual(build(name, dtype=dtype, **changes), image_token_id=IMAGE, prompt_end_token_id=tag)


def dense(ids, attention_mask=None, dtype=torch.float32):
    """The additive 4-D mask that eager attention takes."""
    spans = build_mutual_spans(ids, image_token_id=IMAGE, prompt_end_token_id=TAG, attention_mask=attention_mask)
    keep = mma_mask(ids.shape[1], batch=ids.shape[0], spans=spans, attention_mask=attention_mask).dense()[:, None]
    return torch.zeros(keep.shape, dtype=dtype).masked_fill(~keep, torch.finfo(dtype).min)


@every_stock
@torch.no_grad()
def test_logits_equal_eager_with_the_dense_mask(name):
    ids = torch.tensor([PROMPT + ANSWER, [1, IMAGE, IMAGE, 7, 8, TAG, 11, 12, 13, 14, 15, 16, 17]])
    truth = build(name, dtype=torch.float64)(ids, attention_mask=dense(ids, dtype=torch.float64)).logits
    peer = build(name)(ids, attention_mask=dense(ids)).logits
    ours = mutual(name)
    assert_within("logits", ours(ids).logits, truth, peer)
    causal = build(name)(ids).logits
    assert (ours(ids).logits - causal).abs().max() > 1e-2 * causal.abs().max()
    types = (ids == IMAGE).long()
    torch.testing.assert_close(ours(ids, mm_token_type_ids=types).logits, ours(ids).logits, rtol=0, atol=0)


@every_stock
def test_gradients_equal_eager_with_the_dense_mask(name):
    ids = torch.tensor([PROMPT + ANSWER])
    labels = torch.tensor([[-100] * len(PROMPT) + ANSWER])

    def run(model, **options):
        model(ids, labels=labels, **options).loss.backward()
        return {n: p.grad for n, p in model.named_parameters()}

    truth = run(build(name, dtype=torch.float64), attention_mask=dense(ids, dtype=torch.float64))
    peer = run(build(name), attention_mask=dense(ids))
    ours = run(mutual(name).train())
    for key in truth:
        # Many products of three layers are summed in another order; the longest sum of the model is over 64 channels.
        assert_within(key, ours[key], truth[key], peer[key], summands=64)


@every_stock
@torch.no_grad()
def test_autocast_narrows_as_it_does_for_sdpa(name):
    ids = torch.tensor([PROMPT + ANSWER])
    with torch.autocast("cpu", torch.bfloat16):
        peer = build(name, "sdpa")(ids, attention_mask=dense(ids, dtype=torch.bfloat16)).logits
        ours = mutual(name)(ids).logits
    truth = build(name, dtype=torch.float64)(ids, attention_mask=dense(ids, dtype=torch.float64)).logits
    assert ours.dtype == peer.dtype
    # two runs that round to bfloat16 at the same places: neither is the measure of the other's luck
    assert_within("logits", ours.float(), truth, peer.float(), dtype=torch.bfloat16)


@every_stock
def test_text_only_prompts_are_stock(name):
    ids = torch.tensor([[1, 5, 6, 7, TAG, 8, 10], [0, 0, 1, 5, TAG, 8, 10]])
    mask = (ids != 0).long()
    with torch.no_grad():
        expected, actual = (m(ids, attention_mask=mask).logits for m in (build(name), mutual(name)))
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def greedy(model, ids, attention_mask=None, steps=5):
    """Greedy tokens by full forward passes with a 4-D mask: no cache, no library code."""
    for _ in range(steps):
        position = None if attention_mask is None else (attention_mask.cumsum(1) - 1).clamp(min=0)
        logits = model(ids, attention_mask=dense(ids, attention_mask), position_ids=position).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        if attention_mask is not None:
            attention_mask = torch.nn.functional.pad(attention_mask, (0, 1), value=1)
    return ids


@every_stock
@pytest.mark.parametrize("cache", ["dynamic", "static", None])
def test_generate_equals_full_forward_passes(name, cache):
    ids = torch.tensor([PROMPT])
    options = {"use_cache": False} if cache is None else {"cache_implementation": cache}
    got = mutual(name, eos_token_id=None).generate(ids, max_new_tokens=5, do_sample=False, **options)
    assert torch.equal(got, greedy(build(name), ids))


@every_stock
def test_generate_in_left_padded_batches(name):
    ids = torch.tensor([[0, 0, *PROMPT], [1, IMAGE, IMAGE, 40, 41, 42, 43, 44, 45, 46, 47, TAG]])
    mask = (ids != 0).long()
    model = mutual(name, eos_token_id=None)
    got = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert torch.equal(got, greedy(build(name), ids, mask))
    alone = model.generate(ids[:1, 2:], max_new_tokens=5, do_sample=False)
    assert torch.equal(got[:1, 2:], alone)
    types = model.generate(
        ids, attention_mask=mask, mm_token_type_ids=(ids == IMAGE).long(), max_new_tokens=5, do_sample=False
    )
    assert torch.equal(got, types)


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_beams_with_a_cache_equal_beams_without(name):
    ids = torch.tensor([[0, 0, *PROMPT], [1, IMAGE, IMAGE, 40, 41, 42, 43, 44, 45, 46, 47, TAG]])
    options = {"attention_mask": (ids != 0).long(), "num_beams": 3, "max_new_tokens": 5, "do_sample": False}
    model = mutual(name, eos_token_id=None)
    cached, full = (model.generate(ids, use_cache=c, **options) for c in (True, False))
    assert torch.equal(cached, full)
    assert not torch.equal(cached, build(name, eos_token_id=None).generate(ids, **options))  # the spans did something


def test_without_a_tag_the_whole_prompt_is_the_question():
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        torch.testing.assert_close(mutual(tag=None)(ids).logits, mutual()(ids).logits, rtol=0, atol=0)
    model = mutual(tag=None, eos_token_id=None)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), greedy(build(), ids))
    with pytest.raises(ConfigError, match=r"use_cache must be on when no prompt_end_token_id"):
        model.generate(ids, max_new_tokens=5, use_cache=False)
    labels = torch.tensor([[-100] * len(PROMPT) + ANSWER])
    full = torch.tensor([PROMPT + ANSWER])
    with torch.no_grad():  # labels end the question
        torch.testing.assert_close(
            model(full, labels=labels).logits, mutual()(full, labels=labels).logits, rtol=0, atol=0
        )


@torch.no_grad()
def test_the_answer_never_reaches_the_image():
    model = mutual()
    states = [
        model.model(torch.tensor([PROMPT + a]), output_hidden_states=True).hidden_states[-1]
        for a in (ANSWER, [40, 41, 42])
    ]
    torch.testing.assert_close(*(s[:, : len(PROMPT)] for s in states), rtol=0, atol=0)
    hidden = [
        model(torch.tensor([p]), output_hidden_states=True).hidden_states[-1]
        for p in (PROMPT, [*PROMPT[:6], 50, 21, 22, TAG])
    ]
    assert (hidden[0] - hidden[1])[0, 3:6].abs().amax(-1).min() > 1e-3  # the question reaches every image token


@torch.no_grad()
def test_inputs_embeds_and_packed_documents():
    model, ids = mutual(), torch.tensor([PROMPT + ANSWER])
    embeds = model.get_input_embeddings()(ids)
    types, context = (ids == IMAGE).long(), torch.arange(ids.shape[1])[None] < len(PROMPT)
    by_embeds = model(inputs_embeds=embeds, mm_token_type_ids=types, context_mask=context).logits
    torch.testing.assert_close(by_embeds, model(ids).logits, rtol=0, atol=0)
    other = [1, IMAGE, 60, 61, TAG, 33]
    packed = torch.tensor([PROMPT + ANSWER + other])
    positions = torch.cat([torch.arange(ids.shape[1]), torch.arange(len(other))])[None]
    logits = model(packed, position_ids=positions, use_cache=False).logits
    apart = torch.cat([model(ids).logits, model(torch.tensor([other])).logits], 1)
    torch.testing.assert_close(logits, apart, rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match=r"packed documents must be in a batch of 1"):
        model(packed.repeat(2, 1), position_ids=positions.repeat(2, 1), use_cache=False)


@torch.no_grad()
def test_sliding_windows_and_their_caches():
    config = MistralConfig(**SMALL, sliding_window=4)
    torch.manual_seed(0)
    stock = MistralForCausalLM._from_config(config, attn_implementation="eager").eval()
    model = make_modality_mutual(copy.deepcopy(stock), image_token_id=IMAGE, prompt_end_token_id=TAG)
    text = torch.tensor([[1, *range(10, 30)]])
    torch.testing.assert_close(model(text).logits, stock(text).logits, rtol=1e-4, atol=1e-5)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(text, **options), stock.generate(text, **options))
    ids = torch.tensor([PROMPT + ANSWER])
    keep = mma_mask(ids.shape[1], spans=[(0, 3, 6, 6, 10)], window=4).dense()[:, None]
    four = torch.zeros(keep.shape).masked_fill(~keep, torch.finfo(torch.float32).min)
    torch.testing.assert_close(model(ids).logits, stock(ids, attention_mask=four).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_name_serves_vision_towers_too():
    config = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14
    )
    tower = SiglipVisionModel._from_config(config, attn_implementation="eager").eval()
    pixels = torch.randn(1, 3, 28, 28)
    expected = tower(pixels).last_hidden_state
    tower.set_attn_implementation("mmkernels_mma")
    torch.testing.assert_close(tower(pixels).last_hidden_state, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_llava_as_it_is():
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14
    )
    options = {"image_token_index": IMAGE, "image_seq_length": 4, "vision_feature_select_strategy": "default"}
    text = LlamaConfig(**{**SMALL, "eos_token_id": None})
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, **options)
    stock = LlavaForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    model = make_modality_mutual(copy.deepcopy(stock), image_token_id=IMAGE, prompt_end_token_id=TAG)
    ids, pixels = torch.tensor([[1, 5, *[IMAGE] * 4, 20, 21, 22, TAG]]), torch.randn(1, 3, 28, 28)
    for _ in range(3):
        expected = stock(ids, pixel_values=pixels, attention_mask=dense(ids)).logits
        torch.testing.assert_close(model(ids, pixel_values=pixels).logits, expected, rtol=1e-4, atol=1e-5)
        ids = torch.cat([ids, expected[:, -1:].argmax(-1)], 1)
    got = model.generate(ids[:, :10], pixel_values=pixels, max_new_tokens=3, do_sample=False)
    assert torch.equal(got, ids)


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
def test_masks_for_models_that_take_an_overlay(implementation):
    ids = torch.tensor([PROMPT + ANSWER, [1, IMAGE, IMAGE, 7, 8, TAG, 11, 12, 13, 14, 15, 0, 0]])
    valid = ids != 0
    spans = build_mutual_spans(ids, image_token_id=IMAGE, prompt_end_token_id=TAG, attention_mask=valid)
    mask = mma_mask(ids.shape[1], spans=spans, attention_mask=valid)
    config = LlamaConfig(**SMALL, attn_implementation=implementation)
    made = create_causal_mask(
        config, torch.zeros(2, ids.shape[1], 4), valid, None, or_mask_function=mask.or_mask_function()
    )
    if implementation == "flex_attention":
        index = torch.arange(ids.shape[1])
        kept = make_keep(made.mask_mod, index)
    else:
        kept = made[:, 0] if made.dtype == torch.bool else made[:, 0] == 0
    assert torch.equal(kept[valid], mask.dense()[valid])  # rows of padding differ: transformers lets them look


def make_keep(mask_mod, index):
    rows = [[[bool(mask_mod(torch.tensor(b), torch.tensor(0), q, k)) for k in index] for q in index] for b in range(2)]
    return torch.tensor(rows)


def test_gradient_checkpointing_and_saving(tmp_path):
    model, ids = mutual(), torch.tensor([PROMPT + ANSWER])
    labels = torch.tensor([[-100] * len(PROMPT) + ANSWER])
    model.train()
    model(ids, labels=labels).loss.backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(ids, labels=labels, use_cache=False).loss.backward()
    for before, after in zip(plain, (p.grad for p in model.parameters()), strict=True):
        torch.testing.assert_close(before, after)
    model.eval().save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="mmkernels_mma")
    assert type(loaded) is LlamaForCausalLM
    assert loaded.config.modality_mutual["image_token_id"] == IMAGE
    again = make_modality_mutual(loaded, **loaded.config.modality_mutual)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=0)


def test_converting_twice_or_a_copy_is_safe_and_the_signature_is_told():
    model = mutual()
    twice = make_modality_mutual(model, image_token_id=IMAGE, prompt_end_token_id=TAG, policy="none")
    assert twice is model
    assert len([c for c in type(model).__mro__ if c.__name__ == "LlamaForCausalLM"]) == 2
    names = inspect.signature(model.forward).parameters
    assert {"input_ids", "labels", "logits_to_keep", "mm_token_type_ids", "context_mask"} <= set(names)
    with torch.no_grad():
        ids = torch.tensor([PROMPT])
        torch.testing.assert_close(copy.deepcopy(model)(ids).logits, build()(ids).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_compiled_text_model_has_no_graph_breaks():
    model = mutual().model
    ids = torch.tensor([[1, 5, 6, 7, 8]])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = model(ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(compiled(ids, use_cache=False).last_hidden_state, expected, rtol=1e-4, atol=1e-5)


def test_flash_attention_2_is_refused():
    model, ids = mutual(), torch.tensor([PROMPT])
    model.config._attn_implementation = "flash_attention_2"  # what set_attn_implementation does where it is installed
    with pytest.raises(ConfigError, match=r"got 'flash_attention_2', which would drop what images may read"):
        model(ids)


def test_chunked_prefill_through_a_span_is_refused():
    model, ids = mutual(eos_token_id=None), torch.tensor([PROMPT])
    options = {"max_new_tokens": 3, "do_sample": False}
    for chunk in (2, 4, 5, 6, 9):
        with pytest.raises(ConfigError, match=rf"prefill_chunk_size must not cut.*got {chunk}"):
            model.generate(ids, prefill_chunk_size=chunk, **options)
    whole = model.generate(ids, **options)
    longer = torch.tensor([[1, 7, 8, *PROMPT[1:]]])  # the image starts at 5: chunks of 10 cut, of 5 would too
    with pytest.raises(ConfigError, match=r"prefill_chunk_size"):
        model.generate(longer, prefill_chunk_size=5, **options)
    assert torch.equal(model.generate(ids, prefill_chunk_size=10, **options), whole)
    late = torch.tensor([[1, 5, 6, 7, 8, *PROMPT[1:6], TAG]])  # [1 5 6 7 8 | 5 6 i i i | A]: cut before the tag
    with pytest.raises(ConfigError, match=r"prefill_chunk_size"):
        model.generate(late, prefill_chunk_size=10, **options)
    early = torch.tensor([[1, 5, 6, 7, 8, 10, 11, *PROMPT[3:]]])  # [1 5 6 7 8 10 11 | i i i 20 21 22 A]
    assert torch.equal(model.generate(early, prefill_chunk_size=7, **options), model.generate(early, **options))


def test_chunks_by_hand_are_refused_too():
    model = mutual()
    with torch.no_grad():
        out = model(torch.tensor([PROMPT[:6]]), use_cache=True)
        with pytest.raises(ConfigError, match=r"an image and its question must come in one call"):
            model(torch.tensor([PROMPT[6:]]), past_key_values=out.past_key_values)


@torch.no_grad()
def test_a_second_turn_continues_on_the_cache():
    model = mutual()
    turn = [IMAGE, IMAGE, 50, 51, TAG]
    first = model(torch.tensor([PROMPT + ANSWER]), use_cache=True)
    second = model(torch.tensor([turn]), past_key_values=first.past_key_values)
    whole = model(torch.tensor([PROMPT + ANSWER + turn]))
    torch.testing.assert_close(second.logits, whole.logits[:, -len(turn) :], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_second_turn_after_left_padding():
    # The padding of the call is the end of the attention mask, not its beginning.
    model, turn = mutual(), [IMAGE, IMAGE, 50, 51, TAG]
    first = torch.tensor([[0, 0, 0, 0, *PROMPT], [1, IMAGE, IMAGE, *range(40, 50), TAG]])
    whole = torch.cat([first, torch.tensor([turn, turn])], 1)
    mask = (whole != 0).long()
    position = (mask.cumsum(1) - 1).clamp(min=0)
    cached = model(first, attention_mask=mask[:, :14], position_ids=position[:, :14], use_cache=True)
    second = model(
        whole[:, 14:], attention_mask=mask, position_ids=position[:, 14:], past_key_values=cached.past_key_values
    )
    expected = model(whole, attention_mask=mask, position_ids=position).logits[:, 14:]
    torch.testing.assert_close(second.logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"attention_mask": torch.zeros(1, 1, 10, 10)}, ConfigError, r"attention_mask must be the \(batch, seqlen\)"),
        (
            {"mm_token_type_ids": torch.zeros(1, 7).long()},
            ShapeError,
            r"mm_token_type_ids must have shape \(batch, 10\)",
        ),
        ({"mma_spans": torch.tensor([[0, 3, 6, 6, 11]]).int()}, ShapeError, r"k1 <= klen"),
        (
            {"mma_spans": torch.tensor([[0, 3, 6, 6, 10]]).int(), "labels": torch.tensor([[-100] * 7 + [5, 5, 5]])},
            DataError,
            r"label at token 7 of batch row 0, which row 3 attends",
        ),
        ({"output_attentions": True}, ConfigError, r"output_attentions must be left out"),
    ],
)
def test_bad_calls(options, error, message):
    with pytest.raises(error, match=message):
        mutual()(torch.tensor([PROMPT]), **options)


def test_bad_models():
    with pytest.raises(ConfigError, match=r"Did you mean 'prompt'"):
        make_modality_mutual(build(), image_token_id=IMAGE, policy="promt")
    with pytest.raises(BackendError, match=r"Linear must use transformers' attention interface"):
        make_modality_mutual(torch.nn.Linear(2, 2), image_token_id=IMAGE)
    with pytest.raises(ConfigError, match=r"dropout must be 0"):
        mutual(attention_dropout=0.1).train()(torch.tensor([PROMPT]))


def test_a_static_cache_filled_by_hand():
    model, ids = mutual(), torch.tensor([PROMPT])
    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        logits = model(ids, past_key_values=cache).logits
        torch.testing.assert_close(logits, model(ids).logits, rtol=1e-4, atol=1e-5)
