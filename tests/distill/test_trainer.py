import copy
import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mmkernels.distill import Distiller, DistillRecipe, dataset_source, iterable_source, linearize, run
from mmkernels.distill import checkpoint as ckpt
from mmkernels.errors import CheckpointError, ConfigError, DataError

SCRIPT = Path(__file__).parent / "train_tiny.py"


class StopError(RuntimeError):
    """Ends a run from inside, as a crash would."""


def crashing(source, at):
    def fetch(index, size):
        if index == at:
            raise StopError
        return source(index, size)

    return fetch


def records(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def same_weights(one, two):
    ours, theirs = one.state_dict(), two.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def test_every_stage_runs_and_is_logged(teacher, task, make_recipe, tmp_path):
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    seen = []
    recipe = make_recipe(eval_every=4)
    options = {"output_dir": tmp_path, "evaluate": lambda model: seen.append(model.training) or {"one": 1.0}}
    result = run(recipe, teacher, linearize(teacher), task.source(), **options)
    steps = [r for r in result.history if "loss" in r]
    assert [(r["stage"], r["step"]) for r in steps] == [(f"stage{s}", i) for s in (1, 2, 3) for i in range(1, 7)]
    assert [r["global_step"] for r in steps] == list(range(1, 19))
    assert steps[0]["lr"] == 0.0  # the warm-up starts at zero
    assert steps[1]["lr"] == 1.5e-3
    assert {"mse", "mse_max", "relative", "grad_norm"} <= steps[0].keys()
    assert {"kl", "agreement"} <= steps[-1].keys()
    assert [r["global_step"] for r in result.history if "eval_one" in r] == [4, 6, 10, 12, 16, 18]
    assert seen == [False] * 6
    assert records(tmp_path) == result.history
    assert result.student.config.layer_types == ["full_attention", *["linear_attention"] * 3]  # a hybrid from stage 3
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name])
    same_weights(type(teacher).from_pretrained(tmp_path / "student"), result.student)
    saved = ckpt.finished(tmp_path / "checkpoints")
    assert [path.name for path in saved] == ["step-00000012", "step-00000018"]  # the ends of stages, the latest two


def test_student_is_made_when_left_out(teacher, task, make_recipe):
    recipe = make_recipe(seeding="inherit", keep_attention=[1]).only("stage1")
    result = run(recipe, teacher, None, task.source())
    assert result.student.config.layer_types[1] == "full_attention"
    given = run(recipe, teacher, linearize(teacher, [1], seeding="inherit"), task.source())
    same_weights(result.student, given.student)


@pytest.mark.parametrize("at", [1, 5, 7, 13])
def test_resume_continues_to_the_same_numbers(teacher, task, make_recipe, tmp_path, at):
    recipe = make_recipe(checkpoint_every=2)
    whole = run(recipe, teacher, linearize(teacher), task.source(), output_dir=tmp_path / "whole")
    out = tmp_path / "cut"
    with pytest.raises(StopError):
        run(recipe, teacher, linearize(teacher), crashing(task.source(), at), output_dir=out)
    torch.manual_seed(123)  # a new process would not have the old random state either
    cut = run(recipe, teacher, linearize(teacher), task.source(), output_dir=out)
    assert cut.history == whole.history
    assert records(out) == whole.history
    same_weights(cut.student, whole.student)
    again = run(recipe, teacher, linearize(teacher), crashing(task.source(), 0), output_dir=out)  # nothing left to do
    assert again.history == whole.history
    same_weights(again.student, whole.student)


def test_dropout_resumes_too(make_teacher, task, make_recipe, tmp_path):
    # attention dropout in the student's kept layers draws from the random state that checkpoints carry
    recipe = make_recipe(checkpoint_every=2).only("stage3")
    teacher = make_teacher(attention_dropout=0.3)
    whole = run(recipe, teacher, linearize(teacher), task.source())
    other = run(dataclasses.replace(recipe, seed=5), teacher, linearize(teacher), task.source())
    assert whole.history != other.history  # dropout is active, or this test shows nothing
    with pytest.raises(StopError):
        run(recipe, teacher, linearize(teacher), crashing(task.source(), 3), output_dir=tmp_path)
    assert run(recipe, teacher, linearize(teacher), task.source(), output_dir=tmp_path).history == whole.history


def test_accumulation_equals_one_large_batch(teacher, make_recipe, task):
    big = task.source()(0, 4)

    def parts(index, size):
        return {k: v[(index * size) % 4 : (index * size) % 4 + size] for k, v in big.items()}

    whole = run(make_recipe(4).only("stage3"), teacher, linearize(teacher), lambda i, n: big)
    split = run(make_recipe(1).only("stage3"), teacher, linearize(teacher), parts)
    for one, two in zip(whole.history, split.history, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3)


