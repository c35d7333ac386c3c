"""Public function attention_column_scores: the attention that tokens receive, without the attention map."""

import math

import torch
from torch import Tensor

from mmkernels import _triton
from mmkernels._checks import Sizes, floating, same_device, same_dtype
from mmkernels._dispatch import NATIVE_PROBE, Backend, Op
from mmkernels._gradients import untracked_transform
from mmkernels.errors import ConfigError, DtypeError, ShapeError

_HERE = "mmkernels.ops.token_pruning"

ATTENTION_COLUMN_SCORES = Op(
    "attention_column_scores",
    key="k",
    public=f"{_HERE}.received.attention_column_scores",
    backends=[
        Backend(
            "native", f"{_HERE}._native_received:attention_column_scores", ("cpu",), untracked_transform, NATIVE_PROBE
        ),
        Backend(
            "triton",
            f"{_HERE}._triton_received:attention_column_scores",
            _triton.DEVICES,
            _triton.objections,
            _triton.PROBE,
        ),
        Backend("torch", f"{_HERE}._torch:attention_column_scores"),
        Backend("reference", f"{_HERE}.reference:attention_column_scores"),
    ],
)


def attention_column_scores(
    q: Tensor,
    k: Tensor,
    *,
    lse: Tensor | None = None,
    scale: float | None = None,
    num_prefix: int = 1,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    causal: bool = False,
    backend: str | None = None,
) -> Tensor:
    r"""Score every token by the attention it receives: the mean of its column of the attention map.

    $$s_j = \frac{1}{H |R|} \sum_h \sum_{r \in R} \mathrm{softmax}_i(\mathrm{scale} \; q_{rh} \cdot k_{ih})_j$$

    R are the query rows that `query_mask` names, else all.  The map is never whole in memory: blocks of rows pass by.
    For one row or a few, `cls_attention_scores` is the same without masks.

    Args:
        q: (batch, rows, nheads, headdim); float32, bfloat16, float16 or float64.
        k: (batch, seqlen, nkvheads, headdim), in q's dtype; nkvheads divides nheads, and query head h reads key head
            h // (nheads // nkvheads).
        lse: (batch, nheads, rows), log of the sum of exp(scale q k) over the keys a row sees, where an attention kernel
            has left it; None: computed.
        scale: of the products; None: 1 / sqrt(headdim).
        num_prefix: leading keys ([CLS], registers) that get no score, but take part in the softmax.
        query_mask: (batch, rows) bool, the rows that count; None: all.
        key_mask: (batch, seqlen) bool, False for padding, which no row sees; None: none.
        causal: row r sees keys up to r + seqlen - rows only.
        backend: None for the automatic choice, or a backend's name.

    Returns:
        scores: (batch, seqlen - num_prefix) in float32 (float64 for float64).  Rows that see no key, and samples of
        which no row counts, give zeros.

    Raises:
        ShapeError: sizes disagree, or num_prefix is not in 0 .. seqlen.
        DtypeError: a dtype outside the four, q and k differ, or a mask is not bool.
        DeviceError: the tensors live on different devices.
        ConfigError: causal is not a bool.

    Numerics: products, softmax and sums in float32 (float64 for float64); results of the native and Triton kernels do
        not depend on the batch, nor on the number of threads.  What masked tokens hold, NaN too, does not matter.
    Cost: 2 |R| nheads seqlen headdim flops and |R| nheads seqlen exponentials (Triton without lse: twice that); memory
        for some 128 rows of the map, or fewer (Triton: for nheads (rows + seqlen) values).  Differentiable twice in q,
        k and lse, with the whole map in memory.

    Example:
        >>> import torch, mmkernels
        >>> q, k = torch.randn(2, 577, 16, 64), torch.randn(2, 577, 16, 64)
        >>> mmkernels.attention_column_scores(q, k).shape
        torch.Size([2, 576])

    Source: the score of HiPrune, and of VisionZip and VisPruner for encoders without [CLS]; checked against the formula
        in float64.
    """
    function = "attention_column_scores"
    sizes = Sizes(function)
    sizes.bind("q", q, "batch rows nheads headdim")
    sizes.bind("k", k, "batch seqlen nkvheads headdim")
    sizes.divides("nkvheads", "nheads", "Each key head serves equally many query heads.")
    if sizes["headdim"] < 1:
        raise ShapeError(f"{function}: q must have at least one channel; got {tuple(q.shape)}. Give whole heads.")
    if not 0 <= num_prefix <= sizes["seqlen"]:
        raise ShapeError(
            f"{function}: num_prefix must be in 0 .. seqlen={sizes['seqlen']}; got {num_prefix}. "
            "It counts leading keys that are no image tokens, such as [CLS]."
        )
    if lse is not None:
        sizes.bind("lse", lse, "batch nheads rows")
    for name, mask, layout in (("query_mask", query_mask, "batch rows"), ("key_mask", key_mask, "batch seqlen")):
        if mask is not None:
            sizes.bind(name, mask, layout)
            if mask.dtype != torch.bool:
                raise DtypeError(f"{function}: {name} must be bool; got {mask.dtype}. Convert it with {name}.bool().")
    if not isinstance(causal, bool):
        raise ConfigError(f"{function}: causal must be True or False; got {causal!r}. True for decoders.")
    floating(function, q=q, k=k, lse=lse)
    same_dtype(function, q=q, k=k)
    same_device(function, q=q, k=k, lse=lse, query_mask=query_mask, key_mask=key_mask)
    args = {
        "q": q,
        "k": k,
        "lse": lse,
        "scale": 1 / math.sqrt(sizes["headdim"]) if scale is None else float(scale),
        "num_prefix": num_prefix,
        "query_mask": query_mask,
        "key_mask": key_mask,
        "causal": causal,
    }
    scores: Tensor = ATTENTION_COLUMN_SCORES(backend, args)
    return scores
