"""AKI with fewer image tokens: latents chosen by the attention they receive, spans of the shorter prompt."""

import pytest
import torch
from aki_tiny import IMAGE, LATENTS, tiny_config, tiny_model, tiny_processor

import mmkernels
from mmkernels.errors import ConfigError
from mmkernels.models.aki import AkiForConditionalGeneration


def prompts():
    processor, pixels = tiny_processor(), torch.rand(3, 3, 8, 8)
    texts = ["what is shown here ?", "a cat left a red dog", "what is a cat ?"]
    images = [[pixels[0]], [pixels[1], pixels[2]], None]
    return [processor(text, images=image, return_tensors="pt") for text, image in zip(texts, images, strict=True)]


def together(rows):
    width = max(row["input_ids"].shape[1] for row in rows)

    def left(row, name):
        return torch.nn.functional.pad(row[name], (width - row[name].shape[1], 0))

    made = {name: torch.cat([left(row, name) for row in rows]) for name in ("input_ids", "attention_mask")}
    return made | {
        "pixel_values": torch.cat([row["pixel_values"] for row in rows if row.get("pixel_values") is not None])
    }


def received(model, pixels):
    """Attention that each latent gets from the latents in the resampler's last layer, with the maps written out."""
    features, resampler = model.encode_images(pixels), model.resampler
    latents = resampler.latents.expand(len(pixels), -1, -1)
    for layer in resampler.layers:
        at = layer.attention
        normed = at.norm_latents(latents)
        media = torch.cat([at.norm_media(features), normed], 1)
        q = at.to_q(normed).unflatten(-1, (at.heads, -1))
        k = at.to_kv(media).chunk(2, -1)[0].unflatten(-1, (at.heads, -1))
        maps = torch.einsum("nqhd,nkhd->nhqk", q, k).mul(q.shape[-1] ** -0.5).softmax(-1)
        latents = layer(features, latents)
    return maps.mean((1, 2))[:, features.shape[1] :], resampler.projection(resampler.norm(latents))


@torch.no_grad()
def test_the_decoder_reads_the_latents_that_are_read_most():
    model, row = tiny_model(), prompts()[0]
    scores, tokens = received(model, row["pixel_values"])
    kept = scores[0].argsort(descending=True)[:2].sort().values
    pruner = mmkernels.get_pruner("vtc_cls", num_keep=2, num_layers=1, score_source="column")
    with mmkernels.prune(model, pruner) as handle:
        logits = model(**row).logits
        assert handle.kept[0].tolist() == kept.tolist()
    ids = row["input_ids"][0].tolist()
    first = ids.index(IMAGE)
    del ids[first]
    expected = model(torch.tensor([ids]), image_tokens=tokens[0, kept]).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
    # image tokens read the question: the same prompt under causal attention answers differently
    causal = tiny_model(policy="none")
    causal.load_state_dict(model.state_dict())
    assert (causal(torch.tensor([ids]), image_tokens=tokens[0, kept]).logits - expected).abs().max() > 1e-3


@torch.no_grad()
def test_num_keep_in_the_configuration(tmp_path):
    whole = tiny_model()
    whole.save_pretrained(tmp_path / "whole")
    pruned = AkiForConditionalGeneration.from_pretrained(tmp_path / "whole", num_keep=2).eval()
    pruned.save_pretrained(tmp_path / "pruned")
    again = AkiForConditionalGeneration.from_pretrained(tmp_path / "pruned").eval()
    assert again.config.num_keep == 2
    rows = prompts()
    inputs = together(rows)
    with mmkernels.prune(whole, "vtc_cls", num_keep=2, num_layers=1, score_source="column"):
        expected = whole(**inputs).logits
    assert torch.equal(again(**inputs).logits, expected)
    all_of_them = AkiForConditionalGeneration.from_pretrained(tmp_path / "whole", num_keep=LATENTS).eval()
    assert torch.equal(all_of_them(**inputs).logits, whole(**inputs).logits)
    with mmkernels.prune(again, "random", num_keep=1):  # over the configuration's
        assert again(**inputs).logits.shape[1] < expected.shape[1]
    assert torch.equal(again(**inputs).logits, expected)


@torch.no_grad()
def test_batched_generation_equals_single_with_and_without_cache():
    model, rows = tiny_model(num_keep=2), prompts()
    inputs, options = together(rows), {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    out = model.generate(**inputs, **options)
    assert torch.equal(out[:, :-5], inputs["input_ids"])
    assert torch.equal(out, model.generate(**inputs, **options, use_cache=False))
    for i, row in enumerate(rows):
        assert model.generate(**row, **options)[0, -5:].tolist() == out[i, -5:].tolist()
    beams = model.generate(**inputs, **options, num_beams=2)
    one = model.generate(**rows[1], **options, num_beams=2)
    assert one[0, -5:].tolist() == beams[1, -5:].tolist()


def test_a_resampler_has_no_cls_and_at_most_its_latents():
    with pytest.raises(ConfigError, match="column or mean_query"):
        mmkernels.prune(tiny_model(), "vtc_cls", num_keep=2)
    with pytest.raises(ConfigError, match=r"num_keep must be None or lie in 1\.\.3"):
        tiny_config(num_keep=4)
