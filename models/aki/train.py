"""Trains AKI on captions (pretrain) or questions with answers (sft), one process or many, killed and resumed.

    python -m mmkernels.models.aki.train sft --model aki --data questions.jsonl --out out
    accelerate launch -m mmkernels.models.aki.train pretrain --model aki --data captions.jsonl --out out

A line of data is {"image": path or list of paths, "caption": ...} or {"image": ..., "question": ..., "answer": ...};
paths are relative to its file, "image" may be left out.  Nothing imports this program, so it may use mmkernels.distill.
"""

import argparse
import copy
import json
import math
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmkernels._progress import progress_bar
from mmkernels.distill import checkpoint as ckpt
from mmkernels.errors import CheckpointError, ConfigError, DataError, MMKernelsError
from mmkernels.models.aki.modeling_aki import AkiForConditionalGeneration
from mmkernels.models.aki.processing_aki import AkiProcessor
from mmkernels.models.aki.recipe_aki import AkiRecipe, load_recipe, make_optimizer

FIELDS = {"pretrain": ("caption",), "sft": ("question", "answer")}


class Samples:
    """Lines of files in an order that depends on the recipe's seed alone.

    Args:
        files: of JSON lines, see the module.
        recipe: its stage says which fields a line has, its weights how often a file is drawn from.

    Raises:
        DataError: a file that is missing or empty, or a line without the fields, by file and number.
        ConfigError: as many weights as files are needed.
    """

    def __init__(self, files: Sequence[Path], recipe: AkiRecipe):
        if recipe.weights is not None and len(recipe.weights) != len(files):
            raise ConfigError(
                f"Samples: weights must be one per data file; got {len(recipe.weights)} for {len(files)} files."
            )
        self.recipe, self.parts = recipe, [_lines(file, FIELDS[recipe.stage]) for file in files]
        self.all = [line for part in self.parts for line in part]
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Sample `number` of an endless run."""
        seed, weights = self.recipe.seed, self.recipe.weights
        if weights is not None:
            rng = np.random.default_rng((seed, number))
            part = self.parts[rng.choice(len(weights), p=np.array(weights) / sum(weights))]
            return part[rng.integers(len(part))]
        epoch, place = divmod(number, len(self.all))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng((seed, epoch)).permutation(len(self.all))
        return self.all[self._order[place]]

    def batch(self, number: int, processor: AkiProcessor) -> dict[str, Tensor]:
        """Micro-batch `number`: ids, mask, labels and pixels."""
        size, most = self.recipe.micro_batch, self.recipe.max_text_tokens
        rows = [self[number * size + i] for i in range(size)]
        images = [row["image"] for row in rows]
        if self.recipe.stage == "pretrain":
            return dict(processor.for_pretraining([row["caption"] for row in rows], images, max_text_tokens=most))
        questions, answers = [row["question"] for row in rows], [row["answer"] for row in rows]
        return dict(processor.for_sft(questions, answers, images, max_text_tokens=most))


def _lines(file: Path, fields: tuple[str, ...]) -> list[dict[str, Any]]:
    try:
        raw = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Samples: data must be a readable file; got {file}: {error}. Check the path.") from error
    if not raw:
        raise DataError(f"Samples: data must hold at least one line; got none in {file}. Leave the file out.")
    lines = []
    for number, text in enumerate(raw, 1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"Samples: every line must be JSON; got {error} in line {number} of {file}.") from error
        missing = [f for f in fields if not isinstance(line, dict) or not line.get(f)]
        if missing:
            raise DataError(
                f"Samples: every line must have {', '.join(fields)}; line {number} of {file} lacks {missing}."
            )
        named = line.get("image") or []
        lines.append({**line, "image": [file.parent / n for n in ([named] if isinstance(named, str) else named)]})
    return lines


class Trainer:
    """Runs a recipe.

    Args:
        recipe: what to do.
        model: trained in place, its vision tower frozen.
        processor: the model's.
        files: of data.
        out: checkpoints/, metrics.jsonl and the finished model/; a run found there goes on.
        progress: show a bar.

    Raises:
        ConfigError: a batch that does not divide among the processes.
        CheckpointError: out holds another run.
        DataError: see `Samples`.
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
        from accelerate import Accelerator, DistributedDataParallelKwargs

        # a batch without images leaves the resampler out
        options = [DistributedDataParallelKwargs(find_unused_parameters=True)]
        self.accelerator = Accelerator(mixed_precision="no", kwargs_handlers=options)
        together = recipe.micro_batch * self.accelerator.num_processes
        if recipe.global_batch % together:
            raise ConfigError(
                f"Trainer: global_batch must be a multiple of micro_batch x processes = {together}; got "
                f"{recipe.global_batch}. Change micro_batch or the number of processes."
            )
        self.recipe, self.model, self.processor, self.out = recipe, model, processor, out
        self.micro_steps, self.samples = recipe.global_batch // together, Samples(files, recipe)
        self.show = progress and self.accelerator.is_main_process
        self.origin, self.at = ckpt.fingerprint(model), ckpt.Progress()
        found = ckpt.finished(out / "checkpoints")
        self.latest = found[-1] if found else None
        if self.latest is not None:
            ckpt.read_manifest(self.latest, recipe, self.origin)

    def run(self) -> list[dict[str, Any]]:
        """Trains what is left, saves the model, and returns the log of the whole run.  Seeds the random generators."""
        from accelerate.utils import set_seed

        set_seed(self.recipe.seed, device_specific=True)
        own_policy, self.model.config.policy = self.model.config.policy, self.recipe.policy
        optimizer = make_optimizer(self.model, self.recipe)
        if self.latest is not None:
            state, self.at, random = ckpt.load_checkpoint(self.latest, self.model)
            optimizer.load_state_dict(state)
            ckpt.restore_random_state(random[self.accelerator.process_index % len(random)])
        self.history = self._open_log()
        model, prepared = self.accelerator.prepare(self.model.train(), optimizer)
        self.model.vision_tower.eval()
        with progress_bar(self.recipe.steps, self.recipe.name, initial=self.at.step, show=self.show) as bar:
            while self.at.step < self.recipe.steps:
                self._step(model, prepared)
                bar.update()
                if self._due(self.recipe.checkpoint_every):
                    self._save(prepared)
        self.model.config.policy = own_policy
        if self.accelerator.is_main_process:
            self.model.eval().save_pretrained(self.out / "model")
            self.processor.save_pretrained(self.out / "model")
        self.accelerator.wait_for_everyone()
        return self.history

    def _due(self, every: int) -> bool:
        return self.at.step == self.recipe.steps or bool(every and self.at.step % every == 0)

    def _step(self, model: Any, optimizer: Any) -> None:
        """One optimizer step: one mean over all supervised tokens of the global batch, however it is cut."""
        recipe, device = self.recipe, self.accelerator.device
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        numbers = [self.at.position + micro * processes + rank for micro in range(self.micro_steps)]
        batches = [self.samples.batch(number, self.processor) for number in numbers]
        batches = [{key: value.to(device) for key, value in batch.items()} for batch in batches]
        targets = torch.stack([(batch["labels"][:, 1:] != -100).sum() for batch in batches]).sum()
        targets = self.accelerator.reduce(targets, reduction="sum")
        rate = recipe.learning_rate(self.at.step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        total = torch.zeros((), device=device)
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            with (
                nullcontext() if last else self.accelerator.no_sync(model),
                torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"),
            ):
                loss = model(**batch, num_items_in_batch=targets, use_cache=False).loss
                # data-parallel gradients are averaged over processes, the loss is a sum over them
                self.accelerator.backward(loss * processes)
            total += loss.detach()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        norm = self.accelerator.clip_grad_norm_(trained, recipe.max_grad_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        self.at.step += 1
        self.at.global_step += 1
        self.at.position += self.micro_steps * processes
        if self._due(recipe.log_every) or self._due(recipe.checkpoint_every):
            self._log(self.accelerator.reduce(total, reduction="sum"), rate, norm)

    def _log(self, loss: Tensor, rate: float, norm: Any) -> None:
        record = {"step": self.at.step, "loss": float(loss), "lr": rate, "grad_norm": float(norm)}
        if not all(map(math.isfinite, record.values())):
            raise ConfigError(
                f"Trainer: loss and gradients must be finite; got {record}. Lower lr, or check the data; earlier "
                "checkpoints are intact."
            )
        self.history.append(record)
        if self.accelerator.is_main_process:
            with (self.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def _open_log(self) -> list[dict[str, Any]]:
        """The log up to the checkpoint; what a killed run had logged after it is dropped."""
        path, history = self.out / "metrics.jsonl", []
        if self.at.step and path.is_file():
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
            history = [record for record in map(json.loads, lines) if record["step"] <= self.at.step]
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.out.mkdir(parents=True, exist_ok=True)
            fresh = path.with_suffix(".tmp")
            fresh.write_text("".join(json.dumps(record) + "\n" for record in history), encoding="utf-8")
            os.replace(fresh, path)
        return history

    def _save(self, optimizer: Any) -> None:
        from accelerate.utils import gather_object

        states = gather_object([ckpt.random_state()])
        if self.accelerator.is_main_process:
            ckpt.save_checkpoint(
                self.out / "checkpoints",
                student=self.model,
                optimizer_state=ckpt.to_cpu(optimizer.state_dict()),
                progress=copy.copy(self.at),
                random_states=states,
                recipe=self.recipe,
                teacher=self.origin,
                keep=self.recipe.keep_checkpoints,
            )
        self.accelerator.wait_for_everyone()


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
