"""Distillation losses as pure functions: layer-wise mean-squared error and Kullback-Leibler divergence of logits.

Source: mmMamba (arXiv 2502.13145) section 4.2; the factor 1000 is that of LoLCATs (arXiv 2410.10254).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmkernels.errors import ConfigError, DataError, ShapeError, nearest

MSE_REDUCTIONS = ("element_mean", "token_sum")
KL_REDUCTIONS = ("sequence_sum", "batchmean", "token_mean")
MASKS = ("all", "non_pad", "answer")
IGNORE = -100
_CHUNK_ELEMENTS = 1 << 22  # 16 MiB of float32 per temporary: small beside any logits worth chunking


def token_mask(kind: str, batch: Mapping[str, Tensor]) -> Tensor | None:
    """The positions a loss counts: bool (batch, seqlen), or None for every position.

    Args:
        kind: "all"; "non_pad" (attention_mask of the batch, every position without one); "answer": positions whose
            logits predict an answer token, from `answer_mask`, or from `labels` (unshifted: the position before a label
            that is not -100).
        batch: the data batch.

    Raises:
        ConfigError: an unknown kind.
        DataError: "answer" without `answer_mask` or `labels`.
    """
    if kind not in MASKS:
        raise ConfigError(f"token_mask: kind must be known; got {kind!r}. {nearest(kind, MASKS)}")
    if kind == "all":
        return None
    if kind == "non_pad":
        mask = batch.get("attention_mask")
        return None if mask is None else mask.bool()
    if "answer_mask" in batch:
        return batch["answer_mask"].bool()
    if "labels" in batch:
        answers = batch["labels"] != IGNORE
        return torch.cat([answers[:, 1:], torch.zeros_like(answers[:, :1])], dim=1)
    raise DataError(
        f"token_mask: batch must hold answer_mask or labels for kind 'answer'; got {sorted(batch)}. "
        "Add one of them to the data, or use the mask 'non_pad'."
    )


def layer_errors(
    student_contexts: Sequence[Tensor],
    teacher_contexts: Sequence[Tensor],
    mask: Tensor | None = None,
    *,
    reduction: str = "element_mean",
) -> Tensor:
    """One squared error per layer, unscaled: float (layers,).  `layerwise_mse` is its mean times a scale.

    Args:
        student_contexts, teacher_contexts: one (batch, seqlen, ...) tensor per layer, equal shapes.
        mask: bool (batch, seqlen), True = counts; None = everything counts.
        reduction: "element_mean" divides by the counted elements; "token_sum" by the counted tokens only, that is it
            sums over channels, so that its size does not shrink with the width.

    Raises:
        ShapeError: the lists or the tensors do not match.
        ConfigError: an unknown reduction.
    """
    if reduction not in MSE_REDUCTIONS:
        raise ConfigError(
            f"layerwise_mse: reduction must be known; got {reduction!r}. {nearest(reduction, MSE_REDUCTIONS)}"
        )
    if len(student_contexts) != len(teacher_contexts) or not student_contexts:
        raise ShapeError(
            f"layerwise_mse: student_contexts must be as many as teacher_contexts, and at least one; got "
            f"{len(student_contexts)} and {len(teacher_contexts)}. Pass one tensor per converted layer."
        )
    errors = []
    for layer, (ours, theirs) in enumerate(zip(student_contexts, teacher_contexts, strict=True)):
        if ours.shape != theirs.shape or (mask is not None and mask.shape != ours.shape[:2]):
            raise ShapeError(
                f"layerwise_mse: student_contexts[{layer}] must have the shape of the teacher's {tuple(theirs.shape)} "
                f"and of the mask {None if mask is None else tuple(mask.shape)}; got {tuple(ours.shape)}. "
                "Run both models on the same batch."
            )
        wide = torch.promote_types(ours.dtype, torch.float32)
        if mask is not None:  # select, not multiply: what stands at a padded position may be anything, even NaN
            ours, theirs = ours[mask], theirs[mask]
        else:
            ours, theirs = ours.flatten(0, 1), theirs.flatten(0, 1)
        squares = (ours.to(wide) - theirs.to(wide)).square().sum()
        errors.append(squares / max(1, ours.numel() if reduction == "element_mean" else ours.shape[0]))
    return torch.stack(errors)


def layerwise_mse(
    student_contexts: Sequence[Tensor],
    teacher_contexts: Sequence[Tensor],
    mask: Tensor | None = None,
    *,
    scale: float = 1000.0,
    reduction: str = "element_mean",
) -> Tensor:
    """Mean-squared error of per-layer activations, averaged over layers: the loss of stages 1 and 2.

    loss = scale/n * sum over the n converted layers of mean over (batch, seqlen, channels) of (student - teacher)^2.

    Args:
        student_contexts, teacher_contexts: one (batch, seqlen, ...) tensor per converted layer.
        mask: bool (batch, seqlen), True = counts; None = everything, padding included (as the official code).
        scale: constant factor; 1000 keeps the loss of small activations readable.
        reduction: "element_mean" or "token_sum", see `layer_errors`.

    Returns:
        A scalar; 0 with zero gradients when the mask is empty.

    Raises:
        ShapeError: the lists or the tensors do not match.
        ConfigError: an unknown reduction.

    Numerics: differences and sums in float32 (float64 for float64 inputs).
    Cost: one pass over the activations.

    Example:
        >>> ours, theirs = [torch.zeros(1, 2, 4)], [torch.ones(1, 2, 4)]
        >>> layerwise_mse(ours, theirs, scale=1.0)
        tensor(1.)

    Source: mmMamba section 4.2, equations of stages 1 and 2; layer average and factor from the official training code.
    """
    return scale * layer_errors(student_contexts, teacher_contexts, mask, reduction=reduction).mean()


class _LogitKL(torch.autograd.Function):
    """sum over `rows` of KL(softmax(teacher/T) || softmax(student/T)), a chunk of rows at a time, both ways."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, rows: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(student, teacher, rows)
        ctx.temperature = temperature
        wide = torch.promote_types(student.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=student.device)
        for part in rows.split(_chunk_rows(student)):
            ours = (student[part].to(wide) / temperature).log_softmax(-1)
            theirs = (teacher[part].to(wide) / temperature).log_softmax(-1)
            # -inf logits of the teacher are forbidden words: 0 * (-inf - x) counts as 0, its limit
            weight = theirs.exp()
            total += torch.where(weight > 0, weight * (theirs - ours), 0).sum()
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        student, teacher, rows = ctx.saved_tensors
        wide = torch.promote_types(student.dtype, torch.float32)
        out = torch.zeros_like(student)
        # under create_graph the same formula is recorded, whole, so that second derivatives are right
        chunk = len(rows) if torch.is_grad_enabled() else _chunk_rows(student)
        for part in rows.split(max(1, chunk)):
            ours = (student[part].to(wide) / ctx.temperature).softmax(-1)
            theirs = (teacher[part].to(wide) / ctx.temperature).softmax(-1)
            out.index_copy_(0, part, ((ours - theirs) * (grad / ctx.temperature)).to(out.dtype))
        return out, None, None, None


