"""The comparison of ways to attend: the arms differ in mask and order alone, the leak is caught, the command runs."""

import json

import pytest
import torch
from PIL import Image

from mmkernels import ConfigError, DataError, check_no_label_leak
from mmkernels.cli import main
from mmkernels.demo.mma import ARMS, MMASettings
from mmkernels.demo.mma.arms import answered_ids, arm_mask, prompt_ids
from mmkernels.demo.mma.report import findings, spread, table
from mmkernels.demo.mma.run import leak_refusal
from mmkernels.demo.mma.train import check_arm, evaluate, fresh_model, majority, train_arm, training_batch

BY_KEY = {arm.key: arm for arm in ARMS}
IMAGE, WORDS = 9, 6
LENGTH = IMAGE + WORDS + 1  # patches, "what is in the topleft ?", the answer
TINY = MMASettings(steps=3, batch_size=4, questions=20, points=2)


@pytest.fixture(scope="module")
def task():
    return MMASettings().task(0)


@pytest.fixture(scope="module")
def batch(task):
    return task.batch(0, 3)


def beyond_causal(mask):
    keep = mask.dense()
    causal = torch.ones_like(keep).tril()
    assert (keep | ~causal).all(), "an arm must not close what causal attention has open"
    return keep & ~causal


@pytest.mark.parametrize("key", ["causal", "question_first", "dual_order"])
def test_plain_arms_are_causal(task, batch, key):
    for order in BY_KEY[key].orders:
        ids, _, mask = training_batch(task, BY_KEY[key], order, batch)
        assert ids.shape == (3, LENGTH)
        assert not beyond_causal(mask).any()


@pytest.mark.parametrize(
    ("key", "columns"),
    [
        ("mma", range(IMAGE, IMAGE + WORDS)),
        ("bidirectional", range(IMAGE)),
        ("leak", range(IMAGE, LENGTH)),
    ],
)
def test_what_each_mask_opens(task, batch, key, columns):
    _, _, mask = training_batch(task, BY_KEY[key], "image_first", batch)
    wanted = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
    wanted[:IMAGE, list(columns)] = True
    assert torch.equal(beyond_causal(mask), (wanted & ~torch.ones_like(wanted).tril()).expand(3, -1, -1))


def test_orders_hold_the_same_tokens(task, batch):
    first, after = prompt_ids(task, batch, "image_first"), prompt_ids(task, batch, "question_first")
    assert torch.equal(first, batch["input_ids"])
    assert torch.equal(first.sort(1).values, after.sort(1).values)
    assert (after[:, -1] == task.word_id["?"]).all()
    assert (after[:, WORDS - 1 : -1] == task.image_id).all()
    assert torch.equal(after[:, : WORDS - 1], batch["question_ids"][:, :-1])


def test_dual_order_changes_halfway_and_ends_as_it_is_tested():
    dual = BY_KEY["dual_order"]
    orders = [dual.order_at(step, 10) for step in range(1, 11)]
    assert orders == ["question_first"] * 5 + ["image_first"] * 5
    assert all(BY_KEY["mma"].order_at(step, 10) == "image_first" for step in range(1, 11))


def test_order_acts_through_the_mask_alone(task, batch):
    """Under a mask that shows everything to everybody, the two orders say the same about the same tokens."""
    from mmkernels import MMAMask

    model, full = fresh_model(task, 0), MMAMask.full(LENGTH - 1, batch=3)
    first, after = (prompt_ids(task, batch, order) for order in ("image_first", "question_first"))
    said = [model(ids, batch["images"], full)[:, -1] for ids in (first, after)]
    torch.testing.assert_close(said[0], said[1], rtol=1e-4, atol=1e-5)
    masked = [model(ids, batch["images"], arm_mask(BY_KEY["causal"], task, ids))[:, -1] for ids in (first, after)]
    assert (masked[0] - masked[1]).abs().max() > 1e-2


def test_question_reaches_the_image_in_mma_only(task, batch):
    model = fresh_model(task, 0)
    ids = prompt_ids(task, batch, "image_first")
    other = ids.clone()
    other[:, -2] = task.word_id["bottomright"]
    assert not torch.equal(ids, other)
    for key, changes in (("causal", False), ("bidirectional", False), ("mma", True)):
        said = [model(x, batch["images"], arm_mask(BY_KEY[key], task, x))[:, :IMAGE] for x in (ids, other)]
        assert bool((said[0] - said[1]).abs().max() > 1e-3) == changes, key


def test_the_answer_reaches_its_prediction_in_the_leak_only(task, batch):
    model, prompts = fresh_model(task, 0), prompt_ids(task, batch, "image_first")
    for arm in ARMS[:3] + ARMS[5:]:
        said = []
        for shift in (0, 1):
            ids, _ = answered_ids(prompts, batch["answer_ids"] - shift)
            said.append(model(ids, batch["images"], arm_mask(arm, task, ids))[:, -2])
        assert bool((said[0] - said[1]).abs().max() > 1e-3) == (arm.key == "leak"), arm.key


def test_the_leak_is_caught_unless_told_to_let_it_pass(task):
    for arm in ARMS:
        if arm.key != "leak":
            check_arm(task, arm)
    with pytest.raises(DataError, match="check_no_label_leak"):
        train_arm(BY_KEY["leak"], TINY, 0)
    assert "token 15" in leak_refusal(task)
    result = train_arm(BY_KEY["leak"], TINY, 0, allow_label_leak=True)
    assert len(result["answer_loss"]) == TINY.steps


