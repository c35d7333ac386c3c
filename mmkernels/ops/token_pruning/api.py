"""Public functions cls_attention_scores and prune_tokens: signatures, validation, dispatch.

The two steps of visual-token pruning by attention (VTC-CLS, arXiv 2412.05819; FasterVLM; half of VisionZip).
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmkernels import _triton
from mmkernels._checks import Sizes, Verified, floating, integer, same_device, same_dtype
from mmkernels._dispatch import NATIVE_PROBE, Backend, Op
from mmkernels._gradients import untracked_transform
from mmkernels.errors import ConfigError, DataError, DtypeError, ShapeError
from mmkernels.ops.token_pruning.budget import NumKeep, keep_counts

_HERE = "mmkernels.ops.token_pruning"


def _op(name: str, key: str) -> Op:
    return Op(
        name,
        key=key,
        public=f"{_HERE}.api.{name}",
        backends=[
            Backend("native", f"{_HERE}._native:{name}", ("cpu",), untracked_transform, NATIVE_PROBE),
            Backend("triton", f"{_HERE}._triton:{name}", _triton.DEVICES, _triton.objections, _triton.PROBE),
            Backend("torch", f"{_HERE}._torch:{name}"),
            Backend("reference", f"{_HERE}.reference:{name}"),
        ],
    )


CLS_ATTENTION_SCORES = _op("cls_attention_scores", "k")
PRUNE_TOKENS = _op("prune_tokens", "features")
_verified = Verified()


class PrunedTokens(NamedTuple):
    """What prune_tokens keeps: padded (batch, width, ...) or packed (total, ...).

    Attributes:
        tokens: the kept rows of features, zeros at padding.
        keep_indices: int64, where they were in their sample, rising; -1 at padding.
        position_ids: those given, else places 0, 1, ... in the pruned sample; 0 at padding.
        mask: bool, False at padding.
        cu_seqlens: (batch + 1,) int32, how many tokens the samples before each keep.
    """

    tokens: Tensor
    keep_indices: Tensor
    position_ids: Tensor
    mask: Tensor
    cu_seqlens: Tensor


def cls_attention_scores(
    q: Tensor,
    k: Tensor,
    *,
    lse: Tensor | None = None,
    scale: float | None = None,
    num_prefix: int = 1,
    weight: float = 1.0,
    accumulate: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Score every token by the attention that chosen query rows pay it, without the attention map.

    $$s_j = \frac{w}{R H} \sum_{r=1}^{R} \sum_{h=1}^{H} \mathrm{softmax}_i(\mathrm{scale} \; q_{rh} \cdot k_{ih})_j$$

    The softmax runs over all keys; the `num_prefix` leading ones are then left out without renormalising: the
    source's score, a layer at a time. Give the row of [CLS] (`q[:, :1]`), a pooling head's probe, or a resampler's
    latents.

    Args:
        q: (batch, rows, nheads, headdim): the query rows; float32, bfloat16, float16 or float64.
        k: (batch, seqlen, nkvheads, headdim): all keys, in q's dtype; nkvheads divides nheads, and query head h reads
            key head h // (nheads // nkvheads).
        lse: (batch, nheads, rows), log of the sum of exp(scale q k) over all keys, where an attention kernel has left
            it (`mma_attention(..., return_lse=True)`); None: computed.
        scale: of the products; None: 1 / sqrt(headdim).
        num_prefix: leading keys ([CLS], registers) that get no score; 0 for encoders without.
        weight: of this layer.
        accumulate: (batch, seqlen - num_prefix) that the scores are added to, in place, in its own dtype: a sum over
            layers needs no list of them.  float32 is best.
        backend: None for the automatic choice, or a backend's name.

    Returns:
        scores: (batch, seqlen - num_prefix) in float32 (float64 for float64); `accumulate` itself where it is given.

    Raises:
        ShapeError: sizes disagree, no rows, or num_prefix is not in 0 .. seqlen.
        DtypeError: a dtype outside the four, or q and k differ.
        DeviceError: the tensors live on different devices.

    Numerics: products, softmax and sums in float32 (float64 for float64); the native kernel's result depends neither on
        the batch nor on the number of threads.  NaN or infinity in a query spreads over its sample's scores.
    Cost: 2 rows nheads seqlen headdim flops and one read of k a layer, batch rows nheads seqlen values of memory.
        Differentiable twice in q, k and lse; under torch.no_grad nothing is kept.

    Example:
        >>> import torch, mmkernels
        >>> q, k = torch.randn(2, 577, 16, 64), torch.randn(2, 577, 16, 64)
        >>> scores = torch.zeros(2, 576)
        >>> mmkernels.cls_attention_scores(q[:, :1], k, accumulate=scores).shape
        torch.Size([2, 576])

    Source: VTC-CLS, arXiv 2412.05819; checked against the formula in float64.
    """
    seen = _verified.signature("scores", q, k, lse, num_prefix, accumulate)
    if seen not in _verified:
        _check_scores(q, k, lse, num_prefix, accumulate)
        _verified.add(seen)
    args = {
        "q": q,
        "k": k,
        "lse": lse,
        "scale": 1 / math.sqrt(q.shape[3]) if scale is None else float(scale),
        "num_prefix": num_prefix,
        "weight": float(weight),
    }
    scores: Tensor = CLS_ATTENTION_SCORES(backend, args)
    return scores if accumulate is None else accumulate.add_(scores)


