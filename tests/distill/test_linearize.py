import copy

import pytest
import torch
from torch import nn

from mmkernels.distill import linearize, parse_keep_attention, restore_attention
from mmkernels.errors import ConfigError

FULL, LINEAR = "full_attention", "linear_attention"


@pytest.mark.parametrize(
    ("spec", "layers", "expected"),
    [
        ((), 4, ()),
        ("none", 4, ()),
        ([2, 0], 4, (0, 2)),
        ("head_interleaved:4", 32, (0, 4, 8, 12, 16, 20, 24, 28)),
        ("tail_interleaved:4", 32, (3, 7, 11, 15, 19, 23, 27, 31)),
        ("head_stacked:8", 32, tuple(range(8))),
        ("tail_stacked:8", 32, tuple(range(24, 32))),
        ("head_interleaved:16", 32, (0, 16)),
        ("tail_stacked:9", 4, (0, 1, 2, 3)),
        ("tail_interleaved:5", 4, ()),
    ],
)
def test_patterns(spec, layers, expected):
    assert parse_keep_attention(spec, layers) == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ([4], "from 0 to 3"),
        ([-1], "from 0 to 3"),
        ([1, 1], "different layer indices"),
        ([True], "from 0 to 3"),
        (["0"], "from 0 to 3"),
        ("head_interleave:4", "Did you mean 'head_interleaved'"),
        ("head_interleaved:0", "k >= 1"),
        ("head_interleaved", "k >= 1"),
    ],
)
def test_bad_patterns(spec, message):
    with pytest.raises(ConfigError, match=message):
        parse_keep_attention(spec, 4)


def own_storages(model):
    return {p.untyped_storage().data_ptr() for p in model.parameters()}


def test_student_is_a_seeded_copy(teacher):
    before = copy.deepcopy(teacher.state_dict())
    student = linearize(teacher, [1])
    assert type(student) is type(teacher)
    assert student.config.layer_types == [LINEAR, FULL, LINEAR, LINEAR]
    assert teacher.config.layer_types == [FULL] * 4
    assert not own_storages(student) & own_storages(teacher)
    assert not any(p.is_meta for p in (*student.parameters(), *student.buffers()))
    shared = {n: p for n, p in student.named_parameters() if n in before}
    assert len(shared) > 30
    for name, parameter in shared.items():  # q, k, v, o have the same names in both kinds of mixer: inherited
        assert torch.equal(parameter, before[name]), name
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name])
    assert student.generation_config.to_dict() == teacher.generation_config.to_dict()
    assert not student.training


def test_student_equals_one_made_by_hand(teacher, batch):
    """The student's logits are those of a freshly built model with the same weights: nothing stale was carried over."""
    student = linearize(teacher, [0])
    fresh = type(teacher)(copy.deepcopy(student.config))
    fresh.load_state_dict(student.state_dict(), strict=True)
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        torch.testing.assert_close(student(**inputs).logits, fresh.eval()(**inputs).logits, rtol=0, atol=0)
        assert (student(**inputs).logits - teacher(**inputs).logits).abs().max() > 1e-2


def test_keeping_every_layer_changes_nothing(teacher, batch):
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "pixel_values")}
    student = linearize(teacher, range(4))
    with torch.no_grad():
        assert torch.equal(student(**inputs).logits, teacher(**inputs).logits)


def test_seed_decides_and_global_state_stays(teacher):
    state = torch.get_rng_state()
    one, two, other = linearize(teacher), linearize(teacher), linearize(teacher, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name])
    name = "model.layers.0.mixer.g_proj.weight"
    assert not torch.equal(one.state_dict()[name], other.state_dict()[name])
    mixers = [layer.mixer.g_proj.weight for layer in one.decoder_layers()]
    assert not torch.equal(mixers[0], mixers[1])  # each layer draws its own values


def test_strategies_reach_the_mixers(teacher):
    scratch = linearize(teacher, seeding="scratch")
    ours, theirs = scratch.decoder_layers()[2].mixer, teacher.decoder_layers()[2].mixer
    assert not torch.equal(ours.q_proj.weight, theirs.q_proj.weight)
    assert torch.equal(ours.o_proj.weight, theirs.o_proj.weight)


def test_flags_dtype_and_mode_follow_the_teacher(make_teacher):
    teacher = make_teacher().bfloat16().train()
    teacher.lm_head.requires_grad_(False)
    student = linearize(teacher, [3])
    assert student.training
    assert not student.lm_head.weight.requires_grad
    assert student.model.norm.weight.requires_grad
    for name, parameter in student.named_parameters():
        wide = name.endswith(("dt_bias", "A_log_bias"))
        assert parameter.dtype == (torch.float32 if wide else torch.bfloat16), name
        if ".mixer.g_" in name or wide:
            assert parameter.requires_grad


def test_tied_weights_stay_tied(make_teacher):
    student = linearize(make_teacher(tie_word_embeddings=True))
    assert student.lm_head.weight is student.model.embed_tokens.weight


def test_hybrid_from_any_stage(teacher, batch):
    student = linearize(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))  # as if trained
    hybrid = restore_attention(student, teacher, "head_interleaved:2")
    assert hybrid.config.layer_types == [FULL, LINEAR, FULL, LINEAR]
    assert student.config.layer_types == [LINEAR] * 4
    assert not own_storages(hybrid) & (own_storages(student) | own_storages(teacher))
    for i, layer in enumerate(hybrid.decoder_layers()):
        source = (teacher if i % 2 == 0 else student).decoder_layers()[i]
        for name, value in source.mixer.state_dict().items():
            assert torch.equal(layer.mixer.state_dict()[name], value)
        assert torch.equal(layer.mlp.up_proj.weight, student.decoder_layers()[i].mlp.up_proj.weight)
    everywhere = restore_attention(linearize(teacher), teacher, [0, 1, 2, 3])
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        assert torch.equal(everywhere(**inputs).logits, teacher(**inputs).logits)


def test_linearizing_a_hybrid_further(teacher):
    hybrid = linearize(teacher, [0, 1])
    further = linearize(hybrid, [0])
    assert further.config.layer_types == [FULL, LINEAR, LINEAR, LINEAR]
    trained = hybrid.decoder_layers()[2].mixer.state_dict()
    for name, value in further.decoder_layers()[2].mixer.state_dict().items():
        assert torch.equal(value, trained[name])


def test_errors(teacher):
    with pytest.raises(ConfigError, match="Did you mean 'inherit'"):
        linearize(teacher, seeding="inheritt")
    with pytest.raises(ConfigError, match="from 0 to 3"):
        linearize(teacher, [32])
    with pytest.raises(ConfigError, match="decoder_layers"):
        linearize(nn.Linear(2, 2))
    student = linearize(teacher)
    with pytest.raises(ConfigError, match="linear already"):
        linearize(student, [0])
    with pytest.raises(ConfigError, match="teacher must have 4 layers with attention"):
        restore_attention(student, student, [0])