def test_a_prompt_without_its_answer_leaks_nothing(task, batch):
    """What the leaky rule opens at evaluation is what MMA opens: the fault is in training alone."""
    ids = prompt_ids(task, batch, "image_first")
    leak, honest = (arm_mask(BY_KEY[key], task, ids) for key in ("leak", "mma"))
    assert torch.equal(leak.dense(), honest.dense())
    check_no_label_leak(torch.full_like(ids, -100), leak)


def test_arms_start_from_the_same_weights_and_see_the_same_batches():
    """Causal and dual order (second half) share everything, so with one order only they are the same run."""
    from dataclasses import replace

    alike = replace(BY_KEY["dual_order"], orders=("image_first",))
    assert train_arm(BY_KEY["causal"], TINY, 0) == train_arm(alike, TINY, 0)
    assert train_arm(BY_KEY["causal"], TINY, 0) != train_arm(BY_KEY["causal"], TINY, 1)
    assert train_arm(BY_KEY["causal"], TINY, 0) != train_arm(BY_KEY["mma"], TINY, 0)


def test_a_model_that_knows_scores_one(task, monkeypatch):
    """The scores read the right places: logits made from the truth are all right."""
    truth = {}
    real = task.batch

    def remember(*args, **kwargs):
        truth.update(real(*args, **kwargs))
        return dict(truth)

    def oracle(ids, images, mask):
        logits = torch.zeros(*ids.shape, len(task.vocab))
        logits[ids == task.image_id] = torch.eye(len(task.vocab))[truth["image_labels"].flatten()]
        logits[:, -1] = torch.eye(len(task.vocab))[truth["answer_ids"]]
        return logits

    monkeypatch.setattr(task, "batch", remember)
    for arm in (BY_KEY["mma"], BY_KEY["question_first"]):
        assert evaluate(oracle, arm, task, 300) == {"accuracy": 1.0, "cells_read": 1.0}
    assert 0.1 < majority(task, 300) < 0.4


def test_the_command_writes_table_curves_masks_and_figures(tmp_path, capsys):
    out = tmp_path / "mma"
    command = ["demo", "--task", "mma", "--out", str(out), "--steps", "4", "--quick", "--seeds", "2"]
    assert main([*command, "--arms", "causal,mma,leak"]) == 0
    said = capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert list(results["runs"]) == ["causal", "mma", "leak"]
    assert list(results["runs"]["mma"]) == ["0", "1"]
    assert results["leak_refused_with"]
    for picture in ("curves.png", "masks.png"):
        with Image.open(out / picture) as image:
            assert image.width > 600
    report = (out / "report.md").read_text()
    assert table(results) in report
    assert table(results) in said
    assert "nothing here says that a causal model cannot" in report
    assert "bidirectional" not in table(results)


def test_processes_and_one_process_agree(tmp_path):
    from dataclasses import replace

    from mmkernels.demo.jobs import train_all
    from mmkernels.demo.mma.train import train_one

    settings, ended = replace(TINY, arms=("causal", "mma")), []
    found = [
        train_all(
            replace(settings, workers=n),
            train_one,
            settings.steps,
            lambda arm, seed, result: ended.append((arm.key, seed)),
        )
        for n in (1, 2)
    ]
    assert found[0] == found[1]
    assert sorted(ended) == [("causal", 0), ("causal", 0), ("mma", 0), ("mma", 0)]


def test_findings_can_fail():
    def run(accuracy, loss):
        return {0: {"accuracy": accuracy, "answer_loss": [loss] * 30}}

    good = {"causal": run(0.3, 2.0), "mma": run(0.95, 0.1), "leak": run(0.1, 0.001)}
    settings = {"steps": 30}
    assert all(met for _, met in findings({"runs": good, "settings": settings, "leak_refused_with": "refused"}))
    bad = {"causal": run(0.9, 2.0), "mma": run(0.95, 0.1), "leak": run(0.9, 0.5)}
    assert not any(met for _, met in findings({"runs": bad, "settings": settings, "leak_refused_with": ""}))
    assert spread([0.25]) == "0.250"
    assert spread([0.2, 0.4]) == "0.300 (0.200-0.400)"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--task", "mma", "--steps", "0"], "steps"),
        (["--task", "mma", "--arms", "cuasal"], "causal"),
        (["--task", "mma", "--data", "no/such/folder"], "no/such/folder"),
        (["--task", "mma", "--no-controls"], "--no-controls"),
        (["--seeds", "2"], "--seeds"),
    ],
)
def test_a_mistake_is_told_before_anything_is_trained(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.json"))


def test_settings_are_checked():
    for field in ({"seeds": 0}, {"learning_rate": 0.0}, {"workers": 0}, {"arms": ("mma", "mma")}, {"arms": ()}):
        with pytest.raises(ConfigError, match=next(iter(field))):
            MMASettings(**field)


@pytest.mark.slow
def test_images_that_read_the_question_learn_it_sooner():
    settings = MMASettings(steps=250, questions=500, points=1)
    score = {key: train_arm(BY_KEY[key], settings, 0)["accuracy"] for key in ("causal", "mma")}
    assert score["mma"] > 0.75
    assert score["mma"] - score["causal"] > 0.3
