"""The main job at a size that takes seconds: it runs through, and what it writes can be used."""

import json
import shutil

import pytest
import torch
from PIL import Image

from mmkernels import CheckpointError, ConfigError, DataError
from mmkernels.cli import main
from mmkernels.demo import DemoSettings, run_demo
from mmkernels.demo.report import decode_table, human_bytes, targets
from mmkernels.demo.scaling import cache_bytes, decode_series, prepared_cache


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    threads = torch.get_num_threads()
    settings = DemoSettings(
        out=out, teacher_steps=12, stage_scale=0.02, questions=60, contexts=(64, 256), controls=False
    )
    results = run_demo(settings)
    torch.set_num_threads(threads)
    return out, results


def test_everything_promised_is_written(finished):
    out, results = finished
    written = json.loads((out / "report.json").read_text())
    assert written["accuracy"].keys() == results["accuracy"].keys()
    assert {"teacher", "linear_seeded", "linear_stage1", "linear_stage2", "linear_stage3", "hybrid_stage3"} <= set(
        written["accuracy"]
    )
    for picture in ("accuracy.png", "scaling.png"):
        with Image.open(out / picture) as image:
            assert image.width > 600
    report = (out / "report.md").read_text()
    for fact in ("seed 0", "torch ", "command", results["machine"]["processor"]):
        assert fact in report


def test_the_three_models_load_and_differ_in_their_mixers(finished):
    from mmkernels.models.mmmamba import MMMambaForConditionalGeneration

    out, _ = finished
    kinds = {
        name: MMMambaForConditionalGeneration.from_pretrained(out / name).config.layer_types
        for name in ("teacher", "hybrid", "linear")
    }
    assert set(kinds["teacher"]) == {"full_attention"}
    assert set(kinds["linear"]) == {"linear_attention"}
    assert kinds["hybrid"] == ["full_attention"] + ["linear_attention"] * 3


def test_generate_answers_with_one_known_word(finished, capsys):
    out, _ = finished
    image = next((out / "canvases").glob("*.png"))
    status = main(["generate", "--model", str(out / "linear"), "--image", str(image), "--question", "how many three ?"])
    assert status == 0
    assert len(capsys.readouterr().out.split()) <= 1


def test_the_processor_makes_what_the_model_was_trained_on(finished):
    from mmkernels.demo.answer import load
    from mmkernels.demo.steps import canvas_task

    out, _ = finished
    task = canvas_task(DemoSettings())
    batch = task.batch(0, 6, split="test")
    _, processor = load(out / "linear")
    for i, path in enumerate(sorted((out / "canvases").glob("*.png"))):
        inputs = processor(task.decode(batch["question_ids"][i]), images=path)
        real = batch["attention_mask"][i].bool()
        assert inputs["input_ids"][0].tolist() == batch["input_ids"][i][real].tolist()
        # a PNG holds 8 bits a pixel
        torch.testing.assert_close(
            inputs["pixel_values"].reshape(-1), batch["images"][i].reshape(-1), atol=1 / 255, rtol=0
        )


@pytest.mark.parametrize(
    ("question", "said"),
    [("what is in the toplefft ?", "topleft"), ("", "question"), ("how many dinosaurs ?", "dinosaurs")],
)
def test_bad_questions_name_the_word(finished, capsys, question, said):
    out, _ = finished
    image = next((out / "canvases").glob("*.png"))
    assert main(["generate", "--model", str(out / "linear"), "--image", str(image), "--question", question]) == 2
    assert said in capsys.readouterr().err


def test_a_file_that_is_no_image_is_refused(finished, tmp_path):
    from mmkernels.demo.answer import answer

    fake = tmp_path / "note.png"
    fake.write_text("not a picture")
    with pytest.raises(DataError, match=r"note\.png"):
        answer(finished[0] / "linear", fake, "how many three ?")


def test_a_folder_without_a_model_is_refused(tmp_path):
    from mmkernels.demo.answer import load

    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(tmp_path)


