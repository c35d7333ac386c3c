import copy

import pytest
import torch

from mmkernels.distill import (
    capture_mixers,
    layerwise_loss,
    linearize,
    logit_loss,
    restore_attention,
    set_trainable,
    trainable_names,
)
from mmkernels.distill.losses import logit_kl
from mmkernels.distill.stages import check_pair, model_inputs
from mmkernels.errors import ConfigError, DataError, ShapeError

NEW = ["mixer_new"]
STAGES = {
    "stage1": ("layer_mse", ["mixer_new", "mixer_decay"]),
    "stage2": ("layer_mse", ["mixer_new", "mixer_decay", "qkv"]),
    "stage3": ("logit_kl", ["mixer_new", "mixer_decay", "qkv"]),
    "stage3_official": ("logit_kl", ["mixer_new", "qkv"]),
}


@pytest.fixture
def student(teacher):
    return linearize(teacher, [1])


def loss_of(kind, student, teacher, batch):
    step = layerwise_loss if kind == "layer_mse" else logit_loss
    return step(student, teacher, batch)


@pytest.mark.parametrize("stage", STAGES)
def test_exactly_the_trainable_set_moves(stage, student, teacher, batch):
    kind, sets = STAGES[stage]
    names = set(set_trainable(student, sets))
    before = {m: copy.deepcopy(m.state_dict()) for m in (student, teacher)}
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(2):  # in_proj is zero at the start: its own gradient is not, but others may need a second step
        optimizer.zero_grad()
        loss_of(kind, student, teacher, batch).loss.backward()
        optimizer.step()
    for name, value in teacher.state_dict().items():  # also while the student's q, k, v move
        assert torch.equal(value, before[teacher][name]), name
    moved = {name for name, value in student.state_dict().items() if not torch.equal(value, before[student][name])}
    assert moved == names
    assert all(".mixer." in name for name in names)
    assert not any("layers.0.mixer" in name and "embedding" not in name for name in names)  # the kept layer


def test_names_of_the_sets(student):
    decay = trainable_names(student, ["mixer_decay"])
    assert len(decay) == 2 * 3
    assert all(name.endswith(("dt_bias", "A_log_bias")) for name in decay)
    assert len(trainable_names(student, NEW)) == 3 * 5  # in_proj, conv weight and bias, g_proj, g_norm
    assert len(trainable_names(student, ["qkv"])) == 3 * 3
    assert len(trainable_names(student, ["*.mlp.*"])) == 4 * 3
    assert trainable_names(student, ["lm_head.weight", "o_proj"])[-1] == "lm_head.weight"
    everything = trainable_names(student, ["*"])
    assert everything == [name for name, _ in student.named_parameters()]


def test_bad_sets(student, teacher):
    with pytest.raises(ConfigError, match="Did you mean 'mixer_new'"):
        trainable_names(student, ["mixer_news"])
    with pytest.raises(ConfigError, match=r"got '\*\.experts\.\*'"):
        trainable_names(student, ["*.experts.*"])
    with pytest.raises(ConfigError, match="Linearize the model"):
        trainable_names(teacher, NEW)


def test_capture_changes_nothing_and_leaves_nothing(teacher, batch):
    inputs = model_inputs(batch)
    with torch.no_grad():
        plain = teacher(**inputs).logits
        with capture_mixers(teacher) as record:
            watched = teacher(**inputs).logits
    assert torch.equal(plain, watched)
    layers = teacher.decoder_layers()
    assert not any(m._forward_pre_hooks or m._forward_hooks for layer in layers for m in layer.modules())
    for i, layer in enumerate(layers):
        assert torch.equal(layer.mixer.o_proj(record.contexts[i]), record.outputs[i])
        assert record.inputs[i].shape == record.outputs[i].shape
    first = teacher.model.embed(inputs["input_ids"], inputs["pixel_values"])
    assert torch.equal(record.inputs[0], layers[0].input_norm(first))


def test_teacher_forced_run_is_the_teacher(student, teacher, batch):
    """The layer-wise step lets the teacher run untouched: its logits there are bit-equal to a plain run's."""
    seen = []
    handle = teacher.model.norm.register_forward_hook(lambda _, args, out: seen.append(out))
    layerwise_loss(student, teacher, batch)
    handle.remove()
    with torch.no_grad():
        assert torch.equal(teacher.lm_head(seen[0]), teacher(**model_inputs(batch)).logits)


def test_layerwise_loss_is_the_written_formula(student, teacher, batch):
    inputs = model_inputs(batch)
    mask = batch["attention_mask"].bool()
    with torch.no_grad(), capture_mixers(teacher) as record:
        teacher(**inputs)
    for target in ("context", "block_output"):
        errors = []
        for i in (0, 2, 3):
            mixer = student.decoder_layers()[i].mixer
            ours = mixer.context(record.inputs[i], attention_mask=batch["attention_mask"])
            ours = ours if target == "context" else mixer.o_proj(ours)
            goal = record.contexts[i] if target == "context" else record.outputs[i]
            errors.append((ours - goal)[mask].square().mean())
        result = layerwise_loss(student, teacher, batch, target=target)
        torch.testing.assert_close(result.loss, 1000 * sum(errors) / 3)
        torch.testing.assert_close(result.metrics["mse"], sum(errors).detach() / 3)
        torch.testing.assert_close(result.metrics["mse_max"], max(errors).detach())
    everything = layerwise_loss(student, teacher, batch, mask="all")
    assert not torch.equal(everything.loss, layerwise_loss(student, teacher, batch).loss)


