"""Trains ML-Mamba on captions (align), then on conversations (finetune), one process or many, killed and resumed.

    python -m mmkernels.models.ml_mamba.train align --lm mamba2-2.7b --vision dinov2 --vision siglip \
        --tokenizer gpt-neox --data captions.jsonl --out out/aligned
    accelerate launch -m mmkernels.models.ml_mamba.train finetune --model out/aligned/model --data mix.jsonl --out out

The first form puts a model together from pretrained parts, the language model's own weights included, around a new
connector; the second goes on with a saved one.  A line of data is {"image": path, "caption": ...}, {"image": path,
"question": ..., "answer": ...}, or LLaVA's {"image": path, "conversations": [{"from": "human", "value": ...}, {"from":
"gpt", ...}]}; paths are relative to its file, and "image" may be left out of conversations.  Nothing imports this
program, so it may use mmkernels.distill.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmkernels.distill.supervised import Samples, SupervisedTrainer
from mmkernels.errors import CheckpointError, ConfigError, DataError, MMKernelsError
from mmkernels.models.ml_mamba.configuration_ml_mamba import SCANS, VARIANTS
from mmkernels.models.ml_mamba.convert_ml_mamba import from_parts
from mmkernels.models.ml_mamba.modeling_ml_mamba import MLMambaForConditionalGeneration
from mmkernels.models.ml_mamba.processing_ml_mamba import MLMambaProcessor
from mmkernels.models.ml_mamba.recipe_ml_mamba import MLMambaRecipe, load_recipe, make_optimizer

# Without an image nothing that the align stage trains is used.
CONVERSATIONS = [["conversations"], ["question", "answer"]]
FIELDS = {"align": [["image", "caption"], ["image", "conversations"]]}
FIELDS |= {"finetune": CONVERSATIONS, "full-finetune": CONVERSATIONS}
_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant"}


def turns(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """A sample as turns of user and assistant.

    >>> turns({"question": "Who?", "answer": "Me."})[1]
    {'role': 'assistant', 'content': 'Me.'}

    Raises:
        DataError: turns without "from" and "value", or of others.
    """
    if "conversations" not in row:
        return [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
    try:
        return [{"role": _ROLES[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]
    except (KeyError, TypeError) as error:
        raise DataError(
            f"train: conversations must be turns {{'from': 'human' or 'gpt', 'value': text}}; got "
            f"{row['conversations']!r} ({error})."
        ) from error


def make_batch(processor: MLMambaProcessor, recipe: MLMambaRecipe, rows: list[dict[str, Any]]) -> Mapping[str, Tensor]:
    """Ids, mask, labels and pixels of samples; in the align stage the last answer of a conversation is the caption."""
    images, most = [row["image"] for row in rows], recipe.max_text_tokens
    if recipe.stage == "align":
        captions = [row.get("caption") or turns(row)[-1]["content"] for row in rows]
        return processor.for_align(captions, images, max_text_tokens=most)
    return processor.for_sft([turns(row) for row in rows], None, images, max_text_tokens=most)


class Trainer(SupervisedTrainer):
    """Runs a recipe.

    Args:
        recipe, model, processor, out, progress: see `SupervisedTrainer`.
        files: of data.
    """

    def __init__(
        self,
        recipe: MLMambaRecipe,
        model: MLMambaForConditionalGeneration,
        processor: MLMambaProcessor,
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

    def _targets(self, batch: Mapping[str, Tensor]) -> Tensor:
        # The first word of a caption is predicted by the image's last embedding.
        first = batch["labels"][:, 0] != -100
        having = batch.get("has_image")
        return super()._targets(batch) + (0 if having is None else (first & having).sum())


def _parts(arguments: argparse.Namespace) -> tuple[MLMambaForConditionalGeneration, MLMambaProcessor]:
    """The model and its processor, saved together or put together."""
    pieces = {"--lm": arguments.lm, "--vision": arguments.vision, "--tokenizer": arguments.tokenizer}
    given = [name for name, value in pieces.items() if value]
    if arguments.model is not None:
        if given:
            raise ConfigError(f"train: --model must come alone; got {given[0]} as well. A saved model has its parts.")
        if not (arguments.model / "config.json").is_file():
            raise CheckpointError(f"--model must be a folder written by save_pretrained; got {arguments.model}.")
        model = MLMambaForConditionalGeneration.from_pretrained(arguments.model, dtype=torch.float32)
        return model, MLMambaProcessor.from_pretrained(arguments.model)
    if len(given) != len(pieces):
        lost = [name for name in pieces if name not in given]
        raise ConfigError(f"train: a model must be given, or its parts; got no {', '.join(lost)} and no --model.")
    from transformers import AutoTokenizer

    kind = {"connector_variant": arguments.connector, "connector_scan": arguments.scan}
    model = from_parts(arguments.lm, arguments.vision, **kind).float()
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    return model, MLMambaProcessor.from_config(tokenizer, model.config)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status (2 for a mistake in the input)."""
    parser = argparse.ArgumentParser(prog="python -m mmkernels.models.ml_mamba.train", description="Train ML-Mamba.")
    parser.add_argument("recipe", help='a YAML file, or "align" or "finetune"')
    parser.add_argument("--model", type=Path, help="folder with a model and its processor")
    parser.add_argument("--lm", type=Path, help="or: a Mamba-2 checkpoint of state-spaces, transformers or ours")
    parser.add_argument("--vision", type=Path, action="append", help="and a pretrained tower, once for each")
    parser.add_argument("--tokenizer", type=Path, help="and the language model's tokenizer")
    parser.add_argument("--connector", choices=VARIANTS, default="msc_advanced", help="of a model put together")
    parser.add_argument("--scan", choices=SCANS, default="bidirectional", help="of a model put together")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="files of JSON lines")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints, metrics and the model")
    arguments = parser.parse_args(argv)
    try:
        recipe = load_recipe(arguments.recipe)
        torch.manual_seed(recipe.seed)  # of a new connector
        model, processor = _parts(arguments)
        Trainer(recipe, model, processor, arguments.data, arguments.out).run()
    except MMKernelsError as error:
        print(f"train: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
