"""Public functions bipartite_soft_matching and merge_tokens: which tokens are alike, and their means (ToMe)."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mmkernels import _triton
from mmkernels._checks import Sizes, floating, integer, same_device
from mmkernels._dispatch import NATIVE_PROBE, Backend, Op
from mmkernels._gradients import untracked_transform
from mmkernels.errors import ConfigError, DataError, DtypeError, ShapeError, nearest

_HERE = "mmkernels.ops.token_pruning"


def _op(name: str, key: str) -> Op:
    return Op(
        name,
        key=key,
        public=f"{_HERE}.merging.{name}",
        backends=[
            Backend("native", f"{_HERE}._native_merging:{name}", ("cpu",), untracked_transform, NATIVE_PROBE),
            Backend("triton", f"{_HERE}._triton_merging:{name}", _triton.DEVICES, _triton.objections, _triton.PROBE),
            Backend("torch", f"{_HERE}._torch:{name}"),
            Backend("reference", f"{_HERE}.reference:{name}"),
        ],
    )


BIPARTITE_SOFT_MATCHING = _op("bipartite_soft_matching", "metric")
MERGE_TOKENS = _op("merge_tokens", "x")
_ORDERS = ("raster", "sets")


class MergePlan(NamedTuple):
    """What bipartite_soft_matching finds.

    Attributes:
        keep_indices: (batch, tokens - r) int64, the tokens that remain, in the order of the output.
        assignment: (batch, tokens) int64, the place in that order where each token ends up.  To copy back:
            `merged.gather(1, assignment[..., None].expand(-1, -1, dim))`.
        source: (batch, r) int64, the tokens that are merged into others, the most similar first.
        similarity: (batch, r), their cosine with what they are merged into.
    """

    keep_indices: Tensor
    assignment: Tensor
    source: Tensor
    similarity: Tensor


def bipartite_soft_matching(
    metric: Tensor, r: int, *, protect: int = 0, order: str = "raster", backend: str | None = None
) -> MergePlan:
    r"""Find the r tokens that are most like another one, among pairs of an even and an odd place.

    $$a \to b(a) = \arg\max_{b \; \text{odd}} \cos(m_a, m_b), \qquad a \; \text{even}$$

    The r links of largest cosine are made; several tokens may go to the same b.

    Args:
        metric: (batch, tokens, dim), what makes tokens alike: in ToMe the mean over heads of the keys; float32,
            bfloat16, float16 or float64.
        r: how many tokens to merge away, at most (tokens - protect) // 2.
        protect: leading tokens ([CLS]) that neither merge nor are merged into.
        order: of the output: "raster", as the tokens stood; or "sets": even places, then odd ones, each as they stood.
        backend: None for the automatic choice, or a backend's name.

    Returns:
        MergePlan(keep_indices, assignment, source, similarity), for `merge_tokens`.

    Raises:
        ShapeError: r or protect out of range, or metric has another number of dimensions.
        ConfigError: an unknown order.
        DtypeError: a dtype outside the four, or r is no int.
        DataError: NaN in metric.

    Numerics: cosines in float32 (float64 for float64), 0 with a vector of zeros; of equal cosines the lower place wins,
        of b as of a.  Backends may differ where cosines differ by rounding only; results of the native and Triton
        kernels depend neither on the batch nor on the number of threads.  Compiled calls cannot raise for NaN.
    Cost: tokens^2 dim / 2 flops and tokens dim values of memory (the torch backend: tokens^2 / 4 cosines more).  The
        similarity is differentiable twice, the choice not.

    Example:
        >>> import torch, mmkernels
        >>> keys = torch.randn(2, 577, 16, 64)
        >>> plan = mmkernels.bipartite_soft_matching(keys.mean(2), 16, protect=1)
        >>> mmkernels.merge_tokens(torch.randn(2, 577, 1024), plan)[0].shape
        torch.Size([2, 561, 1024])

    Source: ToMe, arXiv 2210.09461, section 3; checked against the definition.
    """
    function = "bipartite_soft_matching"
    sizes = Sizes(function)
    sizes.bind("metric", metric, "batch tokens dim")
    floating(function, metric=metric)
    for name, value in (("r", r), ("protect", protect)):
        if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
            raise DtypeError(f"{function}: {name} must be an int; got {value!r}. It counts tokens.")
    tokens = sizes["tokens"]
    if not 0 <= protect <= tokens:
        raise ShapeError(
            f"{function}: protect must be in 0 .. tokens={tokens}; got {protect}. It counts leading tokens."
        )
    if not 0 <= r <= (tokens - protect) // 2:
        raise ShapeError(
            f"{function}: r must be in 0 .. {(tokens - protect) // 2}, half of the tokens that may merge; got {r}. "
            "Merge more tokens in several rounds."
        )
    if order not in _ORDERS:
        raise ConfigError(
            f"{function}: order must be one of {', '.join(_ORDERS)}; got {order!r}. {nearest(str(order), _ORDERS)}"
        )
    _refuse_nan(metric.detach())
    args = {"metric": metric, "r": r, "protect": protect, "order": order}
    return MergePlan(*BIPARTITE_SOFT_MATCHING(backend, args))


def _refuse_nan(metric: Tensor) -> None:
    if torch.compiler.is_compiling() or math.isfinite(metric.sum(dtype=torch.float64).item()):
        return  # the quick look: a NaN would have come through
    if bool(metric.isnan().any()):
        sample, token, _ = metric.isnan().nonzero()[0].tolist()
        raise DataError(
            f"bipartite_soft_matching: metric must be numbers; got NaN for token {token} of sample {sample}. "
            "Look for infinities in the keys it came from."
        )


def merge_tokens(
    x: Tensor, plan: MergePlan, *, sizes: Tensor | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    r"""Replace merged tokens by their mean, weighted with how many patches each of them stands for.

    $$y_o = \frac{1}{S_o} \sum_{i: \, o(i) = o} s_i x_i, \qquad S_o = \sum_{i: \, o(i) = o} s_i$$

    Args:
        x: (batch, tokens, dim); float32, bfloat16, float16 or float64.
        plan: of `bipartite_soft_matching` for the same tokens.
        sizes: (batch, tokens), how many patches each token stands for, larger than 0; None: one.
        backend: None for the automatic choice, or a backend's name.

    Returns:
        (tokens, sizes): (batch, tokens - r, dim) in x's dtype, and (batch, tokens - r) in float32 (float64 for
        float64): those of the next call, and the log of which attention adds to its logits (proportional attention).

    Raises:
        ShapeError: sizes disagree.
        DtypeError: a dtype outside the four, or a plan of other than int64.
        DeviceError: the tensors live on different devices.

    Numerics: means in float32 (float64 for float64), as x_b + sum of s_i / S (x_i - x_b): a token that nothing
        is merged into keeps every bit.
    Cost: one read and one write of x, and some operations on r rows.  Differentiable twice in x and sizes.

    Example:
        >>> import torch, mmkernels
        >>> x = torch.tensor([[[1.0], [4.0], [2.0], [2.0]]])
        >>> plan = mmkernels.bipartite_soft_matching(torch.tensor([[[1.0, 0], [0, 1], [1, 1], [0, 2]]]), 1)
        >>> mmkernels.merge_tokens(x, plan)  # tokens 1 and 2 are the closest
        (tensor([[[1.], [3.], [2.]]]), tensor([[1., 2., 1.]]))

    Source: ToMe, arXiv 2210.09461, section 3; checked against the formula.
    """
    function = "merge_tokens"
    named = Sizes(function)
    named.bind("x", x, "batch tokens dim")
    keep_indices, assignment, source, _ = plan
    named.bind("plan.assignment", assignment, "batch tokens", "Make the plan from these tokens.")
    named.bind("plan.keep_indices", keep_indices, "batch kept")
    named.bind("plan.source", source, "batch r")
    integer(function, assignment=assignment, keep_indices=keep_indices, source=source)
    floating(function, x=x, sizes=sizes)
    if sizes is not None:
        named.bind("sizes", sizes, "batch tokens")
    same_device(function, x=x, assignment=assignment, keep_indices=keep_indices, source=source, sizes=sizes)
    args = {"x": x, "keep_indices": keep_indices, "assignment": assignment, "source": source, "sizes": sizes}
    tokens, merged_sizes = MERGE_TOKENS(backend, args)
    return tokens, merged_sizes