def _check_scores(q: Tensor, k: Tensor, lse: Tensor | None, num_prefix: int, accumulate: Tensor | None) -> None:
    function = "cls_attention_scores"
    sizes = Sizes(function)
    sizes.bind("q", q, "batch rows nheads headdim", "One [CLS] row is q[:, :1].")
    sizes.bind("k", k, "batch seqlen nkvheads headdim")
    sizes.divides("nkvheads", "nheads", "Each key head serves equally many query heads.")
    if sizes["rows"] < 1 or sizes["headdim"] < 1:
        raise ShapeError(
            f"{function}: q must have at least one row and one channel; got {tuple(q.shape)}. "
            "An encoder without [CLS] has a probe, latents or a mean query to give."
        )
    if not 0 <= num_prefix <= sizes["seqlen"]:
        raise ShapeError(
            f"{function}: num_prefix must be in 0 .. seqlen={sizes['seqlen']}; got {num_prefix}. "
            "It counts leading keys that are no image tokens, such as [CLS]."
        )
    if lse is not None:
        sizes.bind("lse", lse, "batch nheads rows", "Take the chosen rows of it too.")
    if accumulate is not None:
        sizes.set(tokens=sizes["seqlen"] - num_prefix)
        sizes.bind("accumulate", accumulate, "batch tokens", "It has no place for the num_prefix leading keys.")
    floating(function, q=q, k=k, lse=lse, accumulate=accumulate)
    same_dtype(function, q=q, k=k)
    same_device(function, q=q, k=k, lse=lse, accumulate=accumulate)


