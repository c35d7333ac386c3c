"""mmkernels.prune at the vision side: against eager attention maps and prompts put together by hand."""

import copy

import pytest
import torch
from prune_by_hand import PICTURE, ROWS, WithExtras, by_hand, chosen_by_maps
from torch.nn import functional as F
from vlm_tiny import IMAGE, PAD, batch, llava, paligemma

import mmkernels
from mmkernels.errors import BackendError, ConfigError, ShapeError
from mmkernels.interop.prune_layout import ImageTokens, narrow
from mmkernels.interop.prune_tower import vit


@pytest.fixture(scope="module")
def model():
    return llava()


@torch.no_grad()
def test_logits_are_those_of_a_prompt_with_the_chosen_patches(model):
    inputs = batch(ROWS)
    kept, features = chosen_by_maps(model, inputs["pixel_values"], 5, 2)
    tokens = [model.model.multi_modal_projector(f[k]) for f, k in zip(features, kept, strict=True)]
    with mmkernels.prune(model, "vtc_cls", num_keep=5, num_layers=2) as handle:
        logits = model(**inputs).logits
        assert [k.tolist() for k in handle.kept] == kept
    assert logits.shape[1] == max(len(row) + 4 * row.count(PICTURE) for row in ROWS)
    used = 0
    for i, row in enumerate(ROWS):
        expected = model(inputs_embeds=by_hand(model, row, tokens[used : used + row.count(PICTURE)])).logits[0]
        torch.testing.assert_close(logits[i, -expected.shape[0] :], expected, atol=2e-5, rtol=1e-4)
        used += row.count(PICTURE)