def _chunk_rows(logits: Tensor) -> int:
    return max(1, _CHUNK_ELEMENTS // max(1, logits.shape[-1]))


def _check_logits(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None) -> None:
    if student_logits.ndim != 3 or student_logits.shape[:2] != teacher_logits.shape[:2]:
        raise ShapeError(
            f"logit_kl: student_logits must have shape (batch, seqlen, vocab) like teacher_logits "
            f"{tuple(teacher_logits.shape)}; got {tuple(student_logits.shape)}. Run both models on the same batch."
        )
    if student_logits.shape != teacher_logits.shape:
        raise ShapeError(
            f"logit_kl: student_logits must have the teacher's vocabulary of {teacher_logits.shape[-1]} words; got "
            f"{student_logits.shape[-1]}. Distillation by logits needs one tokenizer for both models."
        )
    if mask is not None and mask.shape != student_logits.shape[:2]:
        raise ShapeError(
            f"logit_kl: mask must have shape {tuple(student_logits.shape[:2])}; got {tuple(mask.shape)}. "
            "It marks positions of the sequence."
        )


def logit_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
    reduction: str = "sequence_sum",
) -> Tensor:
    """Kullback-Leibler divergence of the student's next-token distribution from the teacher's: the loss of stage 3.

    loss = T^2 * sum over counted positions of sum_v p_v (log p_v - log q_v), divided as `reduction` says, with
    p = softmax(teacher/T), q = softmax(student/T).  The teacher is a constant: no gradient reaches it.

    Args:
        student_logits, teacher_logits: (batch, seqlen, vocab), any float dtype.
        mask: bool (batch, seqlen), True = counts; None = every position.
        temperature: T > 0; the factor T^2 keeps gradients comparable between temperatures.
        reduction: "sequence_sum" (also called "batchmean", its name in torch): divided by the batch size only, so
            healthy values grow with the length; "token_mean": divided by the counted positions.

    Returns:
        A scalar; 0 with zero gradients when the mask is empty.

    Raises:
        ShapeError: shapes differ; a differing vocabulary is named as such.
        ConfigError: an unknown reduction, or a temperature that is not positive.

    Numerics: softmax and sums in float32 (float64 for float64 logits); twice differentiable.
    Cost: float32 temporaries for 16 MiB of logits at a time, whatever the length; one gradient in the logits' dtype.

    Example:
        >>> logits = torch.randn(2, 3, 5)
        >>> logit_kl(logits, logits)
        tensor(0.)

    Source: mmMamba section 4.2, stage 3; reduction from the official training code (torch's batchmean).
    """
    if reduction not in KL_REDUCTIONS:
        raise ConfigError(f"logit_kl: reduction must be known; got {reduction!r}. {nearest(reduction, KL_REDUCTIONS)}")
    if not temperature > 0:
        raise ConfigError(f"logit_kl: temperature must be positive; got {temperature}. 1.0 is the paper's.")
    _check_logits(student_logits, teacher_logits, mask)
    batch, seqlen, _ = student_logits.shape
    if mask is None:
        rows = torch.arange(batch * seqlen, device=student_logits.device)
    else:
        rows = mask.flatten().nonzero().squeeze(1)
    total = _LogitKL.apply(student_logits.flatten(0, 1), teacher_logits.detach().flatten(0, 1), rows, temperature)
    return total * (temperature**2 / max(1, len(rows) if reduction == "token_mean" else batch))
