"""mmkernels.prune on every family of models and with every pruner: tiles, prefixes, batches against single prompts."""

import copy

import pytest
import torch
from prune_by_hand import PICTURE, ROWS, by_hand, stitched
from transformers.modeling_outputs import BaseModelOutputWithPooling
from vlm_tiny import IMAGE, batch, llava, llava_next, paligemma

import mmkernels


@torch.no_grad()
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("scope", ["image", "global"])
def test_llava_next_keeps_newlines_and_order(scope, skip):
    model = llava_next()
    sizes = torch.tensor([[40, 64]])
    places = stitched(40, 64)
    assert len(places) == 16 + 4 * 7
    pixels = torch.randn(1, 3, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    row = [1, 2, *[IMAGE] * len(places), 5, 6]
    inputs = {"input_ids": torch.tensor([row]), "pixel_values": pixels, "image_sizes": sizes}
    stock = model(**inputs).logits
    with mmkernels.prune(model, "vtc_cls", keep_ratio=1.0, scope=scope):
        assert torch.equal(model(**inputs).logits, stock)
    with mmkernels.prune(model, "vtc_cls", num_keep=5, scope=scope, num_layers=2, skip_padding=skip) as handle:
        got = model(**inputs).logits
        kept = handle.kept[0]
        generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        uncached = model.generate(**inputs, max_new_tokens=4, do_sample=False, use_cache=False)
        assert torch.equal(generated, uncached)
    tower = copy.deepcopy(model.model.vision_tower)
    tower.set_attn_implementation("eager")
    out = tower(pixels[0], output_attentions=True, output_hidden_states=True)
    scores = sum(out.attentions[layer].mean(1)[:, 0, 1:] for layer in (1, 2))
    if skip:
        visible = {place for place in places if place is not None}
        for tile in range(3):
            for patch in range(16):
                if (tile, patch) not in visible:
                    scores[tile, patch] = -1
    if scope == "image":
        best = {(t, p) for t in range(3) for p in scores[t].argsort(descending=True)[:5].tolist()}
    else:
        best = {(i // 16, i % 16) for i in scores.flatten().argsort(descending=True)[:5].tolist()}
    stays = [place for place in places if place is None or place in best]
    assert kept.tolist() == [-1 if place is None else place[0] * 16 + place[1] for place in stays]
    features = out.hidden_states[-2][:, 1:]
    tokens = torch.stack(
        [
            model.model.image_newline if place is None else model.model.multi_modal_projector(features[place])
            for place in stays
        ]
    )
    expected = model(inputs_embeds=by_hand(model, [1, 2, PICTURE, 5, 6], [tokens])).logits
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_images_of_different_shapes_in_llava_next():
    model = llava_next(text_layers=4)
    sizes = torch.tensor([[40, 64], [64, 20], [32, 64]])
    places = [16 + 4 * 7, 16 + 8 * 3, 16 + 4 * 9]  # 4 x 6, 8 x 2 and 4 x 8 patches, a newline a row
    rows = [[1, 5, *[IMAGE] * places[0], 7, 8], [1, *[IMAGE] * places[1], 4, *[IMAGE] * places[2], 6], [1, 2, 3]]
    inputs = batch(rows) | {"image_sizes": sizes}
    inputs["pixel_values"] = torch.randn(3, 3, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    model(**inputs)  # the stock model agrees with these numbers
    asked = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    vision = mmkernels.get_pruner("vtc_cls", num_keep=5, scope="global")
    decoder = mmkernels.get_pruner("fastv", num_keep=6, layer=2)
    for pruner in (vision, decoder, [vision, decoder]):
        with mmkernels.prune(model, pruner):
            together = model.generate(**inputs, **asked)
            for i, (row, part) in enumerate(zip(rows, (slice(0, 1), slice(1, 3), slice(3, 3)), strict=True)):
                alone = batch([row])
                if part.stop > part.start:
                    alone |= {n: inputs[n][part] for n in ("pixel_values", "image_sizes")}
                out = model.generate(**alone, **asked)
                assert torch.equal(out.sequences[0, -3:], together.sequences[i, -3:])
                torch.testing.assert_close(out.logits[0][0], together.logits[0][i], atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_paligemma_reads_the_shorter_prompt_in_both_directions():
    model, row = paligemma(), [PICTURE, 1, 5, 6]
    inputs = batch([row])
    types = torch.tensor([[0] * 18 + [1]])
    with mmkernels.prune(model, "vtc_cls", num_keep=4, score_source="column", num_layers=1) as handle:
        got = model(**inputs, token_type_ids=types).logits
        generated = model.generate(**inputs, token_type_ids=types, max_new_tokens=4, do_sample=False)
        uncached = model.generate(**inputs, token_type_ids=types, max_new_tokens=4, do_sample=False, use_cache=False)
        assert torch.equal(generated, uncached)
        patches = handle.kept[0]
    features = model.model.vision_tower(inputs["pixel_values"]).last_hidden_state[0]
    embeds = by_hand(model, row, [model.model.multi_modal_projector(features[patches])])
    expected = model(inputs_embeds=embeds, token_type_ids=types[:, 12:]).logits
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", mmkernels.pruning.pruners())
@pytest.mark.parametrize("make", [llava, llava_next])  # 4 decoder layers, for three drops
def test_every_pruner_generates_the_same_in_a_batch_and_alone(name, make):
    options = {"prumerge": {}, "pyramiddrop": {}, "tome": {"num_keep": 8}}.get(name, {"num_keep": 6})
    options |= {"visionzip": {"num_keep": 6, "contextual": 2}}.get(name, {})
    model, rows = make(text_layers=4), [[1, 5, PICTURE, 7, 8, 9], [1, PICTURE, 6, 3]]
    tokens = 16 if make is llava else 16 + 4 * 7
    inputs = batch(rows, tokens=tokens)
    if make is llava_next:
        inputs["pixel_values"] = torch.randn(2, 3, 3, 32, 32, generator=torch.Generator().manual_seed(2))
        inputs["image_sizes"] = torch.tensor([[40, 64]] * 2)
    asked = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with mmkernels.prune(model, name, **options, skip_padding=name != "tome"):
        together = model.generate(**inputs, **asked)
        lengths = {layer.keys.shape[2] for layer in together.past_key_values.layers}
        assert min(lengths) < inputs["input_ids"].shape[1]
        for i, row in enumerate(rows):
            alone = batch([row], tokens=tokens)
            for part in ("pixel_values", "image_sizes"):
                if part in inputs:
                    alone[part] = inputs[part][i : i + 1]
            out = model.generate(**alone, **asked)
            assert torch.equal(out.sequences[0, -3:], together.sequences[i, -3:])
            torch.testing.assert_close(out.logits[0][0], together.logits[0][i], atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_a_modality_mutual_model_reads_the_question_into_the_tokens_that_stay():
    model = mmkernels.interop.make_modality_mutual(llava(), image_token_id=IMAGE, prompt_end_token_id=9)
    inputs = batch(ROWS[:1])
    with mmkernels.prune(model, "vtc_cls", num_keep=5) as handle:
        got, kept = model(**inputs).logits, handle.kept[0]
    features = model.model.get_image_features(inputs["pixel_values"]).pooler_output[0][kept]
    encoded = {"image": BaseModelOutputWithPooling(pooler_output=[features])}
    short = torch.tensor([[1, 5, *[IMAGE] * 5, 7, 8, 9]])
    assert torch.equal(got, model(short, mm_encoder_outputs=encoded).logits)
    embeds = by_hand(model, ROWS[0], [features])
    assert (got - model(inputs_embeds=embeds).logits).abs().max() > 1e-3  # causal attention says something else