@torch.no_grad()
@pytest.mark.parametrize("make", [llava, lambda: llava("siglip"), paligemma], ids=["clip", "siglip", "paligemma"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_keeping_every_token_changes_no_bit(make, side):
    model, inputs = make(), batch(ROWS, side=side)
    if type(model).__name__.startswith("Pali"):
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    stock, kind, before = model(**inputs).logits, type(model), set(model.__dict__)
    source = "cls" if vit(model.model.vision_tower).num_prefix else "column"
    with mmkernels.prune(model, "vtc_cls", num_keep=16, num_layers=2, score_source=source):
        assert torch.equal(model(**inputs).logits, stock)
    assert type(model) is kind
    assert set(model.__dict__) == before
    assert torch.equal(model(**inputs).logits, stock)


@torch.no_grad()
@pytest.mark.parametrize("policy", ["compact", "original"])
def test_generate_in_a_batch_alone_and_without_cache(model, policy):
    inputs = batch(ROWS)
    with mmkernels.prune(model, "vtc_cls", num_keep=5, position_policy=policy):
        together = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        assert torch.equal(together[:, :-6], inputs["input_ids"])  # prompts come back with every placeholder
        uncached = model.generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=False)
        assert torch.equal(together, uncached)
        used = 0
        for i, row in enumerate(ROWS):
            alone = batch([row])
            if row.count(PICTURE):
                alone["pixel_values"] = inputs["pixel_values"][used : used + row.count(PICTURE)]
            used += row.count(PICTURE)
            assert (
                model.generate(**alone, max_new_tokens=6, do_sample=False)[0, -6:].tolist() == together[i, -6:].tolist()
            )


@torch.no_grad()
def test_original_positions(model):
    row, inputs = ROWS[0], batch(ROWS[:1])
    with mmkernels.prune(model, "random", num_keep=3, position_policy="original") as handle:
        out = model(**inputs, use_cache=True)
        step = model(torch.tensor([[11]]), past_key_values=out.past_key_values)
        patches = handle.kept[0]
    features = chosen_by_maps(model, inputs["pixel_values"], 3, 1)[1]
    tokens = model.model.multi_modal_projector(features[0, patches])
    positions = torch.tensor([[0, 1, *(2 + patches).tolist(), 18, 19, 20, 21]])
    ones = torch.ones_like(positions)
    embeds = by_hand(model, [*row, 11], [tokens])
    expected = model(inputs_embeds=embeds, position_ids=positions, attention_mask=ones).logits
    torch.testing.assert_close(out.logits, expected[:, :-1], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(step.logits, expected[:, -1:], atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_a_cache_is_continued_by_generate_and_by_hand(model):
    inputs = batch(ROWS[:1])
    with mmkernels.prune(model, "vtc_cls", num_keep=5):
        whole = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        first = model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        assert first.past_key_values.get_seq_length() == inputs["input_ids"].shape[1] - 11 + 3
        again = model.generate(
            first.sequences, past_key_values=first.past_key_values, max_new_tokens=4, do_sample=False
        )
        assert torch.equal(again, whole)
        cache = copy.deepcopy(model(**inputs, use_cache=True).past_key_values)
        logits = model(torch.tensor([[7]]), past_key_values=cache).logits[0, -1]
        longer = torch.cat([inputs["input_ids"], torch.tensor([[7]])], 1)
        full = model(longer, pixel_values=inputs["pixel_values"]).logits[0, -1]
        torch.testing.assert_close(logits, full, atol=2e-5, rtol=1e-4)
        # a second image in a conversation
        more = batch([[4, PICTURE, 6]], seed=1)
        mask = torch.ones(1, longer.shape[1] + 18, dtype=torch.int64)
        turn = model(more["input_ids"], pixel_values=more["pixel_values"], past_key_values=cache, attention_mask=mask)
        both = torch.cat([inputs["pixel_values"], more["pixel_values"]])
        full = model(torch.cat([longer, more["input_ids"]], 1), pixel_values=both)
        torch.testing.assert_close(turn.logits[0, -1], full.logits[0, -1], atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_beams_samples_and_lookup(model):
    inputs = batch(ROWS[:2])
    with mmkernels.prune(model, "vtc_cls", num_keep=5):
        greedy = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        beams = model.generate(**inputs, max_new_tokens=5, do_sample=False, num_beams=3, num_return_sequences=3)
        for i, row in enumerate(ROWS[:2]):
            alone = batch([row])
            alone["pixel_values"] = inputs["pixel_values"][:1] if i == 0 else inputs["pixel_values"][1:]
            one = model.generate(**alone, max_new_tokens=5, do_sample=False, num_beams=3, num_return_sequences=3)
            assert torch.equal(one[:, -5:], beams[3 * i : 3 * i + 3, -5:])
            looked_up = model.generate(**alone, max_new_tokens=5, do_sample=False, prompt_lookup_num_tokens=2)
            assert torch.equal(looked_up[0, -5:], greedy[i, -5:])


def test_labels_shrink_and_gradients_flow(model):
    inputs = batch(ROWS, side="right")
    labels = inputs["input_ids"].masked_fill((inputs["input_ids"] == IMAGE) | (inputs["attention_mask"] == 0), -100)
    model.zero_grad()
    with mmkernels.prune(model, "vtc_cls", num_keep=5) as handle:
        out = model(**inputs, labels=labels)
        out.loss.backward()
        kept = handle.kept
    gradient = model.model.multi_modal_projector.linear_1.weight.grad
    assert gradient.abs().max() > 0
    _, features = chosen_by_maps(model, inputs["pixel_values"], 5, 1)
    tokens = [model.model.multi_modal_projector(f[k]) for f, k in zip(features, kept, strict=True)]
    losses, used = [], 0
    for row in ROWS:
        logits = model(inputs_embeds=by_hand(model, row, tokens[used : used + row.count(PICTURE)])).logits[0]
        used += row.count(PICTURE)
        told = torch.tensor([t for part in row for t in ([-100] * 5 if part == PICTURE else [part])])
        losses.append(F.cross_entropy(logits[:-1], told[1:], ignore_index=-100, reduction="none")[told[1:] >= 0])
    torch.testing.assert_close(out.loss, torch.cat(losses).mean(), atol=1e-5, rtol=1e-5)
    model.zero_grad()


@torch.no_grad()
@pytest.mark.parametrize("policy", ["compact", "original"])
def test_merged_tokens_and_images_of_different_lengths(model, policy):
    inputs = batch(ROWS)
    _, features = chosen_by_maps(model, inputs["pixel_values"], 1, 1)
    prefix = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][:, :1]
    raw = [
        torch.cat([p, f[[9, 4, 2]]])[: 3 if i == 1 else 4]
        for i, (p, f) in enumerate(zip(prefix, features, strict=True))
    ]
    tokens = [model.model.multi_modal_projector(t) for t in raw]
    with mmkernels.prune(model, WithExtras(num_keep=4), position_policy=policy):
        logits = model(**inputs).logits
    places = [0, 9, 4, 4]
    positions = [*(1 + p for p in places[:3]), 17, *(18 + p for p in places), 34, 35, 36, 37]
    embeds = by_hand(model, ROWS[1], tokens[1:])
    given = torch.tensor([[0, *positions]]) if policy == "original" else None
    mask = torch.ones(embeds.shape[:2], dtype=torch.int64)
    expected = model(inputs_embeds=embeds, position_ids=given, attention_mask=mask).logits[0]
    torch.testing.assert_close(logits[1, -expected.shape[0] :], expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_copies_and_saved_models(model, tmp_path):
    inputs, stock = batch(ROWS), model(**batch(ROWS)).logits
    with mmkernels.prune(model, "vtc_cls", num_keep=5):
        pruned = model(**inputs).logits
        twin = copy.deepcopy(model)
        model.save_pretrained(tmp_path)
    assert torch.equal(twin(**inputs).logits, pruned)
    again = type(model).from_pretrained(tmp_path)
    assert again.config.architectures == ["LlavaForConditionalGeneration"]
    assert torch.equal(again(**inputs).logits, stock)
    assert torch.equal(model(**inputs).logits, stock)


def test_handles_come_off_in_reverse_order(model):
    kind, outer = type(model), mmkernels.prune(model, "vtc_cls", num_keep=5)
    inner = mmkernels.prune(model, "random", num_keep=4)
    with pytest.raises(ConfigError, match="reverse order"):
        outer.detach()
    inner.detach()
    assert model._pruning.choice.pruner is outer.pruner
    outer.detach()
    assert type(model) is kind
    with pytest.raises(ConfigError, match="each once"):
        outer.detach()


def test_what_cannot_be_pruned_says_so(model):
    inputs = batch(ROWS)
    with pytest.raises(ShapeError, match="at most the number of tokens, 16; got 17"):
        mmkernels.prune(model, "vtc_cls", num_keep=17)
    with pytest.raises(ConfigError, match="at most 3"):
        mmkernels.prune(model, "vtc_cls", num_keep=4, num_layers=4)
    with pytest.raises(ConfigError, match="probe or column or mean_query"):
        mmkernels.prune(llava("siglip"), "vtc_cls", num_keep=4)
    with pytest.raises(ConfigError, match="'vtc_cls'"):
        mmkernels.prune(model, "vtc_clss", num_keep=4)
    with pytest.raises(ConfigError, match="TokenPruner or a name; got int"):
        mmkernels.prune(model, 4)
    with pytest.raises(ConfigError, match="compact"):
        mmkernels.prune(model, "vtc_cls", num_keep=4, position_policy="compat")
    with pytest.raises(BackendError, match="placeholders can be shrunk; got LlamaModel"):
        mmkernels.prune(model.model.language_model, "vtc_cls", num_keep=4)
    wrong = llava("siglip", vision_feature_select_strategy="default")
    with (
        mmkernels.prune(wrong, "vtc_cls", num_keep=4, score_source="column"),
        pytest.raises(ConfigError, match="must be 'full'"),
    ):
        wrong(**inputs)
    with mmkernels.prune(model, "vtc_cls", num_keep=4):
        with pytest.raises(ShapeError, match="48 image placeholders"):
            model(**{**inputs, "pixel_values": inputs["pixel_values"], "input_ids": inputs["input_ids"].clamp(max=59)})
        with pytest.raises(ConfigError, match="padding mask"):
            model(**{**inputs, "attention_mask": torch.ones(3, 1, 9, 9)})
        with pytest.raises(ConfigError, match="able to grow"):
            model.generate(**inputs, max_new_tokens=2, cache_implementation="static")
        with pytest.raises(ConfigError, match="prefill_chunk_size must be left out"):
            model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=8)
        with pytest.raises(ConfigError, match="input_ids must be given with images"):
            model(inputs_embeds=torch.zeros(1, 3, 32), pixel_values=inputs["pixel_values"])


def test_narrow_strips_padding_and_counts_anew():
    keep = torch.tensor([[1, 1, 0, 1, 0, 1], [1, 1, 1, 1, 1, 1]]).bool()
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]]).bool()
    layout = narrow(keep, mask, torch.arange(6)[None], compact=True)
    assert layout.gather.tolist() == [[0, 1, 3, 5], [-1, 3, 4, 5]]
    assert layout.position_ids.tolist() == [[0, 1, 2, 3], [0, 3, 4, 5]]
    assert layout.mask.tolist() == [[True] * 4, [False, True, True, True]]
    assert layout.removed.tolist() == [[2], [0]]
    right = narrow(keep, mask.flip(1), torch.arange(6)[None], compact=False)
    assert right.gather.tolist() == [[0, 1, 3, 5], [0, 1, 2, -1]]
    assert layout.take(torch.tensor([[7] * 6] * 2), PAD)[1].tolist() == [PAD, 7, 7, 7]
    with pytest.raises(ShapeError, match="at most the 2 tokens"):
        ImageTokens(torch.zeros(3, 4), torch.arange(3), 2, torch.arange(3))


@torch.no_grad()
def test_models_that_accelerate_has_wrapped():
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model, inputs = llava(), batch(ROWS)
    stock = model(**inputs).logits
    with mmkernels.prune(model, "vtc_cls", num_keep=5):
        expected = model(**inputs).logits
    for part in (model, model.model.vision_tower, model.model.language_model.layers[1]):
        add_hook_to_module(part, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    with mmkernels.prune(model, "vtc_cls", num_keep=5):
        assert torch.equal(model(**inputs).logits, expected)
    with mmkernels.prune(model, "fastv", num_keep=5) as handle:
        assert model(**inputs).logits.shape[1] < stock.shape[1]
        assert [len(kept) for kept in handle.kept] == [5, 5]
    assert torch.equal(model(**inputs).logits, stock)
    other = llava()
    other.forward = other.forward
    with pytest.raises(ConfigError, match="Prune first"):
        mmkernels.prune(other, "vtc_cls", num_keep=5)
