"""What a transformers model owes its users: files, dtypes, losses, checkpointing, initial values."""

import torch
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, DynamicCache

import mmkernels
from mmkernels.models.mmmamba import MMMambaForConditionalGeneration
from mmkernels.testing import assert_within


def tokens(batch: int, seqlen: int) -> torch.Tensor:
    return torch.randint(3, 48, (batch, seqlen), generator=torch.Generator().manual_seed(0))


def test_save_and_load_are_bit_equal(tiny_model, kind, tmp_path):
    model, ids = tiny_model(kind, torch.float32), tokens(2, 6)
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is MMMambaForConditionalGeneration
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_loading_in_bfloat16_keeps_decays_and_steps_in_float32(tiny_model, tmp_path):
    model = tiny_model("linear", torch.float32)
    model.save_pretrained(tmp_path)
    loaded = MMMambaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map="cpu")
    assert loaded.dtype == torch.bfloat16
    for old, new in zip(model.decoder_layers(), loaded.decoder_layers(), strict=True):
        assert new.mixer.q_proj.weight.dtype == torch.bfloat16
        for name in ("dt_bias", "A_log_bias"):
            assert torch.equal(getattr(new.mixer, name), getattr(old.mixer, name))  # float32, bit for bit


def test_bfloat16_is_as_good_as_the_plain_formulas_in_bfloat16(tiny_model, kind):
    model, ids = tiny_model(kind, torch.bfloat16), tokens(2, 20)
    with torch.no_grad():
        actual = model(ids).logits
        with mmkernels.use_backend("reference"):
            model.set_attn_implementation("eager")
            peer = model(ids).logits
        truth = model.double()(ids).logits
    assert_within("logits", actual, truth, peer)
    assert actual.dtype == torch.bfloat16


def test_attention_implementations_agree(tiny_model):
    model, ids = tiny_model("teacher"), tokens(2, 9)
    with torch.no_grad():
        sdpa = model(ids).logits
        model.set_attn_implementation("eager")
        assert torch.allclose(model(ids).logits, sdpa, rtol=0, atol=1e-12)


def test_loss_is_the_shifted_cross_entropy(tiny_model, kind):
    model, ids = tiny_model(kind), tokens(2, 7)
    labels = ids.clone()
    labels[:, :3] = -100
    out = model(ids, labels=labels)
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
    assert torch.allclose(out.loss.float(), expected, rtol=1e-6)
    out.loss.backward()
    missing = [
        n for n, p in model.named_parameters() if p.grad is None and not n.startswith(("model.vis", "model.proj"))
    ]
    assert not missing


def test_gradient_checkpointing_changes_nothing(tiny_model, kind):
    model, ids = tiny_model(kind).train(), tokens(2, 7)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0

    def run():
        model.zero_grad()
        loss = model(ids, labels=ids, attention_mask=mask).loss
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    loss, grads = run()
    # renamed in transformers 5.23
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    calls = []
    for layer in model.decoder_layers():
        layer.mixer.register_forward_hook(lambda *_: calls.append(1))
    again, regrads = run()
    assert len(calls) == 2 * len(model.decoder_layers())  # every layer ran again in the backward pass
    assert torch.equal(loss, again)
    assert all(torch.equal(grads[n], regrads[n]) for n in grads)


def test_hidden_states_are_the_inputs_of_the_layers(tiny_model, kind):
    model, ids = tiny_model(kind, normalize_embedding_output=True), tokens(1, 5)
    seen = []
    for layer in model.decoder_layers():
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == len(seen) + 1
    assert all(torch.equal(a, b) for a, b in zip(seen, out.hidden_states, strict=False))
    assert torch.allclose(out.hidden_states[1].norm(dim=-1), torch.ones(1, 5, dtype=torch.float64))
    assert torch.allclose(model.lm_head(out.hidden_states[-1]), out.logits)


def test_hooks_find_context_and_input_on_every_mixer(tiny_model, kind):
    """What distillation relies on: u goes into layer.mixer, the context into its o_proj, while decoding too."""
    model, ids = tiny_model(kind), tokens(1, 5)
    inputs, contexts = [], []
    for layer in model.decoder_layers():
        layer.mixer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].shape))
        layer.mixer.o_proj.register_forward_pre_hook(lambda _, args: contexts.append(args[0].shape[-1]))
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)
    layers = len(model.decoder_layers())
    assert inputs == [(1, 5, 32)] * layers + [(1, 1, 32)] * layers
    assert contexts == [32] * (2 * layers)


def test_tied_embeddings(tiny_model, tmp_path):
    model = tiny_model("hybrid", torch.float32, tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = MMMambaForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_initial_values_of_a_new_mixer(tiny_config):
    model = MMMambaForConditionalGeneration(tiny_config("linear", hidden_size=64, head_dim=16))
    for layer in model.decoder_layers():
        mixer = layer.mixer
        assert torch.equal(mixer.A_log_bias, torch.ones(4))
        steps = F.softplus(mixer.dt_bias)
        assert ((steps > 0.99e-3) & (steps < 0.101)).all()
        assert torch.equal(mixer.conv1d.weight[..., -1], torch.ones(128, 1))
        assert not mixer.conv1d.weight[..., 0].any()
        assert not mixer.in_proj.weight.any()
        assert 0.015 < mixer.q_proj.weight.std() < 0.025  # the generic rule: 0.02


def test_attention_weights_in_a_linear_model_get_real_initial_values(tiny_model, tiny_config, tmp_path):
    """Keys that a file lacks must not stay uninitialised memory, and keys that it has must stay what they are."""
    teacher = tiny_model("teacher", torch.float32)
    state = {**teacher.state_dict(), "model.layers.0.mixer.dt_bias": torch.full((4,), -3.0)}
    teacher.save_pretrained(tmp_path, state_dict=state)
    tiny_config("linear").save_pretrained(tmp_path)
    student, report = MMMambaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert any(key.endswith("A_log_bias") for key in report["missing_keys"])
    mixer = student.model.layers[0].mixer
    assert torch.equal(mixer.q_proj.weight, teacher.model.layers[0].mixer.q_proj.weight)
    assert torch.equal(mixer.A_log_bias, torch.ones(4))
    assert torch.equal(mixer.conv1d.weight[..., -1], torch.ones(64, 1))
    assert torch.equal(mixer.dt_bias, torch.full((4,), -3.0))
