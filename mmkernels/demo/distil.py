"""`mmkernels distill`: a recipe of any length on a saved teacher, resumable, on the demo's data."""

from pathlib import Path
from typing import Any

from mmkernels.data import CanvasTask
from mmkernels.demo.answer import load
from mmkernels.demo.data import canvas_processor
from mmkernels.demo.teacher import accuracy
from mmkernels.errors import ConfigError

# Far behind any teacher's own batches, so that the student is distilled on canvases the teacher was not trained on.
_FIRST_BATCH = 10_000_000


def distil_saved_teacher(
    config: Path,
    teacher_folder: Path,
    out: Path,
    *,
    source: str = "digits",
    label_words: str = "digits",
    resume: bool = False,
    questions: int = 2000,
) -> dict[str, float]:
    """Run a recipe; checkpoints, metrics.jsonl, TensorBoard logs and the finished student/ go to `out`.

    Args:
        config: recipe YAML, or the name of a packaged one ("demo", "paper", "official").
        teacher_folder: written by save_pretrained, e.g. out/teacher of the demo.
        out: folder of the run; an interrupted run is continued with `resume`.
        source, label_words: data, as for the demo.
        resume: continue from the last checkpoint; without it a folder that holds one is refused.
        questions: unseen questions asked of the finished student.

    Returns:
        Accuracy of the finished student.

    Raises:
        ConfigError: a recipe field is wrong, or the teacher does not speak the task's words.
        CheckpointError: no teacher, or checkpoints of another recipe in `out`.
    """
    from mmkernels.distill import load_recipe, run

    recipe = load_recipe(config)
    teacher, _ = load(teacher_folder)
    task = CanvasTask(source, label_words=label_words, seed=recipe.seed)
    if teacher.config.vocab_size != len(task.vocab):
        raise ConfigError(
            f"distill: teacher must know the {len(task.vocab)} words of the task; {teacher_folder} knows "
            f"{teacher.config.vocab_size}. Give --source and --labels as they were when it was trained."
        )

    def evaluate(student: Any) -> dict[str, float]:
        return accuracy(student, task, questions)

    result = run(
        recipe,
        teacher,
        None,
        task.source(start=_FIRST_BATCH),
        output_dir=out,
        resume=resume,
        tensorboard=True,
        evaluate=evaluate,
    )
    canvas_processor(task, result.student.config).save_pretrained(out / "student")
    scores = evaluate(result.student)
    print(f"accuracy: teacher {accuracy(teacher, task, questions)['all']:.3f}, student {scores['all']:.3f}")
    print(f"wrote {out / 'student'}")
    return scores