def test_gradients_are_clipped(teacher, task, make_recipe):
    stage = dataclasses.replace(make_recipe().stages[0], max_grad_norm=1e-9, eps=1.0, weight_decay=0.0)
    student = linearize(teacher)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    run(dataclasses.replace(make_recipe(), stages=(stage,)), teacher, student, task.source())
    # with eps 1, an update is about lr * gradient: clipping to 1e-9 leaves next to nothing
    assert max((v - before[k]).abs().max() for k, v in student.state_dict().items()) < 1e-8


def test_loss_falls(teacher, task):
    """60 steps a stage: the layer-wise error falls to less than a sixth, then the divergence to less than half."""
    plan = {"warmup_steps": 5, "stable_steps": 45, "decay_steps": 10, "global_batch": 16, "micro_batch": 16}
    new = ["mixer_new", "mixer_decay"]
    stages = [
        {"name": "stage1", "loss": "layer_mse", "trainable": new, "lr": 1e-2, **plan},
        {"name": "stage2", "loss": "layer_mse", "trainable": [*new, "qkv"], "lr": 5e-3, **plan},
        {"name": "stage3", "loss": "logit_kl", "mask": "non_pad", "trainable": [*new, "qkv"], "lr": 2e-3, **plan},
    ]
    recipe = DistillRecipe.from_dict({"name": "fall", "stages": stages, "log_every": 1})
    history = run(recipe, teacher, linearize(teacher), task.source()).history
    first, last = ([r for r in history if r["step"] == step] for step in (1, 60))
    assert last[0]["loss"] < first[0]["loss"] / 4  # measured: 183 -> 28
    assert last[1]["loss"] < first[0]["loss"] / 6  # 14: unfreezing q, k, v goes further
    assert last[2]["loss"] < first[2]["loss"] / 2  # 0.55 -> 0.13


def test_another_recipe_is_refused(teacher, task, make_recipe, tmp_path):
    recipe = make_recipe(checkpoint_every=2)
    with pytest.raises(StopError):
        run(recipe, teacher, linearize(teacher), crashing(task.source(), 3), output_dir=tmp_path)
    other = dataclasses.replace(recipe, stages=(dataclasses.replace(recipe.stages[0], lr=7e-3), *recipe.stages[1:]))
    with pytest.raises(CheckpointError, match=r"stages\[0\].lr was 0.003 and is 0.007"):
        Distiller(other, teacher, linearize(teacher), task.source(), output_dir=tmp_path)
    with pytest.raises(CheckpointError, match="resume is False"):
        Distiller(recipe, teacher, linearize(teacher), task.source(), output_dir=tmp_path, resume=False)
    with pytest.raises(CheckpointError, match="this student's weights"):
        run(recipe, teacher, linearize(teacher, [1]), task.source(), output_dir=tmp_path)
    changed = copy.deepcopy(teacher)
    with torch.no_grad():
        changed.lm_head.weight[0, 0] += 1
    with pytest.raises(CheckpointError, match="teacher must be the one"):
        Distiller(recipe, changed, linearize(changed), task.source(), output_dir=tmp_path)
    logging = dataclasses.replace(recipe, log_every=2, about="other words", keep_checkpoints=1)
    Distiller(logging, teacher, linearize(teacher), task.source(), output_dir=tmp_path)  # changes no number


