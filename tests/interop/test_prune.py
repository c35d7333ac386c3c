"""mmkernels.prune at the vision side: against eager attention maps and prompts put together by hand."""

import copy
import threading

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPVisionConfig, CLIPVisionModel, Dinov2WithRegistersConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from vlm_tiny import IMAGE, PAD, PIXELS, SIZES, batch, llava, llava_next, paligemma, stir

import mmkernels
from mmkernels.errors import BackendError, ConfigError, ShapeError
from mmkernels.interop.prune_layout import ImageTokens, narrow
from mmkernels.interop.prune_tower import vit
from mmkernels.pruning.pruner import Pruned, Tap, TokenPruner

PICTURE = "<image>"
ROWS = [[1, 5, PICTURE, 7, 8, 9], [1, PICTURE, 4, PICTURE, 6, 3, 3, 2], [1, 2, 3, 4]]


@pytest.fixture(scope="module")
def model():
    return llava()


def chosen_by_maps(model, pixels, keep, layers):
    """VTC-CLS by the letter: all attention maps, rows of [CLS], sum over layers, sorted top-k."""
    tower = copy.deepcopy(model.model.vision_tower)
    tower.set_attn_implementation("eager")
    out = tower(pixels, output_attentions=True, output_hidden_states=True)
    last = len(out.attentions) + model.config.vision_feature_layer
    scores = sum(out.attentions[layer].mean(1)[:, 0, 1:] for layer in range(last - layers + 1, last + 1))
    kept = [sorted(row.argsort(descending=True)[:keep].tolist()) for row in scores]
    return kept, out.hidden_states[model.config.vision_feature_layer][:, 1:]


def by_hand(model, row, images):
    """Embeddings of one prompt, with (tokens, dim) in the place of each image."""
    table, parts, images = model.get_input_embeddings(), [], list(images)
    for part in row:
        parts.append(images.pop(0) if part == PICTURE else table(torch.tensor([part])))
    return torch.cat(parts)[None]


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
def test_the_tower_stops_and_keeps_its_attention(model):
    calls, tower = [], model.model.vision_tower
    hooks = [
        layer.register_forward_hook(lambda *_, i=i: calls.append(i)) for i, layer in enumerate(tower.encoder.layers)
    ]
    with mmkernels.prune(model, "vtc_cls", num_keep=5, num_layers=3):
        model(**batch(ROWS[:1]))
    for hook in hooks:
        hook.remove()
    assert calls == [0, 1, 2]
    seen = vit(tower).run(batch(ROWS)["pixel_values"], num_tokens=16, layers=(2,))
    assert torch.equal(seen.hidden[2], tower(batch(ROWS)["pixel_values"], output_hidden_states=True).hidden_states[-2])
    assert not any(at.query._forward_hooks or at.key._forward_hooks for at in vit(tower).projections)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = out if isinstance(out, tuple | list) else [out]
        self.numel = max([self.numel, *(t.numel() for t in made if isinstance(t, torch.Tensor))])
        return out


@torch.no_grad()
@pytest.mark.parametrize("name", ["vtc_cls", "hiprune", "visionzip"])
def test_no_map_of_attention_is_ever_made(name):
    """256 patches: a map of 4 heads has 4 x 257 x 257 numbers, everything else of the tower fewer."""
    vision = CLIPVisionConfig(**SIZES, image_size=64, patch_size=4)
    model = CLIPVisionModel(vision).eval()
    tower, pixels = vit(model), torch.randn(1, 3, 64, 64)
    pruner = mmkernels.get_pruner(name, num_keep=40)
    taps = pruner.taps(tower.encoder(2, (16, 16)))
    with Largest() as seen:
        tower.run(pixels, num_tokens=256, layers=(2,), taps=taps)
    assert seen.numel <= 257 * 64 < 4 * 257 * 257
    model.set_attn_implementation("eager")
    with Largest() as seen:
        model(pixels, output_attentions=True)
    assert seen.numel == 4 * 257 * 257


