"""Runs the stages of a recipe with accelerate: one process or many, killed and resumed to the same losses.

The same script runs under `python`, `torchrun` and `accelerate launch`.
"""

import copy
import itertools
import json
import math
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels._progress import progress_bar
from mmkernels.distill import checkpoint as ckpt
from mmkernels.distill.linearize import linearize, restore_attention
from mmkernels.distill.optim import learning_rate, make_optimizer
from mmkernels.distill.recipe import DistillRecipe, StageConfig
from mmkernels.distill.sources import BatchSource, check_batch
from mmkernels.distill.stages import check_pair, layerwise_loss, logit_loss, set_trainable
from mmkernels.errors import CheckpointError, ConfigError

Evaluate = Callable[[Any], Mapping[str, float]]


class StageModule(nn.Module):
    """One stage as a module, so that data-parallel wrappers see its forward pass.  The teacher is not part of it."""

    def __init__(self, student: Any, teacher: Any, stage: StageConfig, precision: str):
        super().__init__()
        self.student = student
        self.stage, self.narrow = stage, precision == "bf16"
        object.__setattr__(self, "teacher", teacher)  # not registered: never wrapped, moved, saved or trained

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch and detached metrics."""
        stage = self.stage
        options: dict[str, Any] = {"mask": stage.mask}
        if stage.loss == "layer_mse":
            options.update(target=stage.target, scale=stage.loss_scale, reduction=stage.mse_reduction)
        else:
            options.update(temperature=stage.temperature, reduction=stage.kl_reduction)
        step = layerwise_loss if stage.loss == "layer_mse" else logit_loss
        device = next(self.student.parameters()).device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.narrow):
            result = step(self.student, self.teacher, batch, **options)
        return result.loss, result.metrics


@dataclass
class DistillResult:
    """The trained student and the log: one record per logged step, evaluations included."""

    student: Any
    history: list[dict[str, Any]] = field(default_factory=list)


def run(recipe: DistillRecipe, teacher: Any, student: Any, data: BatchSource, **options: Any) -> DistillResult:
    """Shorthand for `Distiller(recipe, teacher, student, data, **options).run()`."""
    return Distiller(recipe, teacher, student, data, **options).run()


def _accelerator() -> Any:
    from accelerate import Accelerator

    # the recipe decides the precision, in StageModule: accelerate fixes its own once for the life of the process
    return Accelerator(mixed_precision="no")


class Distiller:
    """Trains a student stage by stage.

    Args:
        recipe: what to do.
        teacher: the attention model; never changed, run under no_grad in eval mode.
        student: from `linearize(teacher)`; trained in place as long as no stage restores attention (use the result's
            student).  None = made here from the recipe's keep_attention, seeding and seed.
        data: a function from (batch number, batch size) to a batch of model inputs; see `mmkernels.distill.sources`.
        output_dir: checkpoints, metrics.jsonl, tensorboard/ and the finished student/; None = nothing is written.
        resume: go on from the latest checkpoint of output_dir, if there is one; False = refuse a folder that has one.
        tensorboard: also log to output_dir/tensorboard.
        progress: show a bar (never off the main process or in CI).
        evaluate: called on the main process with the student in eval mode, at the end of each stage and every
            recipe.eval_every steps; its numbers enter the log.

    Raises:
        ConfigError: a recipe that does not fit the number of processes or the models.
        CheckpointError: output_dir holds another run.
    """

    def __init__(
        self,
        recipe: DistillRecipe,
        teacher: Any,
        student: Any,
        data: BatchSource,
        *,
        output_dir: str | Path | None = None,
        resume: bool = True,
        tensorboard: bool = False,
        progress: bool = True,
        evaluate: Evaluate | None = None,
    ):
        self.accelerator = _accelerator()
        if tensorboard and output_dir is None:
            raise ConfigError("Distiller: output_dir must be given with tensorboard; got None. Name a folder.")
        self.recipe, self.teacher, self.data, self.evaluate = recipe, teacher, data, evaluate
        self.student = student
        if student is None:
            self.student = linearize(teacher, recipe.keep_attention, seeding=recipe.seeding, seed=recipe.seed)
        check_pair(self.student, teacher)
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.show = progress and self.accelerator.is_main_process
        self.tensorboard = tensorboard and self.accelerator.is_main_process
        self.history: list[dict[str, Any]] = []
        self.at = ckpt.Progress()
        self._accumulation = [self._micro_steps(stage) for stage in recipe.stages]
        self._start_from = self._latest(resume)
        self._writer: Any = None

    def _micro_steps(self, stage: StageConfig) -> int:
        together = stage.micro_batch * self.accelerator.num_processes
        if stage.global_batch % together:
            raise ConfigError(
                f"Distiller: global_batch of stage {stage.name!r} must be a multiple of micro_batch x processes = "
                f"{together}; got {stage.global_batch}. Change micro_batch or the number of processes."
            )
        return stage.global_batch // together

    @property
    def _checkpoints(self) -> Path | None:
        return None if self.output_dir is None else self.output_dir / "checkpoints"

    def _latest(self, resume: bool) -> Path | None:
        if self._checkpoints is None:
            return None
        found = ckpt.finished(self._checkpoints)
        if not found:
            return None
        if not resume:
            raise CheckpointError(
                f"Distiller: output_dir must hold no checkpoints when resume is False; got {found[-1]}. "
                "Resume, or choose another folder."
            )
        ckpt.read_manifest(found[-1], self.recipe, ckpt.fingerprint(self.teacher))
        return found[-1]

    def run(self) -> DistillResult:
        """Runs what is left of the recipe and returns the student with the log of the whole run.

        Seeds Python, numpy and torch with the recipe's seed (plus the process number).
        """
        from accelerate.utils import set_seed

        set_seed(self.recipe.seed, device_specific=True)
        self.teacher.to(self.accelerator.device)
        teacher_mode = self.teacher.training
        self.teacher.eval()
        saved = None if self._start_from is None else ckpt.read_state(self._start_from)
        if saved is not None:
            self.at = ckpt.Progress(**saved["progress"])
        self._open_log()
        try:
            for index, stage in enumerate(self.recipe.stages):
                self._prepare_student(stage)
                if index < self.at.stage:
                    continue
                if index > self.at.stage:
                    self.at.stage, self.at.step = index, 0
                self._run_stage(stage, self._accumulation[index])
        finally:
            self.teacher.train(teacher_mode)
            if self._writer is not None:
                self._writer.close()
        self.student.eval()
        if self.output_dir is not None and self.accelerator.is_main_process:
            self.student.save_pretrained(self.output_dir / "student")
        self.accelerator.wait_for_everyone()
        return DistillResult(self.student, self.history)

    def _prepare_student(self, stage: StageConfig) -> None:
        if stage.keep_attention is not None:
            self.student = restore_attention(self.student, self.teacher, stage.keep_attention)
        self.student.to(self.accelerator.device).train()

    def _run_stage(self, stage: StageConfig, accumulation: int) -> None:
        names = set_trainable(self.student, stage.trainable)
        optimizer_state = None
        if self._start_from is not None:
            optimizer_state, _, states = ckpt.load_checkpoint(self._start_from, self.student)
            ckpt.restore_random_state(states[self.accelerator.process_index % len(states)])
            self._start_from = None
        # an accelerator holds on to all it has prepared: a new one lets the previous stage's optimizer go
        self.accelerator = _accelerator()
        module = StageModule(self.student, self.teacher, stage, self.recipe.precision)
        module, optimizer = self.accelerator.prepare(module, make_optimizer(module, stage))
        if optimizer_state is not None:
            optimizer.load_state_dict(optimizer_state)
        if self.at.step < stage.steps:
            with self._bar(stage) as bar:
                while self.at.step < stage.steps:
                    record = self._step(stage, module, optimizer, accumulation, names)
                    bar.update()
                    if record is not None:
                        bar.set_postfix(loss=f"{record['loss']:.4g}", refresh=False)
                    if self._due(self.recipe.checkpoint_every, stage):
                        self._save(optimizer)

    def _step(
        self, stage: StageConfig, module: nn.Module, optimizer: Any, accumulation: int, names: list[str]
    ) -> dict[str, Any] | None:
        """One optimizer step; the log record if this step is logged."""
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        lr = learning_rate(stage, self.at.step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        totals: dict[str, Tensor] = {}
        for micro in range(accumulation):
            batch = self._batch(self.at.position + micro * processes + rank, stage)
            last = micro == accumulation - 1
            with nullcontext() if last else self.accelerator.no_sync(module):
                loss, metrics = module(batch)
                self._check_reach(names, bool(loss.requires_grad))
                self.accelerator.backward(loss / accumulation)
            for key, value in {"loss": loss.detach(), **metrics}.items():
                totals[key] = totals.get(key, 0) + value / accumulation
        self._check_reach(names, all(p.grad is not None for p in self.student.parameters() if p.requires_grad))
        parameters = [p for p in module.parameters() if p.requires_grad]
        limit = stage.max_grad_norm or float("inf")
        norm = self.accelerator.clip_grad_norm_(parameters, limit)
        optimizer.step()
        optimizer.zero_grad()
        self.at.step += 1
        self.at.global_step += 1
        self.at.position += accumulation * processes
        # a checkpoint step is logged too: no checkpoint holds weights whose gradients were not seen to be finite
        logged = self._due(self.recipe.log_every, stage) or self._due(self.recipe.checkpoint_every, stage)
        record = self._log(stage, lr, totals, norm) if logged else None
        if self.evaluate is not None and self._due(self.recipe.eval_every, stage):
            self._evaluate(stage)
        return record

    def _due(self, every: int, stage: StageConfig) -> bool:
        return self.at.step == stage.steps or bool(every and self.at.step % every == 0)

    def _batch(self, number: int, stage: StageConfig) -> dict[str, Any]:
        batch = self.data(number, stage.micro_batch)
        check_batch(batch, stage.micro_batch, self.recipe.max_length)
        device = self.accelerator.device
        return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}

    def _check_reach(self, names: list[str], reached: bool) -> None:
        if not reached:
            parameters = dict(self.student.named_parameters())
            without = [name for name in names if parameters[name].grad is None]
            raise ConfigError(
                f"Distiller: trainable of the stage must name parameters that its loss reaches; got {without[0]} and "
                f"{len(without) - 1} more without a gradient. Take them out, or change target or loss."
            )

    def _log(self, stage: StageConfig, lr: float, totals: dict[str, Tensor], norm: Any) -> dict[str, Any]:
        keys = sorted(totals)
        values = self.accelerator.reduce(torch.stack([totals[k].float() for k in keys]), reduction="mean").tolist()
        numbers = {**dict(zip(keys, values, strict=True)), "lr": lr, "grad_norm": float(norm)}
        if not all(map(math.isfinite, numbers.values())):
            raise ConfigError(
                f"Distiller: loss and gradients must be finite; got {numbers} at step {self.at.step} of "
                f"{stage.name!r}. Lower lr or max_grad_norm, or check the data; earlier checkpoints are intact."
            )
        return self._record(stage, numbers)

    def _evaluate(self, stage: StageConfig) -> None:
        assert self.evaluate is not None
        if self.accelerator.is_main_process:
            self.student.eval()
            with torch.no_grad(), torch.random.fork_rng():  # whether one evaluates must not change the training
                numbers = dict(self.evaluate(self.student))
            self.student.train()
            self._record(stage, {f"eval_{key}": float(value) for key, value in numbers.items()})
        self.accelerator.wait_for_everyone()

    def _record(self, stage: StageConfig, numbers: dict[str, float]) -> dict[str, Any]:
        where = {"stage": stage.name, "step": self.at.step, "global_step": self.at.global_step}
        record = {**where, **numbers}
        self.history.append(record)
        if self.accelerator.is_main_process and self.output_dir is not None:
            with (self.output_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        if self._writer is not None:
            for key, value in numbers.items():
                self._writer.add_scalar(f"{stage.name}/{key}", value, self.at.global_step)
        return record

    def _open_log(self) -> None:
        """Reads the log up to the checkpoint, and drops what a killed run had logged after it."""
        if self.output_dir is None:
            return
        path = self.output_dir / "metrics.jsonl"
        if self.at.global_step and path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            records = map(json.loads, itertools.takewhile(lambda line: line.endswith("}"), lines))
            self.history = [r for r in records if r["global_step"] <= self.at.global_step]
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return
        self.output_dir.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".tmp")
        fresh.write_text("".join(json.dumps(r) + "\n" for r in self.history), encoding="utf-8")
        os.replace(fresh, path)
        if self.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(self.output_dir / "tensorboard", purge_step=self.at.global_step + 1)

    def _save(self, optimizer: Any) -> None:
        """All processes take part; the main one writes."""
        if self._checkpoints is None:
            return
        from accelerate.utils import gather_object

        states = gather_object([ckpt.random_state()])
        if self.accelerator.is_main_process:
            ckpt.save_checkpoint(
                self._checkpoints,
                student=self.student,
                optimizer_state=ckpt.to_cpu(optimizer.state_dict()),
                progress=copy.copy(self.at),
                random_states=states,
                recipe=self.recipe,
                teacher=ckpt.fingerprint(self.teacher),
                keep=self.recipe.keep_checkpoints,
            )
        self.accelerator.wait_for_everyone()

    def _bar(self, stage: StageConfig) -> Any:
        return progress_bar(stage.steps, stage.name, initial=self.at.step, show=self.show)
