"""Three steps: words only, then the connector in front of the frozen language model (align), then all (finetune)."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from mmkernels.demo.ml_mamba.arms import ARMS, Arm
from mmkernels.demo.ml_mamba.model import pixel_values, processor_of, tiny_ml_mamba
from mmkernels.demo.ml_mamba.settings import MLMambaSettings
from mmkernels.demo.ml_mamba.talk import CanvasTalk
from mmkernels.demo.teacher import cosine_rate

_EVALUATION_BATCH = 250
_ALIGN_FROM = 1_000_000  # numbers of the batches with images: canvases that the words-only step has not described
_WORDS_CHECKED, _WORDS_KNOWN = 50, 0.99  # steps between looks at what the language model knows; what is enough
_WARMUP = 50
OnStep = Callable[[], None] | None


def _steps(parameters: Iterable[Any], steps: int, peak: float, decay: float, cosine: bool = True) -> Any:
    """Yields the number of each step and, when resumed, applies the gradients that were computed meanwhile."""
    trained = [p for p in parameters if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=peak, betas=(0.9, 0.98), weight_decay=decay, fused=True)
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = cosine_rate(step, steps, peak) if cosine else peak * min(1.0, step / _WARMUP)
        optimizer.zero_grad(set_to_none=True)
        yield step
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()


def learn_words(talk: CanvasTalk, settings: MLMambaSettings, seed: int, on_step: OnStep = None) -> dict[str, Tensor]:
    """The language model of a seed: it has read canvases told in words, a word for every patch, and never an image.

    It is trained until it answers nearly all questions about unseen canvases told in words: when that begins differs by
    hundreds of steps from seed to seed, and a model that cannot answer from words shows no connector's worth.

    Args:
        talk: where conversations come from.
        settings: words_steps at most.
        seed: of the weights.
        on_step: called after every step.

    Returns:
        Its weights.
    """
    model = tiny_ml_mamba(talk, ARMS[0], seed).language_model.train()
    for step in _steps(model.parameters(), settings.words_steps, settings.words_rate, decay=0.01, cosine=False):
        if step % _WORDS_CHECKED == 1 and told_in_words(model, talk) >= _WORDS_KNOWN:
            break
        batch = talk.batch(step - 1, settings.batch_size)
        ids = torch.cat([batch["patches"], batch["input_ids"]], 1)
        labels = torch.cat([torch.full_like(batch["patches"], -100), batch["labels"]], 1)
        model(ids, labels=labels, use_cache=False).loss.backward()
        if on_step is not None:
            on_step()
    return {name: value.clone() for name, value in model.state_dict().items()}


@torch.no_grad()
def told_in_words(language_model: Any, talk: CanvasTalk) -> float:
    """Share of right answers about unseen canvases told in words: what a perfect connector would reach."""
    batch = talk.batch(0, _EVALUATION_BATCH, split="test", turns=1)
    ids = torch.cat([batch["patches"], batch["input_ids"][:, :-2]], 1)
    logits = language_model(ids, use_cache=False, logits_to_keep=1).logits[:, -1]
    return float((logits.argmax(-1) == batch["answers"][:, 0]).float().mean())


def train_arm(
    arm: Arm,
    settings: MLMambaSettings,
    seed: int,
    language_model: dict[str, Tensor],
    *,
    on_step: OnStep = None,
) -> tuple[Any, dict[str, Any]]:
    """Put a connector in front of a language model and train it, then (finetune_steps) both.

    Args:
        arm: the connector.
        settings: the amount of everything.
        seed: of weights and data.
        language_model: from `learn_words`.
        on_step: called after every step.

    Returns:
        The model in eval mode, and {"loss": one number a step, "points": [{"step", "accuracy", "questions"}],
        "accuracy": at the end, "trained": parameters trained in the align stage, "told_in_words": what the language
        model answers without a connector}.
    """
    talk = CanvasTalk(settings.task(seed), settings.turns)
    model = tiny_ml_mamba(talk, arm, seed).train()
    model.language_model.load_state_dict(language_model)
    model.language_model.requires_grad_(False)
    processor = processor_of(talk, model)
    known = told_in_words(model.language_model, talk)
    losses: list[float] = []
    points: list[dict[str, Any]] = []
    total = settings.steps + settings.finetune_steps
    measured = {max(1, round(total * n / settings.points)) for n in range(1, settings.points + 1)}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for first, steps, rate, decay in (
        (0, settings.steps, settings.align_rate, 0.0),
        (settings.steps, settings.finetune_steps, settings.finetune_rate, 0.01),
    ):
        model.language_model.requires_grad_(first > 0)
        for number in _steps(model.parameters(), steps, rate, decay):
            step = first + number
            batch = talk.batch(_ALIGN_FROM + step, settings.batch_size)
            pixels = pixel_values(batch["images"], processor)
            loss = model(batch["input_ids"], pixel_values=pixels, labels=batch["labels"], use_cache=False).loss
            loss.backward()
            losses.append(round(float(loss.detach()), 5))
            if on_step is not None:
                on_step()
            if step - 1 in measured:
                points.append(_point(model, talk, processor, settings, step - 1))
    points.append(_point(model, talk, processor, settings, total))
    return model.eval(), {
        "loss": losses,
        "points": points,
        "accuracy": points[-1]["accuracy"],
        "trained": trained,
        "told_in_words": known,
    }


def _point(model: Any, talk: CanvasTalk, processor: Any, settings: MLMambaSettings, step: int) -> dict[str, Any]:
    last = step == settings.steps + settings.finetune_steps
    asked = settings.questions if last else max(1, settings.questions // 4)
    return {"step": step, "questions": asked, "accuracy": evaluate(model, talk, processor, asked)}


@torch.no_grad()
def evaluate(model: Any, talk: CanvasTalk, processor: Any, questions: int) -> float:
    """Share of right answers about unseen canvases, one question each, read where generation would start."""
    right, mode = 0, model.training
    model.eval()
    for index in range(math.ceil(questions / _EVALUATION_BATCH)):
        size = min(_EVALUATION_BATCH, questions - index * _EVALUATION_BATCH)
        batch = talk.batch(index, size, split="test", turns=1)
        prompts, pixels = batch["input_ids"][:, :-2], pixel_values(batch["images"], processor)
        logits = model(prompts, pixel_values=pixels, use_cache=False, logits_to_keep=1).logits[:, -1]
        right += int((logits.argmax(-1) == batch["answers"][:, 0]).sum())
    model.train(mode)
    return right / questions


def majority(talk: CanvasTalk, questions: int) -> float:
    """Accuracy of always giving the most common answer."""
    sizes = [min(_EVALUATION_BATCH, questions - start) for start in range(0, questions, _EVALUATION_BATCH)]
    answers = [talk.batch(i, size, split="test", turns=1)["answers"] for i, size in enumerate(sizes)]
    return int(torch.cat(answers).flatten().bincount().max()) / questions