@torch.no_grad()
@pytest.mark.parametrize("what", ["cls_row", "column", "mean_query_row", "keys", "cls_query"])
def test_taps_are_rows_of_the_maps(model, what):
    tower, pixels = model.model.vision_tower, batch(ROWS)["pixel_values"]
    tap = Tap(1, what)
    got = vit(tower).run(pixels, num_tokens=16, layers=(2,), taps=(tap,)).taps[tap]
    eager = copy.deepcopy(tower)
    eager.set_attn_implementation("eager")
    out = eager(pixels, output_attentions=True, output_hidden_states=True)
    at = eager.encoder.layers[1]
    normed = at.layer_norm1(out.hidden_states[1])
    q, k = (p(normed).unflatten(-1, (4, 8)) for p in (at.self_attn.q_proj, at.self_attn.k_proj))
    maps = out.attentions[1].mean(1)
    mean = torch.einsum("nhd,nkhd->nhk", q.mean(1), k).mul(8**-0.5).softmax(-1).mean(1)[:, 1:]
    expected = {
        "cls_row": maps[:, 0, 1:],
        "column": maps.mean(1)[:, 1:],
        "mean_query_row": mean,
        "keys": k,
        "cls_query": q[:, 0],
    }
    torch.testing.assert_close(got, expected[what], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_probe_of_a_pooling_head():
    model = llava("siglip")
    tower, pixels, tap = model.model.vision_tower, batch(ROWS)["pixel_values"], Tap(3, "probe_row")
    got = vit(tower).run(pixels, num_tokens=16, layers=(2,), taps=(tap,)).taps[tap]
    last = tower(pixels).last_hidden_state
    _, row = tower.head.attention(tower.head.probe.expand(3, -1, -1), last, last, average_attn_weights=True)
    torch.testing.assert_close(got, row[:, 0], atol=1e-5, rtol=1e-4)
    with mmkernels.prune(model, "vtc_cls", num_keep=4, score_source="probe") as handle:
        model(**batch(ROWS))
        assert [k.tolist() for k in handle.kept] == [sorted(r.argsort(descending=True)[:4].tolist()) for r in row[:, 0]]


class WithExtras(TokenPruner):
    """Tokens out of order, one of no patch at each end, fewer of them for the second image."""

    name = "with_extras"

    def __call__(self, inputs):
        images = inputs.features.shape[0]
        indices = torch.tensor([[-1, 9, 4, -1]]).repeat(images, 1)
        mask = torch.ones_like(indices, dtype=torch.bool)
        mask[1:2, 3] = False
        tokens = inputs.features[:, [0, 9, 4, 2]] * mask[..., None]
        tokens[:, 0] = inputs.prefix[:, 0]
        return Pruned(tokens, indices, mask)


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


def stitched(height, width):
    """LLaVA-NeXT's rule for an image in two 4 x 4 tiles side by side: (tile, patch) of each place, None at newlines."""
    inside = min(8, int(round(width * 4 / height, 7)))
    margin = (8 - inside) // 2
    base = [(0, p) for p in range(16)]
    rows = [[*((1 + x // 4, y * 4 + x % 4) for x in range(margin, 8 - margin)), None] for y in range(4)]
    return base + [place for row in rows for place in row]


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


def merged_by_hand(tower, pixels, counts):
    """ToMe in loops: one image, `counts[l]` merges in layer l, the last layers left out."""
    x = tower(pixels, output_hidden_states=True).hidden_states[0][0]
    sizes = torch.ones(len(x))
    for layer, r in zip(tower.encoder.layers, counts, strict=False):
        at, normed = layer.self_attn, layer.layer_norm1(x)
        q, k, v = (p(normed).unflatten(-1, (4, 8)) for p in (at.q_proj, at.k_proj, at.v_proj))
        weights = (torch.einsum("qhd,khd->hqk", q, k) * 8**-0.5 + sizes.log()).softmax(-1)
        x = x + at.out_proj(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
        metric = F.normalize(k.mean(1), dim=-1)
        evens, odds = range(2, len(x), 2), range(1, len(x), 2)  # [CLS] is at an even place, and protected
        links = []
        for a in evens:
            best = max(odds, key=lambda b: float(metric[a] @ metric[b]))
            links.append((float(metric[a] @ metric[best]), a, best))
        gone = sorted(links, reverse=True)[:r]
        sums, total = x * sizes[:, None], sizes.clone()
        for _, a, b in gone:
            sums[b] += sums[a]
            total[b] += total[a]
        stay = [i for i in range(len(x)) if i not in {a for _, a, _ in gone}]
        x, sizes = (sums / total[:, None])[stay], total[stay]
        x = x + layer.mlp(layer.layer_norm2(x))
    return x[1:]


@torch.no_grad()
def test_a_tower_with_registers_and_other_names():
    sizes = {k: v for k, v in SIZES.items() if k != "intermediate_size"}
    vision = Dinov2WithRegistersConfig(**sizes, **PIXELS, num_register_tokens=2)
    stock = llava()
    config = stock.config.to_dict() | {"vision_config": vision, "vision_feature_select_strategy": "full"}
    model = stir(type(stock)(type(stock.config)(**config)))
    inputs = batch([[1, 5, PICTURE, 7]], tokens=19)  # [CLS] and both registers are handed on
    whole = model(**inputs).logits
    with mmkernels.prune(model, "vtc_cls", num_keep=16, num_layers=2):
        assert torch.equal(model(**inputs).logits, whole)
    with mmkernels.prune(model, "vtc_cls", num_keep=4, num_layers=2) as handle:
        got = model(**inputs).logits
        kept = handle.kept[0]
    tower = model.model.vision_tower
    tower.set_attn_implementation("eager")
    out = tower(inputs["pixel_values"], output_attentions=True, output_hidden_states=True)
    scores = sum(out.attentions[layer].mean(1)[0, 0, 3:] for layer in (0, 1))
    best = sorted(scores.argsort(descending=True)[:4].tolist())
    assert kept.tolist() == [-1, -1, -1, *best]
    features = out.hidden_states[-2][0][[0, 1, 2, *(3 + p for p in best)]]
    expected = model(inputs_embeds=by_hand(model, [1, 5, PICTURE, 7], [model.model.multi_modal_projector(features)]))
    torch.testing.assert_close(got, expected.logits, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_tome_merges_inside_the_tower(model):
    inputs, row = batch(ROWS), ROWS[0]
    stock = model(**inputs).logits
    with mmkernels.prune(model, "tome", keep_ratio=1.0):
        assert torch.equal(model(**inputs).logits, stock)
    with mmkernels.prune(model, "tome", num_keep=7) as handle:
        got = model(**inputs).logits
        assert len(handle.kept[0]) == 7
    left = merged_by_hand(model.model.vision_tower, inputs["pixel_values"][:1], (3, 3, 3))
    expected = model(inputs_embeds=by_hand(model, row, [model.model.multi_modal_projector(left)])).logits[0]
    torch.testing.assert_close(got[0, -expected.shape[0] :], expected, atol=5e-5, rtol=1e-3)


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
    for name, options in (("vtc_cls", {"num_keep": 5, "scope": "global"}), ("fastv", {"num_keep": 6, "layer": 2})):
        with mmkernels.prune(model, name, **options):
            together = model.generate(**inputs, **asked)
            for i, (row, part) in enumerate(zip(rows, (slice(0, 1), slice(1, 3), slice(3, 3)), strict=True)):
                alone = batch([row])
                if part.stop > part.start:
                    alone |= {n: inputs[n][part] for n in ("pixel_values", "image_sizes")}
                out = model.generate(**alone, **asked)
                assert torch.equal(out.sequences[0, -3:], together.sequences[i, -3:])
                torch.testing.assert_close(out.logits[0][0], together.logits[0][i], atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_tome_in_a_tower_that_ends_in_its_norm():
    model, inputs = paligemma(), batch([[PICTURE, 1, 5, 6]])
    types = torch.zeros_like(inputs["input_ids"])
    stock = model(**inputs, token_type_ids=types).logits
    with mmkernels.prune(model, "tome", keep_ratio=1.0):
        assert torch.equal(model(**inputs, token_type_ids=types).logits, stock)
    with mmkernels.prune(model, "tome", num_keep=10):
        assert model(**inputs, token_type_ids=types).logits.shape[1] == stock.shape[1] - 6


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


@torch.no_grad()
def test_another_thread_may_use_the_tower_meanwhile(model):
    tower, pixels, seen = model.model.vision_tower, batch(ROWS)["pixel_values"], []
    alone = tower(pixels).last_hidden_state

    def meanwhile(*_):
        hook.remove()
        other = threading.Thread(target=lambda: seen.append(tower(pixels).last_hidden_state))
        other.start()
        other.join()

    hook = tower.encoder.layers[0].register_forward_hook(meanwhile)
    taps = (Tap(1, "cls_row"),)
    run = vit(tower).run(pixels, num_tokens=16, layers=(2,), taps=taps)
    assert torch.allclose(seen[0], alone)  # it went on behind layer 2, and nobody took its queries
    assert torch.equal(run.taps[taps[0]], vit(tower).run(pixels, num_tokens=16, layers=(2,), taps=taps).taps[taps[0]])
