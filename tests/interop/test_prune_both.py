"""A pruner of the vision side and one of the decoder at once: against attention maps and a decoder written out."""

import pytest
import torch
from prune_by_hand import PICTURE, ROWS, Slow, by_hand, chosen_by_maps
from torch.nn import functional as F
from vlm_tiny import batch, llava, paligemma

import mmkernels
from mmkernels import get_pruner
from mmkernels.errors import BackendError, ConfigError, ShapeError

LEFT = 8  # tokens of each image that the vision side leaves
DECODERS = {
    "fastv": ({"num_keep": 5, "layer": 2}, {2: (1, lambda n: 5)}, False),
    "pyramiddrop": ({}, {1: (1, lambda n: n // 2), 2: (2, lambda n: n // 4), 3: (3, lambda n: n // 8)}, True),
}
ASKED = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}


@pytest.fixture(scope="module")
def model():
    return llava(text_layers=4)


def sides(name="fastv"):
    return get_pruner("vtc_cls", num_keep=LEFT, num_layers=2), get_pruner(name, **DECODERS[name][0])


def narrowed(model, pixels):
    """The patches that VTC-CLS keeps of each image, and their projected features."""
    kept, features = chosen_by_maps(model, pixels, LEFT, 2)
    return kept, [model.model.multi_modal_projector(f[k]) for f, k in zip(features, kept, strict=True)]


@torch.no_grad()
@pytest.mark.parametrize("spread", ["compact", "original"])
@pytest.mark.parametrize("name", DECODERS)
def test_both_sides_are_both_by_hand(model, name, spread):
    """Generated logits of a batch, and which of the whole images' tokens reach the end."""
    inputs, (vision, decoder) = batch(ROWS), sides(name)
    _, drops, compact = DECODERS[name]
    patches, tokens = narrowed(model, inputs["pixel_values"])
    with mmkernels.prune(model, vision, position_policy=spread), mmkernels.prune(model, decoder) as handle:
        made = model.generate(**inputs, **ASKED)
        kept = list(handle.kept)
    for i, row in enumerate(ROWS):
        count = row.count(PICTURE)
        own, patches, images, tokens = patches[:count], patches[count:], tokens[:count], tokens[count:]
        x = by_hand(model, row, images)[0]
        visual = [part == PICTURE for part in row for _ in range(LEFT if part == PICTURE else 1)]
        positions = places(row, own) if spread == "original" else range(len(x))
        slow = Slow(model, drops if count else {}, compact, gone=(16 - LEFT) * count if spread == "original" else 0)
        logits = [slow.run(x, positions, visual, last=len(x) - 1)[-1]]
        if count:
            order = [16 * k + patch for k, image in enumerate(own) for patch in image]
            stays = [c for c in slow.columns if visual[c]]
            assert kept.pop(0).tolist() == [order[sum(visual[:c])] for c in stays]
        for token in made.sequences[i, -3:-1]:
            logits.append(slow.run(model.get_input_embeddings()(token[None]), [0], None)[-1])
        got = torch.stack([step[i] for step in made.logits])
        torch.testing.assert_close(got, torch.stack(logits), atol=5e-5, rtol=1e-3)
    assert not kept


def places(row, patches):
    """The positions that tokens had before any went."""
    positions, first, waiting = [], 0, list(patches)
    for part in row:
        positions += [first + patch for patch in waiting.pop(0)] if part == PICTURE else [first]
        first += 16 if part == PICTURE else 1
    return positions


@torch.no_grad()
def test_any_order_is_the_same_and_comes_off_bit_for_bit(model):
    inputs, kind, (vision, decoder) = batch(ROWS), type(model), sides()
    stock = model(**inputs).logits
    with mmkernels.prune(model, [vision, decoder]) as handle:
        both = model(**inputs).logits
        assert handle.pruner == (vision, decoder)
    with mmkernels.prune(model, [decoder, vision]):
        assert torch.equal(model(**inputs).logits, both)
    for outer, inner in ((vision, decoder), (decoder, vision)):
        with mmkernels.prune(model, outer):
            alone = model(**inputs).logits
            with mmkernels.prune(model, inner):
                assert torch.equal(model(**inputs).logits, both)
            assert torch.equal(model(**inputs).logits, alone)
    assert type(model) is kind
    assert "_pruning" not in model.__dict__
    assert torch.equal(model(**inputs).logits, stock)
    with mmkernels.prune(model, [get_pruner("vtc_cls", keep_ratio=1.0), get_pruner("fastv", keep_ratio=1.0)]):
        assert torch.equal(model(**inputs).logits, stock)
    asked = {"max_new_tokens": 3, "do_sample": False}
    with mmkernels.prune(model, vision):
        expected = model.generate(**inputs, **asked)
        with mmkernels.prune(model, "fastv", keep_ratio=1.0):
            assert torch.equal(model.generate(**inputs, **asked), expected)


@torch.no_grad()
def test_beams_and_a_conversation(model):
    inputs, asked = batch(ROWS[:2]), {"max_new_tokens": 4, "do_sample": False}
    alone = batch(ROWS[:1]) | {"pixel_values": inputs["pixel_values"][:1]}
    with mmkernels.prune(model, sides("pyramiddrop")):
        beams = model.generate(**inputs, **asked, num_beams=2)
        assert torch.equal(model.generate(**alone, **asked, num_beams=2)[0, -4:], beams[0, -4:])
        whole = model.generate(**alone, **asked)
        first = model.generate(**alone, **asked | {"max_new_tokens": 2}, return_dict_in_generate=True)
        again = model.generate(first.sequences, past_key_values=first.past_key_values, **asked | {"max_new_tokens": 2})
        assert torch.equal(again, whole)


def test_labels_of_what_both_sides_leave(model):
    inputs = batch(ROWS[:1], side="right")
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[0, -2:] = inputs["input_ids"][0, -2:]
    model.zero_grad()
    with mmkernels.prune(model, sides()):
        out = model(**inputs, labels=labels)
        out.loss.backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().max() > 0
    model.zero_grad()
    with torch.no_grad():
        x = by_hand(model, ROWS[0], narrowed(model, inputs["pixel_values"])[1])[0]
        visual = [False] * 2 + [True] * LEFT + [False] * 3
        slow = Slow(model, DECODERS["fastv"][1], False)
        logits = slow.run(x, range(len(x)), visual, last=len(x) - 3)  # the token in front of the answer chooses
        expected = F.cross_entropy(logits[-3:-1], labels[0, -2:])
    torch.testing.assert_close(out.loss.detach(), expected, atol=1e-5, rtol=1e-4)


def test_what_cannot_be_combined_says_so(model):
    vision, decoder = sides()
    with pytest.raises(ConfigError, match="got vtc_cls and random"):
        mmkernels.prune(model, [vision, get_pruner("random", num_keep=3)])
    with pytest.raises(ConfigError, match="got fastv and pyramiddrop"):
        mmkernels.prune(model, [decoder, "pyramiddrop"])
    with pytest.raises(ConfigError, match="got none"):
        mmkernels.prune(model, [])
    with pytest.raises(ConfigError, match="TokenPruner or a name; got int"):
        mmkernels.prune(model, [vision, 3])
    with pytest.raises(ConfigError, match="options must come with a pruner's name"):
        mmkernels.prune(model, [vision, decoder], num_keep=3)
    with pytest.raises(BackendError, match="lets images read"):
        mmkernels.prune(paligemma(), [get_pruner("vtc_cls", num_keep=4, score_source="column"), decoder])
    assert "_pruning" not in model.__dict__
    few = get_pruner("vtc_cls", num_keep=4)
    with (
        mmkernels.prune(model, [few, decoder]),
        pytest.raises(ShapeError, match="fastv: num_keep must be at most the number of tokens, 4; got 5"),
    ):
        model(**batch(ROWS[:1]))
