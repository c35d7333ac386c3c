"""Trains AKI on captions (pretrain) or questions with answers (sft), one process or many, killed and resumed.

    python -m mmkernels.models.aki.train sft --model aki --data questions.jsonl --out out
    accelerate launch -m mmkernels.models.aki.train pretrain --model aki --data captions.jsonl --out out

A line of data is {"image": path or list of paths, "caption": ...} or {"image": ..., "question": ..., "answer": ...};
paths are relative to its file, "image" may be left out.  Nothing imports this program, so it may use mmkernels.distill.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmkernels.distill.supervised import Samples, SupervisedTrainer
from mmkernels.errors import CheckpointError, MMKernelsError
from mmkernels.models.aki.modeling_aki import AkiForConditionalGeneration
from mmkernels.models.aki.processing_aki import AkiProcessor
from mmkernels.models.aki.recipe_aki import AkiRecipe, load_recipe, make_optimizer

FIELDS = {"pretrain": [["caption"]], "sft": [["question", "answer"]]}


def make_batch(processor: AkiProcessor, recipe: AkiRecipe, rows: list[dict[str, Any]]) -> Mapping[str, Tensor]:
    """Ids, mask, labels and pixels of samples."""
    images, most = [row["image"] for row in rows], recipe.max_text_tokens
    if recipe.stage == "pretrain":
        return processor.for_pretraining([row["caption"] for row in rows], images, max_text_tokens=most)
    questions, answers = [row["question"] for row in rows], [row["answer"] for row in rows]
    return processor.for_sft(questions, answers, images, max_text_tokens=most)


class Trainer(SupervisedTrainer):
    """Runs a recipe: the vision tower is frozen, the attention mask is the stage's while it trains.

    Args:
        recipe, model, processor, out, progress: see `SupervisedTrainer`.
        files: of data.
    """

    def __init__(
        self,
        recipe: AkiRecipe,
        model: AkiForConditionalGeneration,
        processor: AkiProcessor,
        files: Sequence[Path],
        out: Path,
        *,
        progress: bool = True,
    ):
        super().__init__(
            recipe,
            model,
            processor,
            Samples(files, recipe, FIELDS[recipe.stage]),
            lambda rows: make_batch(processor, recipe, rows),
            make_optimizer,
            out,
            progress=progress,
        )

    def _begin(self) -> None:
        self.own_policy, self.model.config.policy = self.model.config.policy, self.recipe.policy
        super()._begin()
        self.model.vision_tower.eval()

    def _end(self) -> None:
        self.model.config.policy = self.own_policy


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status (2 for a mistake in the input)."""
    parser = argparse.ArgumentParser(prog="python -m mmkernels.models.aki.train", description="Train AKI.")
    parser.add_argument("recipe", help='a YAML file, or "pretrain" or "sft"')
    parser.add_argument("--model", type=Path, required=True, help="folder with a model and its processor")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="files of JSON lines")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints, metrics and the model")
    arguments = parser.parse_args(argv)
    try:
        recipe = load_recipe(arguments.recipe)
        if not (arguments.model / "config.json").is_file():
            raise CheckpointError(f"--model must be a folder written by save_pretrained; got {arguments.model}.")
        model = AkiForConditionalGeneration.from_pretrained(arguments.model, dtype=torch.float32)
        processor = AkiProcessor.from_pretrained(arguments.model)
        Trainer(recipe, model, processor, arguments.data, arguments.out).run()
    except MMKernelsError as error:
        print(f"train: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
