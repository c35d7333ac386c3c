"""The seam to transformers: version floor, padding of recurrent layers, caches that know their length."""

import pytest
import torch
from transformers import DynamicCache

from mmkernels.errors import BackendError, ConfigError, ShapeError
from mmkernels.interop.transformers import check_cache, check_version, count_tokens, recurrent_padding_mask
from mmkernels.models.mmmamba import MMMambaConfig, layer_types_keeping


def config(*keep: int) -> MMMambaConfig:
    return MMMambaConfig(num_embedding_layers=1, num_hidden_layers=2, layer_types=layer_types_keeping(3, keep))


@pytest.mark.parametrize("version", ["5.22.0", "5.23.0", "5.99.1", "5.24.0.dev0"])
def test_versions_that_work(version):
    check_version(version)


@pytest.mark.parametrize("version", ["4.57.0", "5.21.9", "6.0.0", "6.0.0rc1", "unknown"])
def test_versions_that_do_not(version):
    with pytest.raises(BackendError, match=version):
        check_version(version)


def test_padding_masks_of_recurrent_layers():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert recurrent_padding_mask(None, 4) is None
    assert recurrent_padding_mask(mask, 4).tolist() == mask.tolist()
    assert recurrent_padding_mask(mask, 2) is None  # the new tokens are all real
    assert recurrent_padding_mask(mask[:, :1], 1).tolist() == [[0], [1]]  # one token may be padding too
    with pytest.raises(ShapeError, match="padding mask"):
        recurrent_padding_mask(torch.zeros(1, 1, 4, 4), 4)


def test_a_linear_cache_counts_tokens_through_every_operation():
    cache = DynamicCache(config=config())
    assert cache.get_seq_length() == 0
    count_tokens(cache, torch.zeros(2, 5, 8))
    count_tokens(cache, torch.zeros(2, 1, 8))
    assert cache.get_seq_length() == 6
    cache.reorder_cache(torch.tensor([1, 1]))
    assert cache.get_seq_length() == 6
    cache.reset()
    assert cache.get_seq_length() == 0
    count_tokens(cache, torch.zeros(1, 3, 8))
    assert cache.get_seq_length() == 3


def test_counting_costs_a_byte_per_token():
    cache = DynamicCache(config=config())
    count_tokens(cache, torch.zeros(1, 1000, 8))
    layer = cache.layers[0]
    assert layer.keys.nbytes == 1000
    assert layer.values.nbytes == 0


def test_caches_with_attention_count_for_themselves():
    cache = DynamicCache(config=config(1))
    count_tokens(cache, torch.zeros(1, 4, 8))
    assert cache.get_seq_length() == 0


def test_caches_of_other_models_are_refused():
    linear, hybrid = config(), config(1)
    check_cache(DynamicCache(config=linear), linear.layer_types)
    check_cache(DynamicCache(config=hybrid), hybrid.layer_types)
    check_cache(DynamicCache(), config(0, 1, 2).layer_types)
    for cache in (DynamicCache(), DynamicCache(config=hybrid)):
        with pytest.raises(ConfigError, match="DynamicCache"):
            check_cache(cache, linear.layer_types)
