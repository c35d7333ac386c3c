"""transformers' Mamba-2 models on our kernels: the same answers, and packed batches that work."""

import pytest
import torch
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
)

from mmkernels.errors import ConfigError
from mmkernels.interop import mamba2_models, run_on_mmkernels
from mmkernels.testing import assert_within


def mamba2(**options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 2, "chunk_size": 8}
    return Mamba2ForCausalLM(Mamba2Config(vocab_size=50, num_hidden_layers=2, **sizes, **options)).eval()


def bamba():
    torch.manual_seed(0)
    mixer = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return BambaForCausalLM(
        BambaConfig(vocab_size=50, num_hidden_layers=2, attn_layer_indices=[1], pad_token_id=0, **sizes, **mixer)
    ).eval()


def falcon():
    torch.manual_seed(0)
    mixer = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    return FalconH1ForCausalLM(
        FalconH1Config(vocab_size=50, num_hidden_layers=2, mamba_d_ssm=64, pad_token_id=0, **sizes, **mixer)
    ).eval()


@pytest.fixture
def calls(monkeypatch):
    """Names of our functions, as they are called."""
    seen = []

    def counted(name, function):
        def call(*args, **kwargs):
            seen.append(name)
            return function(*args, **kwargs)

        call.__signature__ = __import__("inspect").signature(function)
        return call

    for name, function in mamba2_models.OURS.items():
        monkeypatch.setitem(mamba2_models.OURS, name, counted(name, function))
    return seen


@pytest.mark.parametrize("make", [mamba2, bamba, falcon], ids=["mamba2", "bamba", "falcon-h1"])
def test_same_logits_and_tokens(make, calls):
    model, ids = make(), torch.randint(1, 50, (2, 21), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = model(ids).logits
        double = model.double()(ids).logits
        model.float()
        tokens = model.generate(ids, max_new_tokens=6, do_sample=False)
        with run_on_mmkernels(model):
            ours = model(ids).logits
            again = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert_within("logits", ours, double, theirs, terms=8)  # 8: two layers, each rounded at four places
    assert torch.equal(again, tokens)
    wanted = {"causal_conv1d_fn", "causal_conv1d_update", "mamba2_chunk_scan", "mamba2_selective_state_update"}
    assert wanted <= set(calls)


def test_padded_rows(calls):
    model, ids = mamba2(), torch.randint(1, 50, (2, 12))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.no_grad():
        theirs = model(ids, attention_mask=mask).logits
        with run_on_mmkernels(model):
            ours = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert calls


def test_gradients(calls):
    model, ids = mamba2(), torch.randint(1, 50, (2, 21))
    model.train()

    def gradients():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    theirs = gradients()
    with run_on_mmkernels(model):
        ours = gradients()
    assert "mamba2_split_conv1d_scan_combined" in calls
    for name, grad in ours.items():
        torch.testing.assert_close(grad, theirs[name], rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_packed_sequences_stay_apart():
    mixer = mamba2().backbone.layers[0].mixer
    first, second = torch.randn(1, 9, 32), torch.randn(1, 14, 32)
    seq_idx = torch.cat([torch.zeros(1, 9), torch.ones(1, 14)], dim=1).int()
    packed = torch.cat([first, second], dim=1)
    with torch.no_grad(), pytest.raises(ValueError, match="packed"):
        mixer(packed, seq_idx=seq_idx)
    with torch.no_grad(), run_on_mmkernels(mixer):
        together = mixer(packed, seq_idx=seq_idx)
        apart = torch.cat([mixer(first), mixer(second)], dim=1)
        bounds = mixer(packed, cu_seqlens=torch.tensor([0, 9, 23], dtype=torch.int32))
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(bounds, apart, rtol=1e-4, atol=1e-6)


def test_undo_restores_their_functions():
    model = mamba2()
    import transformers.models.mamba2.modeling_mamba2 as modelling

    before = {name: getattr(modelling, name) for name in mamba2_models.OURS}
    handle = run_on_mmkernels(model)
    assert modelling.mamba2_chunk_scan is not before["mamba2_chunk_scan"]
    handle.undo()
    assert {name: getattr(modelling, name) for name in mamba2_models.OURS} == before


def test_a_model_without_mamba_layers_is_refused():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(ConfigError, match="got LlamaForCausalLM"):
        run_on_mmkernels(LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes)))
