"""Answer questions about images with several budgets of visual tokens.

A program, `python -m mmkernels.models.vtc_cls.evaluate`, that runs under accelerate launch on any number of devices.
Data is JSON lines {"image": path, "question": ..., "answer": ...}.
"""

import argparse
import json
import re
import sys
import time
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from mmkernels._progress import progress_bar
from mmkernels._recipes import read_fields, read_yaml, require
from mmkernels.errors import DataError, MMKernelsError
from mmkernels.models.common.images import load_image


@dataclass(frozen=True)
class EvaluationRecipe:
    """What to ask, and with how many tokens.

    Args:
        name: of the results.
        budgets: visual tokens of an image, one run each; None: all.
        num_layers: scoring layers of VTC-CLS.
        batch_size: questions at a time, on each device.
        max_new_tokens: of an answer, decoded greedily.
        prompt: with {question} in it, and <image> where the image goes.

    Raises:
        ConfigError: values out of range.
    """

    name: str
    budgets: tuple[int | None, ...]
    num_layers: int = 3
    batch_size: int = 8
    max_new_tokens: int = 128
    prompt: str = "USER: <image>\n{question} ASSISTANT:"

    def __post_init__(self) -> None:
        where = f"EvaluationRecipe {self.name!r}"
        budgets = bool(self.budgets) and all(b is None or b >= 1 for b in self.budgets)
        require(where, "budgets", self.budgets, budgets, "be a list of numbers of at least 1, or null for all tokens")
        for name in ("num_layers", "batch_size", "max_new_tokens"):
            require(where, name, getattr(self, name), getattr(self, name) >= 1, "be at least 1")
        require(where, "prompt", self.prompt, "{question}" in self.prompt, "hold {question}")


def load_recipe(source: str | Path) -> EvaluationRecipe:
    """Read a recipe from a YAML file, or "paper", which comes with the package.

    Example:
        >>> load_recipe("paper").budgets
        (None, 256, 128, 64)
    """
    folder = resources.files("mmkernels.models.vtc_cls").joinpath("recipes")
    bundled = {item.name[:-5]: item for item in folder.iterdir() if item.name.endswith(".yaml")}
    return read_fields(EvaluationRecipe, read_yaml("load_recipe", source, bundled), "load_recipe")


def read_questions(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file; images are paths relative to it, an answer is a text or a list of accepted ones.

    Raises:
        DataError: naming file and line.
    """
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"read_questions: path must be a readable text file; got {path} ({error}).") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: must be JSON; got {error}. One object a line.") from error
        if not isinstance(row, dict) or not all(name in row for name in ("image", "question", "answer")):
            raise DataError(f"{path}:{number}: must have image, question and answer; got {sorted(row)}. Add them.")
        rows.append({**row, "image": path.parent / row["image"]})
    if not rows:
        raise DataError(f"read_questions: {path} must hold at least one question; got none. Check the path.")
    return rows


def normalised(answer: str) -> str:
    """Small letters, no punctuation, no articles, single spaces.

    >>> normalised("  The cat. ")
    'cat'
    """
    words = re.sub(r"[^\w\s]", " ", answer.lower()).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def is_right(given: str, accepted: str | list[str]) -> bool:
    """Whether an answer is one of the accepted ones, word by word."""
    every = [accepted] if isinstance(accepted, str) else accepted
    return normalised(given) in {normalised(answer) for answer in every}


@torch.no_grad()
def answer(model: Any, processor: Any, rows: list[dict[str, Any]], recipe: EvaluationRecipe) -> list[str]:
    """Greedy answers to some questions, `batch_size` at a time."""
    answers: list[str] = []
    processor.tokenizer.padding_side = "left"
    parts = [rows[start : start + recipe.batch_size] for start in range(0, len(rows), recipe.batch_size)]
    bar = progress_bar(len(parts), "questions")
    for part in parts:
        inputs = processor(
            images=[load_image(row["image"]) for row in part],
            text=[recipe.prompt.replace("{question}", row["question"]) for row in part],
            padding=True,
            return_tensors="pt",
        ).to(model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        made = model.generate(**inputs, max_new_tokens=recipe.max_new_tokens, do_sample=False)
        answers += processor.tokenizer.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        bar.update()
    bar.close()
    return answers


def evaluate(model: Any, processor: Any, rows: list[dict[str, Any]], recipe: EvaluationRecipe) -> list[dict[str, Any]]:
    """One result for each budget: accuracy over all processes, and how long this one took.

    Args:
        model: a LLaVA that `mmkernels.prune` knows, or `VTCCLSForConditionalGeneration`.
        processor: its processor.
        rows: of `read_questions`.
        recipe: budgets, prompt, sizes.
    """
    from accelerate import PartialState
    from accelerate.utils import gather_object

    from mmkernels.interop.prune import prune

    state, results = PartialState(), []
    if hasattr(model, "keep_tokens"):
        model.keep_tokens(None)
    for budget in recipe.budgets:
        handle = None if budget is None else prune(model, "vtc_cls", num_keep=budget, num_layers=recipe.num_layers)
        start = time.perf_counter()
        with state.split_between_processes(rows) as mine:
            answers = answer(model, processor, mine, recipe)
        right = gather_object([is_right(a, row["answer"]) for a, row in zip(answers, mine, strict=True)])
        if handle is not None:
            handle.detach()
        results.append(
            {
                "budget": budget,
                "questions": len(right),
                "accuracy": sum(right) / len(right),
                "seconds": time.perf_counter() - start,
            }
        )
    return results


def table(results: list[dict[str, Any]]) -> str:
    """Results as a Markdown table."""
    rows = [
        f"| {r['budget'] or 'all'} | {r['questions']} | {100 * r['accuracy']:.1f} | {r['seconds']:.1f} |"
        for r in results
    ]
    return "\n".join(["| visual tokens | questions | accuracy, % | seconds |", "|---|---|---|---|", *rows])


def main(arguments: list[str] | None = None) -> int:
    """Run one recipe and write results.json."""
    parser = argparse.ArgumentParser(prog="python -m mmkernels.models.vtc_cls.evaluate", description=__doc__)
    parser.add_argument("recipe", help="a YAML file, or paper")
    parser.add_argument("--model", required=True, help="folder of a LLaVA-1.5 or VTC-CLS model with its processor")
    parser.add_argument("--data", type=Path, required=True, help="JSON lines of image, question, answer")
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json")
    options = parser.parse_args(arguments)
    try:
        recipe, rows = load_recipe(options.recipe), read_questions(options.data)
        from accelerate import PartialState
        from transformers import AutoModelForImageTextToText, AutoProcessor

        from mmkernels.models import vtc_cls  # noqa: F401  registers the Auto classes

        state = PartialState()
        model = AutoModelForImageTextToText.from_pretrained(options.model, dtype="auto").to(state.device).eval()
        results = evaluate(model, AutoProcessor.from_pretrained(options.model), rows, recipe)
    except MMKernelsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if state.is_main_process:
        options.out.mkdir(parents=True, exist_ok=True)
        content = {"recipe": asdict(recipe), "model": str(options.model), "results": results}
        (options.out / "results.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
