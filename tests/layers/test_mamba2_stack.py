"""All blocks in one native call: the bits of block by block, and everything that must send it back there."""

import copy
import pickle

import pytest
import torch

import mmkernels
from mmkernels.layers import Mamba2Block, Mamba2Mixer
from mmkernels.layers.mamba2_stack import StackStep

SIZES = {"headdim": 8, "d_state": 6}


def build(dtype=torch.float32, **options):
    torch.manual_seed(0)
    blocks = [Mamba2Block(32, mixer=Mamba2Mixer(32, **SIZES, **options)) for _ in range(3)]
    return torch.nn.ModuleList(blocks).to(dtype)


def states(blocks, batch=2):
    made = [block.mixer.init_states(batch) for block in blocks]
    return [conv for conv, _ in made], [ssm for _, ssm in made]


def one_by_one(blocks, hidden, conv_states, ssm_states):
    residual = None
    for block, conv, ssm in zip(blocks, conv_states, ssm_states, strict=True):
        hidden, residual = block.step(hidden, residual, conv, ssm)
    return hidden, residual


def tokens(dtype=torch.float32, count=4, batch=2):
    return torch.randn(count, batch, 32, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("options", [{}, {"bias": True, "rmsnorm": False}, {"ngroups": 2, "norm_before_gate": True}])
def test_the_bits_are_those_of_block_by_block(dtype, options):
    blocks, stack = build(dtype, **options), StackStep()
    alone, together = states(blocks), states(blocks)
    for token in tokens(dtype):
        expected, got = one_by_one(blocks, token, *alone), stack(blocks, token, *together)
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(expected, got, strict=True))
    for a, b in zip(alone, together, strict=True):
        assert all(map(torch.equal, a, b))


def replace_a_weight(blocks):
    blocks[1].mixer.out_proj.weight = torch.nn.Parameter(torch.ones_like(blocks[1].mixer.out_proj.weight))


def replace_a_mixer(blocks):
    torch.manual_seed(5)
    blocks[2].mixer = Mamba2Mixer(32, **SIZES)


def write_into_a_weight(blocks):
    blocks[0].mixer.A_log.fill_(1.0)


@pytest.mark.parametrize("change", [replace_a_weight, replace_a_mixer, write_into_a_weight])
def test_a_change_of_the_model_counts_from_the_next_token_on(change):
    blocks, stack = build(), StackStep()
    alone, together = states(blocks), states(blocks)
    first, second = tokens(count=2)
    one_by_one(blocks, first, *alone), stack(blocks, first, *together)
    change(blocks)
    expected, got = one_by_one(blocks, second, *alone), stack(blocks, second, *together)
    assert all(map(torch.equal, expected, got))


def test_another_dtype_of_the_same_modules():
    blocks, stack = build(), StackStep()
    stack(blocks, tokens()[0], *states(blocks))
    blocks.to(torch.bfloat16)
    alone, together, token = states(blocks), states(blocks), tokens(torch.bfloat16)[0]
    expected, got = one_by_one(blocks, token, *alone), stack(blocks, token, *together)
    assert all(map(torch.equal, expected, got))


def test_what_sends_it_back_leaves_the_states_alone():
    blocks, stack = build(), StackStep()
    conv_states, ssm_states = states(blocks)
    token = tokens()[0]

    def refused():
        return stack(blocks, token, conv_states, ssm_states) is None

    hook = blocks[1].mixer.in_proj.register_forward_hook(lambda *a: None)
    assert refused()
    hook.remove()
    with mmkernels.use_backend("torch"):
        assert refused()
    with torch.enable_grad():
        assert refused()
    assert all(not state.any() for state in (*conv_states, *ssm_states))
    assert not refused()
    hook = blocks[1].mixer.register_forward_pre_hook(lambda *a: None)
    assert refused()
    hook.remove()
    blocks[1].mixer.in_proj = torch.nn.Sequential(blocks[1].mixer.in_proj)
    assert refused()
    per_channel = build(D_has_hdim=True)
    assert StackStep()(per_channel, token, *states(per_channel)) is None


def test_copies_are_unbound_and_work():
    blocks, stack = build(), StackStep()
    token = tokens()[0]
    expected = stack(blocks, token, *states(blocks))
    for made in (copy.deepcopy(stack), pickle.loads(pickle.dumps(stack))):
        assert made._blocks == []
        assert torch.equal(made(blocks, token, *states(blocks))[0], expected[0])


def test_lists_that_do_not_fit_are_refused():
    from mmkernels.ops.mamba2_step._native import Steps

    blocks, stack = build(), StackStep()
    conv_states, ssm_states = states(blocks)
    stack(blocks, tokens()[0], conv_states, ssm_states)
    assert isinstance(stack._call, Steps)
    with pytest.raises(RuntimeError, match="the same blocks"):
        stack._call(tokens()[0], None, conv_states[:2], ssm_states)
    with pytest.raises(RuntimeError, match="a state is wrong"):
        stack._call(tokens(batch=3)[0], None, conv_states, ssm_states)
