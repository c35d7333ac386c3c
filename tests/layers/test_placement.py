"""Weights on large pages: same objects, same values, ties kept, what cannot move is named."""

import pytest
import torch
from torch import nn

from mmkernels.layers import place_for_decode


def test_values_objects_and_gradients_survive():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 500), nn.BatchNorm1d(500), nn.Linear(500, 7, bias=False))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    report = place_for_decode(model)
    assert report.left == ()
    assert report.tensors == len(before)
    assert report.moved_bytes == sum(v.numel() * v.element_size() for v in before.values())
    assert str(report).startswith("moved 0.6 MB in 8 tensors")
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    model(torch.randn(4, 300)).sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before["0.weight"])
    assert place_for_decode(model).tensors == len(before)  # once more moves everything again


def test_every_tensor_has_a_storage_of_its_own():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).bfloat16()
    place_for_decode(model)
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert len(storages) == 4
    assert all(p.untyped_storage().nbytes() == p.numel() * 2 for p in model.parameters())
    assert all(p.data_ptr() % 4096 == 0 for p in model.parameters())


def test_tied_weights_stay_tied():
    model = nn.ModuleDict({"embed": nn.Embedding(50, 16), "head": nn.Linear(16, 50, bias=False)})
    model["head"].weight = model["embed"].weight
    assert place_for_decode(model).tensors == 1
    assert model["head"].weight is model["embed"].weight
    apart = nn.ModuleDict({"one": nn.Linear(16, 16), "two": nn.Linear(16, 16)})
    apart["two"].weight = nn.Parameter(apart["one"].weight.data)  # two objects, one memory
    place_for_decode(apart)
    assert apart["one"].weight.data_ptr() == apart["two"].weight.data_ptr()


def test_what_cannot_move_is_named_and_untouched():
    model = nn.Module()
    wide = torch.randn(8, 8)
    model.upper, model.lower = nn.Parameter(wide[:4]), nn.Parameter(wide[4:])
    model.turned = nn.Parameter(torch.randn(4, 6).t())
    model.elsewhere = nn.Parameter(torch.empty(3, device="meta"))
    model.plain = nn.Parameter(torch.ones(5))
    report = place_for_decode(model)
    assert set(report.left) == {"upper", "lower", "turned", "elsewhere"}
    assert report.tensors == 1
    assert model.upper.data_ptr() == wide.data_ptr()


def test_nothing_to_move():
    report = place_for_decode(nn.Identity())
    assert (report.tensors, report.moved_bytes, report.large_page_bytes) == (0, 0, 0)
    assert "nothing to move" in str(report)


def test_the_system_is_asked_what_it_granted():
    """16 MiB of weights: all but the ends of the region, or none with the reason."""
    report = place_for_decode(nn.Linear(2048, 2048, bias=False))
    if report.large_page_bytes == 0:
        assert report.reason
        pytest.skip(report.reason)
    assert report.reason == ""
    assert report.large_page_bytes >= report.moved_bytes - (4 << 20)
    assert report.large_page_bytes <= report.moved_bytes