@pytest.mark.parametrize("name", ["student.safetensors", "state.pt", "manifest.json"])
@pytest.mark.parametrize("damage", ["missing", "short"])
def test_damaged_checkpoints_are_named(teacher, task, make_recipe, tmp_path, name, damage):
    recipe = make_recipe(checkpoint_every=2)
    with pytest.raises(StopError):
        run(recipe, teacher, linearize(teacher), crashing(task.source(), 5), output_dir=tmp_path)
    newest = ckpt.finished(tmp_path / "checkpoints")[-1]
    if damage == "missing":
        (newest / name).unlink()
    else:
        os.truncate(newest / name, (newest / name).stat().st_size // 2)
    with pytest.raises(CheckpointError, match="Delete that folder to go on from the one before"):
        Distiller(recipe, teacher, linearize(teacher), task.source(), output_dir=tmp_path)


def test_full_disk_leaves_the_last_good_checkpoint(teacher, task, make_recipe, tmp_path):
    recipe = make_recipe(checkpoint_every=2)
    whole = run(recipe, teacher, linearize(teacher), task.source())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(
        signal.SIGXFSZ, signal.SIG_IGN
    )  # then a write past the limit is an OSError, as on a full disk
    source = task.source()

    def shrinking(index, size):
        if index == 3:  # the second checkpoint is due after this batch: no file may exceed 20 kB from here on
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        return source(index, size)

    try:
        with pytest.raises(CheckpointError, match="Earlier checkpoints are intact"):
            run(recipe, teacher, linearize(teacher), shrinking, output_dir=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    assert run(recipe, teacher, linearize(teacher), source, output_dir=tmp_path).history == whole.history


def test_bad_data_and_settings(teacher, task, make_recipe, tmp_path):
    student = linearize(teacher)
    with pytest.raises(DataError, match="micro_batch = 4 samples; got 3"):
        run(make_recipe(), teacher, student, lambda i, n: task.source()(i, 3))
    with pytest.raises(DataError, match="max_length = 5 tokens"):
        run(make_recipe(max_length=5), teacher, student, task.source())
    with pytest.raises(ConfigError, match="output_dir must be given with tensorboard"):
        Distiller(make_recipe(), teacher, student, task.source(), tensorboard=True)
    stage = dataclasses.replace(make_recipe().stages[0], trainable=("o_proj",), target="context")
    with pytest.raises(ConfigError, match="parameters that its loss reaches"):
        run(dataclasses.replace(make_recipe(), stages=(stage,)), teacher, student, task.source())
    stage = dataclasses.replace(make_recipe().stages[0], lr=1e30, warmup_steps=0)
    with pytest.raises(ConfigError, match="must be finite"):
        run(dataclasses.replace(make_recipe(), stages=(stage,)), teacher, student, task.source())


def test_bfloat16_runs(teacher, task, make_recipe):
    result = run(make_recipe(precision="bf16"), teacher, linearize(teacher), task.source())
    plain = run(make_recipe(), teacher, linearize(teacher), task.source())
    assert next(result.student.parameters()).dtype == torch.float32
    assert result.history[0]["loss"] != plain.history[0]["loss"]
    assert result.history[0]["loss"] == pytest.approx(plain.history[0]["loss"], rel=0.05)


def test_tensorboard(teacher, task, make_recipe, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = make_recipe().only("stage1")
    history = run(recipe, teacher, linearize(teacher), task.source(), output_dir=tmp_path, tensorboard=True).history
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    scalars = events.Scalars("stage1/loss")
    assert [s.step for s in scalars] == [1, 2, 3, 4, 5, 6]
    assert [s.value for s in scalars] == pytest.approx([r["loss"] for r in history])


def test_dataset_source():
    source = dataset_source([{"input_ids": torch.tensor([i])} for i in range(10)], seed=3)
    epoch = torch.cat([source(i, 2)["input_ids"] for i in range(5)]).flatten()
    assert sorted(epoch.tolist()) == list(range(10))
    following = torch.cat([source(i, 2)["input_ids"] for i in range(5, 10)]).flatten()
    assert sorted(following.tolist()) == list(range(10))
    assert epoch.tolist() != following.tolist()
    assert torch.equal(source(3, 2)["input_ids"].flatten(), epoch[6:8])  # any batch, in any order
    across = source(3, 3)["input_ids"].flatten()  # samples 9, 10, 11: over the border of two epochs
    assert across.tolist() == [epoch[9].item(), *following[:2].tolist()]
    with pytest.raises(DataError, match="empty"):
        dataset_source([])


def test_iterable_source():
    items = [{"input_ids": torch.tensor([[i]])} for i in range(4)]
    source = iterable_source(items)
    assert [source(i, 1)["input_ids"].item() for i in (0, 1, 3, 4, 6)] == [0, 1, 3, 0, 2]
    assert source(2, 1)["input_ids"].item() == 2  # going back starts over
    with pytest.raises(DataError, match="not a generator that ends"):
        iterable_source(iter([]))(0, 1)


def launch(out, micro_batch, *options, processes=1, wait=True):
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [str(SCRIPT), str(out), str(micro_batch), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if wait:
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output.decode()[-3000:]
    return process


def wait_for_lines(process, path, count):
    deadline = time.monotonic() + 500
    while time.monotonic() < deadline:
        if path.is_file() and path.read_text().count("\n") >= count:
            return
        assert process.poll() is None, process.stdout.read().decode()[-3000:]
        time.sleep(0.005)
    raise AssertionError("the run did not get far enough")


@pytest.mark.slow
def test_kill_9_and_resume(tmp_path):
    launch(tmp_path / "whole", 4)
    for lines in (5, 14):
        process = launch(tmp_path / "cut", 4, "--slow", wait=False)
        wait_for_lines(process, tmp_path / "cut" / "metrics.jsonl", lines)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not (tmp_path / "cut" / "student").exists()
    launch(tmp_path / "cut", 4)
    assert records(tmp_path / "cut") == records(tmp_path / "whole")
    weights = [(tmp_path / name / "student" / "model.safetensors").read_bytes() for name in ("cut", "whole")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """Two gloo processes with half the micro-batch each follow the run of one; their checkpoint resumes on one, too."""
    launch(tmp_path / "two", 2, processes=2)
    launch(tmp_path / "one", 2)
    one, two = records(tmp_path / "one"), records(tmp_path / "two")
    assert [r["global_step"] for r in two] == list(range(1, 19))
    for ours, theirs in zip(one, two, strict=True):
        for key in ("loss", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3), (ours, theirs)
    checkpoints = tmp_path / "two" / "checkpoints"
    last = ckpt.finished(checkpoints)[-1]
    for path in last.iterdir():
        path.unlink()
    last.rmdir()
    launch(tmp_path / "two", 2)
    again = records(tmp_path / "two")
    assert again[:-2] == two[:-2]
    assert [r["loss"] for r in again] == pytest.approx([r["loss"] for r in one], rel=1e-3)