def prune_tokens(
    features: Tensor,
    scores: Tensor,
    *,
    num_keep: NumKeep | None = None,
    keep_ratio: float | None = None,
    keep_mass: float | None = None,
    position_ids: Tensor | None = None,
    mask: Tensor | None = None,
    packed: bool = False,
    backend: str | None = None,
) -> PrunedTokens:
    r"""Keep the best-scored tokens of each sample in their order, with their features, positions and mask in one pass.

    $$K_b = \{ j : |\{ i : s_{bi} > s_{bj} \lor (s_{bi} = s_{bj} \land i < j) \}| < k_b \}, \qquad
    y_b = (x_{bj})_{j \in K_b \; \text{rising}}$$

    The choice is exact and the same on every backend: of equal scores the lower index stays, which the source
    leaves open.

    Args:
        features: (batch, seqlen, dim); float32, bfloat16, float16 or float64.
        scores: (batch, seqlen), any of the four dtypes; no gradient flows into them.
        num_keep: tokens kept of each sample: an int, or one for each sample (list, or int tensor).
        keep_ratio: or a share of the sample's tokens in (0, 1]: the nearest number, halves up, at least 1.
        keep_mass: or a share of the sum of the sample's scores in (0, 1]: the fewest tokens that hold it.
        position_ids: (batch, seqlen) int, gathered along; None: 0, 1, ... anew.
        mask: (batch, seqlen) bool, False for padding, which is never kept.  A sample with fewer tokens than `num_keep`
            keeps those it has.
        packed: join the samples without padding.
        backend: None for the automatic choice, or a backend's name.

    Returns:
        PrunedTokens(tokens, keep_indices, position_ids, mask, cu_seqlens): (batch, width, ...) with width the largest
        number of kept tokens (with `mask`, that of a sample without padding), or (cu_seqlens[-1], ...) if packed.

    Raises:
        ShapeError: sizes disagree, num_keep below 1 or above seqlen.
        ConfigError: not exactly one of num_keep, keep_ratio and keep_mass; a share outside (0, 1].
        DataError: a score is NaN, or negative with keep_mass.
        DtypeError: a dtype that is not listed.
        DeviceError: the tensors live on different devices.

    Numerics: rows are copied, not computed; scores are compared exactly, keep_mass adds in float64.  A call inside
        torch.compile cannot raise for NaN: it ranks NaN below every number.
    Cost: one read of the scores, one read and write of what is kept.  Looks at the scores' values (on a GPU, waits for
        them) to refuse NaN.  With num_keep a tensor, with keep_mass, or packed with a mask, the size of the result
        depends on data, and torch.compile breaks its graph there.  Gradients, of any order, flow to features.

    Example:
        >>> import torch, mmkernels
        >>> scores = torch.tensor([[0.1, 0.4, 0.4, 0.05, 0.3, 0.4]])
        >>> mmkernels.prune_tokens(torch.randn(1, 6, 8), scores, num_keep=3).keep_indices
        tensor([[1, 2, 5]])

    Source: the selection of VTC-CLS, arXiv 2412.05819; checked against the definition.
    """
    seen = _verified.signature("prune", features, scores, position_ids, mask, packed)
    if seen not in _verified:
        _check_prune(features, scores, position_ids, mask, packed)
        _verified.add(seen)
    _refuse_nan(scores, mask)
    counts, width = keep_counts(scores, mask, num_keep, keep_ratio, keep_mass)
    total = None
    if packed:
        total = features.shape[0] * width if counts is None else int(counts.sum())
    args: dict[str, Any] = {
        "features": features,
        "scores": scores,
        "mask": mask,
        "position_ids": position_ids,
        "counts": counts,
        "width": width,
        "total": total,
    }
    return PrunedTokens(*PRUNE_TOKENS(backend, args))


def _check_prune(
    features: Tensor, scores: Tensor, position_ids: Tensor | None, mask: Tensor | None, packed: bool
) -> None:
    function = "prune_tokens"
    sizes = Sizes(function)
    sizes.bind("features", features, "batch seqlen dim")
    sizes.bind("scores", scores, "batch seqlen", "Leave the score of [CLS] out where features have no [CLS].")
    floating(function, features=features, scores=scores)
    if position_ids is not None:
        sizes.bind("position_ids", position_ids, "batch seqlen")
        integer(function, position_ids=position_ids)
    if mask is not None:
        sizes.bind("mask", mask, "batch seqlen")
        if mask.dtype != torch.bool:
            raise DtypeError(f"{function}: mask must be bool; got {mask.dtype}. Convert it with mask.bool().")
    same_device(function, features=features, scores=scores, position_ids=position_ids, mask=mask)
    if not isinstance(packed, bool):
        raise ConfigError(f"{function}: packed must be True or False; got {packed!r}. True joins samples unpadded.")


def _refuse_nan(scores: Tensor, mask: Tensor | None) -> None:
    if torch.compiler.is_compiling():
        return
    scores = scores.detach()
    if math.isfinite(scores.sum().item()):
        return  # the quick look: a NaN would have come through
    bad = scores.isnan() if mask is None else scores.isnan() & mask
    if bool(bad.any()):
        sample, token = bad.nonzero()[0].tolist()
        raise DataError(
            f"prune_tokens: scores must be numbers; got NaN for token {token} of sample {sample}. "
            "Look for infinities in the features or keys they came from."
        )