def test_a_perfect_student_has_no_loss(teacher, batch):
    """A student whose linear layers are the teacher's own (a linear teacher) is at zero, padding and all."""
    linear = linearize(teacher)
    clone = copy.deepcopy(linear)
    assert layerwise_loss(clone, linear, batch).loss < 1e-9
    assert logit_loss(clone, linear, batch).loss < 1e-4
    assert logit_loss(clone, linear, batch).metrics["agreement"] == 1


def test_layerwise_gradients_are_local(student, teacher, batch):
    """The error of layer i has no gradient at any parameter outside layer i's mixer."""
    from mmkernels.distill import stages

    set_trainable(student, ["*"])
    original = stages.layer_errors
    for position, index in enumerate((0, 2, 3)):
        student.zero_grad(set_to_none=True)
        stages.layer_errors = lambda *a, p=position, **k: original(*a, **k)[p : p + 1]
        try:
            layerwise_loss(student, teacher, batch, target="context").loss.backward()
        finally:
            stages.layer_errors = original
        inside = {id(p) for p in student.decoder_layers()[index].mixer.parameters()}
        for name, parameter in student.named_parameters():
            if id(parameter) in inside:
                assert (parameter.grad is not None) == ("o_proj" not in name), name
            else:
                assert parameter.grad is None or not parameter.grad.any(), name
    assert all(p.grad is None for p in teacher.parameters())


def test_padding_does_not_reach_the_loss(student, teacher, task):
    """The same samples with more padding give the same layer-wise and logit losses."""
    batch = task.source()(0, 6)
    extra = {"input_ids": 5, "attention_mask": 0, "answer_mask": False}
    padded = dict(batch)
    for key, value in extra.items():
        wide = torch.full((6, 3), value, dtype=batch[key].dtype)
        padded[key] = torch.cat([wide, batch[key]], 1)
    for step in (layerwise_loss, logit_loss):
        for mask in ("non_pad", "answer"):
            one, two = step(student, teacher, batch, mask=mask).loss, step(student, teacher, padded, mask=mask).loss
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_packed_sequences_do_not_mix(student, teacher):
    """Two sequences packed by position_ids count as the two apart."""
    ids = torch.randint(4, 30, (1, 14), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(6), torch.arange(8)])[None]
    packed = layerwise_loss(student, teacher, {"input_ids": ids, "position_ids": positions})
    apart = [layerwise_loss(student, teacher, {"input_ids": part}) for part in (ids[:, :6], ids[:, 6:])]
    expected = (6 * apart[0].loss + 8 * apart[1].loss) / 14
    torch.testing.assert_close(packed.loss, expected, rtol=1e-4, atol=1e-5)


def test_logit_loss_is_the_kl_of_full_runs(student, teacher, batch):
    inputs = model_inputs(batch)
    with torch.no_grad():
        ours, theirs = student(**inputs).logits, teacher(**inputs).logits
    result = logit_loss(student, teacher, batch, temperature=2.0, reduction="token_mean", mask="non_pad")
    mask = batch["attention_mask"].bool()
    expected = logit_kl(ours, theirs, mask, temperature=2.0, reduction="token_mean")
    torch.testing.assert_close(result.loss.detach(), expected)
    torch.testing.assert_close(result.metrics["kl"], expected)
    agree = (ours.argmax(-1) == theirs.argmax(-1))[mask].float().mean()
    torch.testing.assert_close(result.metrics["agreement"], agree)
    summed = logit_loss(student, teacher, batch, mask="all")
    torch.testing.assert_close(summed.metrics["kl"], summed.loss.detach() / ours.shape[1])


def test_a_hybrid_learns_only_its_linear_layers(student, teacher, batch):
    hybrid = restore_attention(student, teacher, [0, 1, 2])
    names = set_trainable(hybrid, ["mixer_new", "qkv"])
    assert {name.split(".mixer.")[0] for name in names} == {"model.layers.2"}
    layerwise_loss(hybrid, teacher, batch).loss.backward()
    assert all(p.grad is not None for n, p in hybrid.named_parameters() if n in names)


def test_errors(student, teacher, batch, make_teacher):
    with pytest.raises(ConfigError, match="Did you mean 'context'"):
        layerwise_loss(student, teacher, batch, target="contexts")
    with pytest.raises(ConfigError, match="must have linear layers"):
        layerwise_loss(teacher, teacher, batch)
    with pytest.raises(DataError, match="input_ids or inputs_embeds"):
        logit_loss(student, teacher, {"pixel_values": batch["images"]})
    with pytest.raises(ShapeError, match="vocab_size 50; got 40"):
        check_pair(student, make_teacher(vocab_size=50))
    with pytest.raises(ShapeError, match="5 layers; got 4"):
        check_pair(student, make_teacher(num_hidden_layers=4))