def test_damaged_weights_are_refused_before_anything_is_answered(finished, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    out, _ = finished
    image = str(next((out / "canvases").glob("*.png")))
    good = load_file(out / "linear" / "model.safetensors")
    name = "model.layers.0.mixer.A_log_bias"
    changes = {
        "nan": {**good, name: torch.full_like(good[name], float("nan"))},
        "missing": {k: v for k, v in good.items() if k != name},
        "extra": {**good, "stranger": torch.ones(2)},
        "truncated": None,
    }
    for kind, weights in changes.items():
        folder = tmp_path / kind
        shutil.copytree(out / "linear", folder)
        file = folder / "model.safetensors"
        if weights is None:
            file.write_bytes(file.read_bytes()[:10_000])
        else:
            save_file(weights, file, metadata={"format": "pt"})
        status = main(["generate", "--model", str(folder), "--image", image, "--question", "how many three ?"])
        error = capsys.readouterr().err
        assert status == 2, kind
        wanted = {"extra": "stranger", "truncated": "model.safetensors"}.get(kind, name)
        assert wanted in error, (kind, error)


@pytest.mark.parametrize("field", [{"teacher_steps": 0}, {"stage_scale": 0.0}, {"contexts": ()}, {"questions": 0}])
def test_settings_are_checked(field):
    with pytest.raises(ConfigError, match=next(iter(field))):
        DemoSettings(**field)


def test_cache_bytes_are_the_formula(finished):
    """Attention: 2 x kv_heads x headdim floats a token and layer; linear: constant states."""
    from mmkernels.demo.answer import load

    teacher, _ = load(finished[0] / "teacher")
    linear, _ = load(finished[0] / "linear")
    c = teacher.config
    room = 4
    measured = [cache_bytes(prepared_cache(teacher, context, room)) for context in (100, 300)]
    per_token = 4 * 2 * c.num_key_value_heads * c.head_dim * c.total_layers
    assert measured[1] - measured[0] == 200 * per_token
    assert measured[0] == pytest.approx((100 + room) * per_token, abs=256)
    growth = cache_bytes(prepared_cache(linear, 300, room)) - cache_bytes(prepared_cache(linear, 100, room))
    # a byte a token tells generate how long the sequence is; the states themselves do not grow
    assert growth <= 2 * 200
    states = 4 * c.num_attention_heads * c.head_dim**2 * c.total_layers
    assert cache_bytes(prepared_cache(linear, 100, room)) > states


def test_decode_series_times_every_model_at_every_context(finished):
    from mmkernels.demo.answer import load

    linear, _ = load(finished[0] / "linear")
    series = decode_series({"teacher": linear, "linear": linear}, (32, 64), repeats=2, warmup=1)
    assert all(len(row["milliseconds"]) == 2 and min(row["milliseconds"]) > 0 for row in series["models"].values())
    assert "| 64 |" in decode_table(series)


def test_targets_can_fail():
    good = {"teacher": 0.96, "linear_seeded": 0.1, "linear_stage1": 0.3, "linear_stage2": 0.5, "linear_stage3": 0.95}
    scores = {name: {"all": value} for name, value in {**good, "scratch_seeding_stage3": 0.7}.items()}
    assert all(met for _, met in targets(scores))
    for worse in ({"teacher": 0.9}, {"linear_stage3": 0.9}, {"linear_stage1": 0.6}, {"scratch_seeding_stage3": 0.96}):
        changed = {**scores, **{name: {"all": value} for name, value in worse.items()}}
        assert not all(met for _, met in targets(changed)), worse


def test_human_bytes():
    assert [human_bytes(n) for n in (12, 1536, 3 * 2**20)] == ["12 B", "1.5 KiB", "3.0 MiB"]


def test_distill_runs_a_recipe_and_resumes(finished, tmp_path):
    from mmkernels.demo.distil import distil_saved_teacher
    from mmkernels.distill import load_recipe

    recipe = tmp_path / "short.yaml"
    import yaml

    recipe.write_text(yaml.safe_dump(load_recipe("demo").scaled(0.01).to_dict()))
    teacher, out = finished[0] / "teacher", tmp_path / "run"
    scores = distil_saved_teacher(recipe, teacher, out, questions=30)
    assert 0 <= scores["all"] <= 1
    assert (out / "student" / "model.safetensors").is_file()
    with pytest.raises(CheckpointError, match="resume"):
        distil_saved_teacher(recipe, teacher, out, questions=30)
    assert distil_saved_teacher(recipe, teacher, out, resume=True, questions=30) == scores
