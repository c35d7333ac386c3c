"""The vision tower under mmkernels.prune: where it stops, what it records, what it never makes, who else uses it."""

import copy
import threading

import pytest
import torch
from prune_by_hand import PICTURE, ROWS, by_hand, merged_by_hand
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPVisionConfig, CLIPVisionModel, Dinov2WithRegistersConfig
from vlm_tiny import PIXELS, SIZES, batch, llava, paligemma, stir

import mmkernels
from mmkernels.interop import prune_mlp
from mmkernels.interop.prune_tower import vit
from mmkernels.pruning.pruner import Tap


@pytest.fixture(scope="module")
def model():
    return llava()


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


def dinov2():
    """LLaVA around a tower with [CLS], two registers, and other names."""
    sizes = {k: v for k, v in SIZES.items() if k != "intermediate_size"}
    vision = Dinov2WithRegistersConfig(**sizes, **PIXELS, num_register_tokens=2)
    stock = llava()
    config = stock.config.to_dict() | {"vision_config": vision, "vision_feature_select_strategy": "full"}
    return stir(type(stock)(type(stock.config)(**config)))


@torch.no_grad()
def test_a_tower_with_registers_and_other_names():
    model = dinov2()
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
def test_tome_in_a_tower_that_ends_in_its_norm():
    model, inputs = paligemma(), batch([[PICTURE, 1, 5, 6]])
    types = torch.zeros_like(inputs["input_ids"])
    stock = model(**inputs, token_type_ids=types).logits
    with mmkernels.prune(model, "tome", keep_ratio=1.0):
        assert torch.equal(model(**inputs, token_type_ids=types).logits, stock)
    with mmkernels.prune(model, "tome", num_keep=10):
        assert model(**inputs, token_type_ids=types).logits.shape[1] == stock.shape[1] - 6


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


class Wide(TorchDispatchMode):
    """Which operations make new tensors of at least so many numbers."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.made = numel, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.numel() >= self.numel and t.untyped_storage().data_ptr() not in given:
                self.made.append(func.overloadpacket.__name__)
        return out


@torch.no_grad()
@pytest.mark.parametrize("make", [llava, lambda: llava("siglip"), dinov2], ids=["clip", "siglip", "dinov2"])
def test_activations_overwrite_their_inputs_and_change_no_bit(make, monkeypatch):
    """The first projection alone makes tensors as wide as the MLP; the tower is stock again afterwards."""
    monkeypatch.setattr(prune_mlp, "_PART", 64)
    module = make().model.vision_tower
    tower, pixels = vit(module), batch(ROWS)["pixel_values"]
    stock, layer = module(pixels, output_hidden_states=True).hidden_states[-2], len(tower.layers) - 2
    wide = 16 * len(pixels) * tower.layers[0].mlp.fc1.out_features
    with Wide(wide) as seen:
        got = tower.run(pixels, num_tokens=16, layers=(layer,), taps=(Tap(1, "column"),)).hidden[layer]
    assert torch.equal(got, stock)
    assert seen.made == ["addmm"] * (layer + 1)
    with Wide(wide) as seen:
        module(pixels)
    assert len(seen.made) > 4
    activations = [layer.mlp.activation_fn for layer in tower.layers]
    assert not any(act._forward_hooks or act._forward_pre_hooks for act in activations)


def test_activations_are_left_alone_where_somebody_would_notice(model, monkeypatch):
    monkeypatch.setattr(prune_mlp, "_PART", 64)
    tower, pixels, seen = vit(model.model.vision_tower), batch(ROWS)["pixel_values"], []
    fc1 = tower.layers[1].mlp.fc1

    def gradient():
        model.zero_grad()
        tower.run(pixels, num_tokens=16, layers=(2,)).hidden[2].square().sum().backward()
        return fc1.weight.grad.clone()

    with monkeypatch.context() as patch:
        patch.setattr(prune_mlp, "_PART", 1 << 20)
        expected = gradient()
    assert torch.equal(gradient(), expected)
    model.zero_grad()
    hook = fc1.register_forward_hook(lambda module, args, output: seen.append((output, output.clone())))
    with torch.no_grad():
        tower.run(pixels, num_tokens=16, layers=(2,))
    hook.remove()
    assert torch.equal(*seen[0])  # nobody wrote over what a hook has taken
