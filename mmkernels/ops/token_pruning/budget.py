"""How many tokens a sample keeps: a number, a share of its tokens, or a share of its attention mass."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mmkernels.errors import ConfigError, DataError, DeviceError, DtypeError, ShapeError

_FUNCTION = "prune_tokens"
NumKeep = int | Sequence[int] | Tensor


def keep_counts(
    scores: Tensor, mask: Tensor | None, num_keep: NumKeep | None, keep_ratio: float | None, keep_mass: float | None
) -> tuple[Tensor | None, int]:
    """(counts, width): counts (batch,) int64, or None where every sample keeps `width`; width bounds all counts."""
    given = [name for name, value in _named(num_keep, keep_ratio, keep_mass) if value is not None]
    if len(given) != 1:
        raise ConfigError(
            f"{_FUNCTION}: exactly one of num_keep, keep_ratio and keep_mass must be given; got "
            f"{' and '.join(given) or 'none'}. They are three ways to say how many tokens stay."
        )
    candidates = None if mask is None else mask.sum(-1)
    if keep_ratio is not None:
        width = by_ratio(_share("keep_ratio", keep_ratio), scores.shape[1])
        if candidates is None:
            return None, width
        counts = (candidates.double() * keep_ratio + 0.5).floor().clamp(min=1).long()
        return torch.minimum(counts, candidates), width
    if keep_mass is not None:
        counts = by_mass(scores, mask, _share("keep_mass", keep_mass))
        return counts, int(counts.max()) if counts.numel() else 0
    assert num_keep is not None
    counts_or_none, width = _by_number(num_keep, scores)
    if candidates is not None:
        limit = width if counts_or_none is None else counts_or_none
        return torch.minimum(candidates, torch.as_tensor(limit, device=scores.device)), width
    return counts_or_none, width


def by_ratio(ratio: float, tokens: int) -> int:
    """The nearest number to ratio * tokens, halves up, at least 1."""
    return max(1, math.floor(ratio * tokens + 0.5))


def by_mass(scores: Tensor, mask: Tensor | None, share: float) -> Tensor:
    """The fewest best-ranked tokens that hold `share` of the sum of a sample's scores, at least 1 if there is any."""
    values = scores.detach().double()
    fit = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    if not torch.compiler.is_compiling() and bool(((values < 0) & fit).any()):
        raise DataError(
            f"{_FUNCTION}: scores must be >= 0 with keep_mass; got a negative one. "
            "Give attention probabilities, or use num_keep."
        )
    best_first = values.masked_fill(~fit, 0).gather(1, ranked(scores.detach(), mask)).cumsum(-1)
    counts = (best_first < share * best_first[:, -1:]).sum(-1) + 1
    return torch.minimum(counts, fit.sum(-1))


def _by_number(num_keep: NumKeep, scores: Tensor) -> tuple[Tensor | None, int]:
    batch, seqlen = scores.shape
    if isinstance(num_keep, int) and not isinstance(num_keep, bool):
        _in_range(num_keep, num_keep, seqlen)
        return None, num_keep
    if isinstance(num_keep, Sequence) and all(isinstance(n, int) for n in num_keep):
        num_keep = torch.tensor(list(num_keep), dtype=torch.int64, device=scores.device)
    if not isinstance(num_keep, Tensor) or num_keep.dtype not in (torch.int32, torch.int64):
        what = num_keep.dtype if isinstance(num_keep, Tensor) else type(num_keep).__name__
        raise DtypeError(
            f"{_FUNCTION}: num_keep must be an int, a list of ints or an int32 or int64 tensor; got {what}. "
            "For a share of the tokens use keep_ratio."
        )
    if num_keep.shape != (batch,):
        raise ShapeError(
            f"{_FUNCTION}: num_keep must have shape (batch={batch},); got {tuple(num_keep.shape)}. "
            "Give one number for each sample, or one int for all."
        )
    if num_keep.device != scores.device:
        raise DeviceError(
            f"{_FUNCTION}: num_keep must be on {scores.device} like scores; got {num_keep.device}. "
            "Move it with num_keep.to(scores.device)."
        )
    if batch == 0:
        return num_keep.long(), 0
    least, most = (int(n) for n in num_keep.aminmax())
    _in_range(least, most, seqlen)
    return num_keep.long(), most


def _in_range(least: int, most: int, seqlen: int) -> None:
    if least < 1:
        raise ShapeError(
            f"{_FUNCTION}: num_keep must be at least 1; got {least}. "
            "To drop an image altogether, leave it out of the batch."
        )
    if most > seqlen:
        raise ShapeError(
            f"{_FUNCTION}: num_keep must be at most the number of tokens, {seqlen}; got {most}. "
            "To keep all tokens whatever their number, use keep_ratio=1.0."
        )


def _share(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DtypeError(f"{_FUNCTION}: {name} must be a number; got {type(value).__name__}. Give one in (0, 1].")
    if not 0 < value <= 1:
        raise ConfigError(f"{_FUNCTION}: {name} must be in (0, 1]; got {value}. 1 keeps everything that counts.")
    return float(value)


def _named(num_keep: object, keep_ratio: object, keep_mass: object) -> tuple[tuple[str, object], ...]:
    return ("num_keep", num_keep), ("keep_ratio", keep_ratio), ("keep_mass", keep_mass)


def ranked(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Indices of tokens, best first: ties to the lower index, NaN after every number, masked tokens last."""
    unfit = scores.isnan().to(torch.int8)
    if mask is not None:
        unfit = torch.where(mask, unfit, 2)
    # adding 0 makes -0 a 0, which some sorts tell apart
    order = (scores + 0.0).masked_fill(unfit > 0, 0.0).sort(dim=-1, descending=True, stable=True).indices
    return order.gather(1, unfit.gather(1, order).sort(dim=-1, stable=True).indices)
