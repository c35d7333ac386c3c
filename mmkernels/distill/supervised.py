"""Supervised training of any model on JSON lines: one process or many, killed and resumed to the same numbers.

A model's train.py gives this its recipe, optimizer and batches; nothing here knows a model.
"""

import copy
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmkernels._progress import progress_bar
from mmkernels.distill import checkpoint as ckpt
from mmkernels.errors import ConfigError, DataError

Batcher = Callable[[list[dict[str, Any]]], Mapping[str, Tensor]]


class Samples:
    """Lines of files in an order that depends on the recipe's seed alone.

    Args:
        files: of JSON lines; paths under "image" are relative to their file.
        recipe: its seed orders the lines, its weights say how often a file is drawn from.
        fields: what every line must have: alternatives, each a list of fields.

    Raises:
        DataError: a file that is missing or empty, or a line without the fields, by file and number.
        ConfigError: as many weights as files are needed.
    """

    def __init__(self, files: Sequence[Path], recipe: Any, fields: Sequence[Sequence[str]]):
        if recipe.weights is not None and len(recipe.weights) != len(files):
            raise ConfigError(
                f"Samples: weights must be one per data file; got {len(recipe.weights)} for {len(files)} files."
            )
        self.recipe, self.parts = recipe, [_lines(file, fields) for file in files]
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

    def rows(self, number: int) -> list[dict[str, Any]]:
        """The samples of micro-batch `number`."""
        size = self.recipe.micro_batch
        return [self[number * size + i] for i in range(size)]


def _lines(file: Path, fields: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
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
        if not isinstance(line, dict) or not any(all(line.get(f) for f in wanted) for wanted in fields):
            choice = " or ".join(" and ".join(wanted) for wanted in fields)
            found = sorted(line) if isinstance(line, dict) else type(line).__name__
            raise DataError(f"Samples: every line must have {choice}; line {number} of {file} lacks it: got {found}.")
        named = line.get("image") or []
        lines.append({**line, "image": [file.parent / n for n in ([named] if isinstance(named, str) else named)]})
    return lines


class SupervisedTrainer:
    """Runs a recipe.

    Args:
        recipe: what to do.
        model: trained in place.
        processor: the model's, saved beside it.
        samples: of data.
        batch: from samples to ids, mask, labels and pixels; a mean over labels is the loss.
        optimizer: made here, over what the stage trains.
        out: checkpoints/, metrics.jsonl and the finished model/; a run found there goes on.
        progress: show a bar.

    Raises:
        ConfigError: a batch that does not divide among the processes.
        CheckpointError: out holds another run.
        DataError: see `Samples`.
    """

    def __init__(
        self,
        recipe: Any,
        model: Any,
        processor: Any,
        samples: Samples,
        batch: Batcher,
        optimizer: Callable[[Any, Any], torch.optim.Optimizer],
        out: Path,
        *,
        progress: bool = True,
    ):
        from accelerate import Accelerator, DistributedDataParallelKwargs

        # a batch without images leaves the connector out
        options = [DistributedDataParallelKwargs(find_unused_parameters=True)]
        self.accelerator = Accelerator(mixed_precision="no", kwargs_handlers=options)
        together = recipe.micro_batch * self.accelerator.num_processes
        if recipe.global_batch % together:
            raise ConfigError(
                f"SupervisedTrainer: global_batch must be a multiple of micro_batch x processes = {together}; got "
                f"{recipe.global_batch}. Change micro_batch or the number of processes."
            )
        self.recipe, self.model, self.processor, self.out = recipe, model, processor, out
        self.micro_steps, self.samples = recipe.global_batch // together, samples
        self.batch, self.make_optimizer = batch, optimizer
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
        optimizer = self.make_optimizer(self.model, self.recipe)
        if self.latest is not None:
            state, self.at, random = ckpt.load_checkpoint(self.latest, self.model)
            optimizer.load_state_dict(state)
            ckpt.restore_random_state(random[self.accelerator.process_index % len(random)])
        self.history = self._open_log()
        self._begin()
        model, prepared = self.accelerator.prepare(self.model, optimizer)
        with progress_bar(self.recipe.steps, self.recipe.name, initial=self.at.step, show=self.show) as bar:
            while self.at.step < self.recipe.steps:
                self._step(model, prepared)
                bar.update()
                if self._due(self.recipe.checkpoint_every):
                    self._save(prepared)
        self._end()
        if self.accelerator.is_main_process:
            self.model.eval().save_pretrained(self.out / "model")
            self.processor.save_pretrained(self.out / "model")
        self.accelerator.wait_for_everyone()
        return self.history

    def _begin(self) -> None:
        """Bring the model into the state it is trained in."""
        self.model.train()

    def _end(self) -> None:
        """Undo what the saved model should not remember."""

    def _targets(self, batch: Mapping[str, Tensor]) -> Tensor:
        """How many labels the loss is a mean over: all but the first of a row, which nothing precedes."""
        return (batch["labels"][:, 1:] != -100).sum()

    def _due(self, every: int) -> bool:
        return self.at.step == self.recipe.steps or bool(every and self.at.step % every == 0)

    def _step(self, model: Any, optimizer: Any) -> None:
        """One optimizer step: one mean over all supervised tokens of the global batch, however it is cut."""
        recipe, device = self.recipe, self.accelerator.device
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        numbers = [self.at.position + micro * processes + rank for micro in range(self.micro_steps)]
        batches = [self.batch(self.samples.rows(number)) for number in numbers]
        batches = [{key: value.to(device) for key, value in batch.items()} for batch in batches]
        targets = torch.stack([self._targets(batch) for batch in batches]).sum()
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
                f"SupervisedTrainer: loss and gradients must be finite; got {record}. Lower lr, or check the data; "
                "earlier checkpoints are intact."
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
