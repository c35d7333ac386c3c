"""Pruners between decoder layers: against a decoder written out with full attention maps and lists of keys."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from prune_by_hand import PICTURE, ROWS, Slow, embeddings
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn import functional as F
from transformers import Qwen3Config
from transformers.integrations import flex_attention
from vlm_tiny import IMAGE, TEXT, batch, llava, paligemma, stir

import mmkernels
import mmkernels.interop.mma_halves  # registers mmkernels_mma
from mmkernels.errors import BackendError, ConfigError, ShapeError
from mmkernels.pruning.pruner import DecoderPruner, Extras

LAYERS = 4


@pytest.fixture(scope="module")
def model():
    return llava(text_layers=LAYERS)


PRUNERS = {
    "fastv": ({"num_keep": 5, "layer": 2}, {2: (1, lambda n: 5)}, False),
    "fastv_ratio": ({"keep_ratio": 0.25, "layer": 1}, {1: (0, lambda n: n // 4)}, False),
    "fastv_compact": (
        {"num_keep": 5, "layer": 2, "position_policy": "compact"},
        {2: (1, lambda n: 5)},
        True,
    ),
    "pyramiddrop_original": (
        {"position_policy": "original"},
        {1: (1, lambda n: n // 2), 2: (2, lambda n: n // 4), 3: (3, lambda n: n // 8)},
        False,
    ),
    "pyramiddrop": ({}, {1: (1, lambda n: n // 2), 2: (2, lambda n: n // 4), 3: (3, lambda n: n // 8)}, True),
}


@torch.no_grad()
@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_prefill_and_decoding_equal_the_decoder_written_out(name, kind):
    if kind == "qwen3":
        text = Qwen3Config(**{**TEXT, "num_hidden_layers": LAYERS, "head_dim": 8})
        model = stir(type(llava())(llava().config.__class__(**{**llava().config.to_dict(), "text_config": text})))
    else:
        model = llava(text_layers=LAYERS)
    options, drops, compact = PRUNERS[name]
    inputs, used = batch(ROWS), 0
    with mmkernels.prune(model, name.split("_")[0], **options):
        made = model.generate(
            **inputs, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    lengths = [layer.keys.shape[2] for layer in made.past_key_values.layers]
    assert lengths[0] == inputs["input_ids"].shape[1] + 3
    assert lengths[-1] < lengths[0]
    for i, row in enumerate(ROWS):
        pixels = inputs["pixel_values"][used : used + row.count(PICTURE)]
        used += row.count(PICTURE)
        x, visual = embeddings(model, row, pixels)
        slow = Slow(model, drops if any(visual) else {}, compact)
        logits = [slow.run(x, range(len(x)), visual, last=len(x) - 1)[-1]]
        new = made.sequences[i, -4:]
        for token in new[:-1]:
            logits.append(slow.run(model.get_input_embeddings()(token[None]), [0], None)[-1])
        got = torch.stack([step[i] for step in made.logits])
        torch.testing.assert_close(got, torch.stack(logits), atol=5e-5, rtol=1e-3)


@torch.no_grad()
def test_keeping_every_token_changes_no_bit(model):
    inputs, kind = batch(ROWS), type(model)
    stock = model(**inputs).logits
    with mmkernels.prune(model, "fastv", keep_ratio=1.0):
        assert torch.equal(model(**inputs).logits, stock)
        text = {name: inputs[name][2:, -4:] for name in ("input_ids", "attention_mask")}
        alone = model(**text).logits
    assert type(model) is kind
    assert torch.equal(model(**text).logits, alone)
    assert not any(layer._forward_pre_hooks for layer in model.model.language_model.layers)


@torch.no_grad()
@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "sparsevlm"])
@pytest.mark.parametrize("implementation", ["eager", "mmkernels_mma", "flex_attention"])
def test_every_attention_implementation(name, implementation):
    """Flex attention as written: compiled, torch 2.13 cannot build it for the second token on CPU, pruned or not."""
    model, inputs, options = llava(text_layers=LAYERS), batch(ROWS), {} if name == "pyramiddrop" else {"num_keep": 9}
    asked = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with mmkernels.prune(model, name, **options), torch.compiler.set_stance("force_eager"):
        expected = model.generate(**inputs, **asked)
        model.model.language_model.set_attn_implementation(implementation)
        assert model.model.language_model.config._attn_implementation == implementation
        got = model.generate(**inputs, **asked)
    for a, b in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("name", ["fastv", "vtc_cls"])
def test_attention_that_does_not_compile_names_another(monkeypatch, name):
    model, inputs = llava(text_layers=LAYERS), batch(ROWS)
    model.model.language_model.set_attn_implementation("flex_attention")

    def fails(*args, **kwargs):
        raise BackendCompilerFailed(fails, RuntimeError("was not declared in this scope"), None)

    monkeypatch.setattr(flex_attention, "compile_friendly_flex_attention", fails)
    with (
        mmkernels.prune(model, name, num_keep=4),
        torch.compiler.set_stance("force_eager"),
        pytest.raises(BackendError, match=r"flex_attention must compile; .*set_attn_implementation\('sdpa'\)"),
    ):
        model(**inputs)


@torch.no_grad()
def test_a_conversation_goes_on(model):
    inputs = batch(ROWS[:1])
    with mmkernels.prune(model, "fastv", num_keep=4):
        first = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        cache, ids = first.past_key_values, first.sequences
        more = torch.cat([ids, torch.tensor([[7, 8]])], 1)
        mask = torch.ones_like(more)
        one = model(more[:, -3:], past_key_values=copy.deepcopy(cache), attention_mask=mask).logits[0, -1]
        step = copy.deepcopy(cache)
        for t in range(3, 0, -1):
            end = more.shape[1] - t + 1
            logits = model(more[:, end - 1 : end], past_key_values=step, attention_mask=mask[:, :end]).logits[0, -1]
        torch.testing.assert_close(one, logits, atol=2e-5, rtol=1e-4)
        again = model.generate(
            more,
            past_key_values=cache,
            max_new_tokens=2,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        torch.testing.assert_close(again.logits[0][0], one, atol=2e-5, rtol=1e-4)
        with pytest.raises(ConfigError, match="with a new cache"):
            model(**batch([[4, PICTURE]]), past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "sparsevlm"])
def test_beams_and_lookup(model, name):
    inputs, asked = batch(ROWS[:2]), {"max_new_tokens": 5, "do_sample": False}
    alone = batch(ROWS[:1]) | {"pixel_values": inputs["pixel_values"][:1]}
    with mmkernels.prune(model, name, **({} if name == "pyramiddrop" else {"num_keep": 12})):
        greedy, looked_up = (
            model.generate(**alone, **asked, **o)[0, -5:] for o in ({}, {"prompt_lookup_num_tokens": 2})
        )
        assert torch.equal(greedy, looked_up)
        beams = model.generate(**inputs, **asked, num_beams=3)
        assert torch.equal(model.generate(**alone, **asked, num_beams=3)[0, -5:], beams[0, -5:])


def test_labels_of_the_tokens_that_reach_the_end(model):
    inputs = batch(ROWS[:1], side="right")
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[0, -2:] = inputs["input_ids"][0, -2:]
    model.zero_grad()
    with mmkernels.prune(model, "fastv", num_keep=5, layer=2):
        out = model(**inputs, labels=labels)
        out.loss.backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().max() > 0
    model.zero_grad()
    with torch.no_grad():
        x, visual = embeddings(model, ROWS[0], inputs["pixel_values"])
        slow = Slow(model, PRUNERS["fastv"][1], False)
        logits = slow.run(x, range(len(x)), visual, last=len(x) - 3)  # the token in front of the answer chooses
        assert len(logits) == len(x) - 11
        expected = F.cross_entropy(logits[-3:-1], labels[0, -2:])
    torch.testing.assert_close(out.loss.detach(), expected, atol=1e-5, rtol=1e-4)


@dataclass(frozen=True, kw_only=True, repr=False)
class Merging(DecoderPruner):
    """Drops all but the first two visual tokens before layer 2, and puts the mean of the dropped behind them."""

    name: ClassVar[str] = "merging"
    position_policy: ClassVar = "compact"

    def drop_layers(self, num_layers):
        return {2: 1}

    def keep(self, step):
        return ~(step.is_visual & step.mask) | (step.is_visual.cumsum(1) <= 2)

    def merged(self, step, keep):
        gone = ~keep & step.mask
        some = gone.any(1, keepdim=True)
        mean = (step.hidden_states * gone[..., None]).sum(1) / gone.sum(1, keepdim=True).clamp(min=1)
        return Extras(mean[:, None], some, gone.sum(1, keepdim=True).float())


@torch.no_grad()
def test_merged_tokens_stand_behind_those_that_stay(model):
    inputs = batch(ROWS)
    with mmkernels.prune(model, Merging(num_keep=2)):
        got = model(**inputs, use_cache=True)
        step = model(
            torch.tensor([[11]] * 3),
            past_key_values=got.past_key_values,
            attention_mask=F.pad(inputs["attention_mask"], (0, 1), value=1),
            position_ids=inputs["attention_mask"].sum(1, keepdim=True),
        ).logits
    hidden = model(**inputs, output_hidden_states=True).hidden_states[2]
    decoder = model.model.language_model
    for i, row in enumerate(ROWS):
        length = len(row) + 15 * row.count(PICTURE)
        own, ids = hidden[i, -length:], inputs["input_ids"][i, -length:]
        places = (ids == IMAGE).nonzero()[:, 0].tolist()
        if places:
            own = torch.cat(
                [
                    own[: places[2]],
                    own[places[2:]].mean(0)[None],
                    own[[c for c in range(places[2], length) if c not in places]],
                ]
            )
        late = copy.deepcopy(decoder)
        late.layers = decoder.layers[2:]
        late.config.num_hidden_layers = 2
        expected = model.lm_head(late(inputs_embeds=own[None], use_cache=False).last_hidden_state)[0]
        torch.testing.assert_close(got.logits[i, -len(own) :], expected, atol=5e-5, rtol=1e-3)
    assert step.shape == (3, 1, 64)


def test_what_cannot_drop_says_so(model):
    inputs = batch(ROWS)
    with pytest.raises(BackendError, match="lets images read"):
        mmkernels.prune(paligemma(), "fastv", num_keep=4)
    mutual = mmkernels.interop.make_modality_mutual(llava(), image_token_id=IMAGE)
    with pytest.raises(BackendError, match="lets images read"):
        mmkernels.prune(mutual, "fastv", num_keep=4)
    with pytest.raises(ShapeError, match=r"layer must be rising numbers in 1 \.\. 3"):
        mmkernels.prune(model, "fastv", num_keep=4, layer=4)
    mistral = llava(text_layers=2)
    mistral.model.language_model.config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(BackendError, match="full attention in every layer"):
        mmkernels.prune(mistral, "fastv", num_keep=4, layer=1)
    with mmkernels.prune(model, "fastv", num_keep=4):
        with pytest.raises(ConfigError, match="prefill_chunk_size must be left out"):
            model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=8)
        model.train()
        model.gradient_checkpointing_enable()
        with pytest.raises(ConfigError, match="gradient checkpointing must be off"):
            model(**inputs)
        model.gradient_checkpointing_disable()
        model.eval()


@torch.no_grad()
def test_sparsevlm_plus_keeps_what_whole_maps_say(model):
    """Raters of the input embeddings, maps of the layer that has run, attention freed from distance."""
    row = [1, 5, PICTURE, 7, 8, 9, 3, 4]
    inputs = batch([row])
    with mmkernels.prune(model, "sparsevlm_plus", kept=(5,), layers=(2,), heads=2) as handle:
        model(**inputs)
        kept = handle.kept[0].tolist()
    x, visual = embeddings(model, row, inputs["pixel_values"])
    images, text = range(2, 18), torch.arange(18, len(x))
    assert visual == [c in images for c in range(len(x))]
    relation = (x[2:18] @ x[text].T).softmax(-1).mean(0)
    raters = text[relation > relation.mean()].tolist()
    assert 0 < len(raters) < len(text)
    decoder = copy.deepcopy(model.model.language_model)
    decoder.set_attn_implementation("eager")
    maps = decoder(inputs_embeds=x[None], output_attentions=True).attentions[1][0]
    turns = 10000 ** (-torch.arange(4) / 4)
    freed = torch.zeros(4, len(raters), 16)
    for r, i in enumerate(raters):
        for v, j in enumerate(images):
            freed[:, r, v] = maps[:, i, j] / (2 * ((i - j) * turns).cos().sum() / 8**0.5)
    heads = freed.sum((1, 2)).argsort(descending=True)[:2]
    assert kept == sorted(freed[heads].mean((0, 1)).argsort(descending=True)[:5].tolist())
    plain = maps[:, raters, 2:18].mean((0, 1)).argsort(descending=True)[:5]
    assert kept != sorted(plain.tolist())  # what SparseVLM would keep
