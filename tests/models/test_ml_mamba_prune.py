"""Any pruner of the vision side on ML-Mamba: behind the connector's scan, scored by the tower that has [CLS]."""

import pytest
import torch
from ml_mamba_tiny import ID, SIZE, TOKENS, tiny_model

import mmkernels
from mmkernels.errors import BackendError, ConfigError


def inputs(dtype=torch.float64):
    ids = torch.tensor([[ID["what"], ID["is"], ID["here"]], [ID["a"], ID["red"], ID["cat"]]])
    pixels = torch.randn(2, 2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def test_patches_are_those_that_cls_attends_to():
    model, given = tiny_model(), inputs()
    whole = model(**given).logits
    with mmkernels.prune(model, "vtc_cls", num_keep=TOKENS, num_layers=2):
        assert torch.equal(model(**given).logits, whole)
    with mmkernels.prune(model, "vtc_cls", num_keep=4, num_layers=2) as handle:
        got = model(**given).logits
        kept = torch.stack(handle.kept)
        new = model.generate(**given, max_new_tokens=3, do_sample=False)
        slow = model.generate(**given, max_new_tokens=3, do_sample=False, use_cache=False)
        assert torch.equal(new, slow)
    tower = model.vision_tower.towers[0]
    tower.set_attn_implementation("eager")
    maps = tower(given["pixel_values"][:, 0], output_attentions=True).attentions
    scores = sum(maps[layer].mean(1)[:, 0, 3:] for layer in (0, 1))  # [CLS] and two registers lead
    best = scores.argsort(descending=True)[:, :4].sort().values
    assert torch.equal(kept, best)
    features, _ = model.vision_tower(given["pixel_values"])
    mixed = model.connector.mix(features, model.config.grid)
    tokens = model.connector.projector(mixed.gather(1, best[..., None].expand(-1, -1, mixed.shape[2])))
    embeds = torch.cat([tokens, model.get_input_embeddings()(given["input_ids"])], 1)
    expected = model(inputs_embeds=embeds).logits[:, 4:]
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-7)
    assert (model(**given).logits - whole).abs().max() < 1e-9


def test_what_does_not_fit_says_so():
    model = tiny_model()
    with pytest.raises(BackendError, match="vision side"):
        mmkernels.prune(model, "fastv", num_keep=4)
    with pytest.raises(ConfigError, match="mixes them"):
        mmkernels.prune(model, "tome", num_keep=8)
    with (
        mmkernels.prune(model, "vtc_cls", keep_mass=0.5, num_layers=1),
        pytest.raises(ConfigError, match="as many tokens"),
    ):
        model(**inputs())
