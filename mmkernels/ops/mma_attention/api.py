"""Public function mma_attention: signature, validation, dispatch.

Softmax attention (arXiv 1706.03762, equation 1) under an MMAMask; modality-mutual masks: arXiv 2503.02597, section 3.
"""

import torch

from mmkernels import _triton
from mmkernels._checks import Sizes, floating, same_device, same_dtype
from mmkernels._dispatch import NATIVE_PROBE, Backend, Op
from mmkernels._gradients import untracked_transform
from mmkernels.errors import DtypeError, ShapeError
from mmkernels.ops.mma_attention.mask import MMAMask, mma_mask

_HERE = "mmkernels.ops.mma_attention"


def _upstream_declines(q: torch.Tensor, mass_weights: torch.Tensor | None, **_: object) -> list[str]:
    # What flash-attn does not do.
    reasons = []
    if q.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"flash-attn takes float16 and bfloat16; q is {q.dtype}")
    if q.shape[3] > 256 or q.shape[3] % 8:
        reasons.append(f"flash-attn takes head dimensions up to 256 in steps of 8; headdim is {q.shape[3]}")
    if mass_weights is not None:
        reasons.append("flash-attn returns no attention mass")
    return reasons


MMA_ATTENTION = Op(
    "mma_attention",
    key="q",
    public="mmkernels.ops.mma_attention.api.mma_attention",
    backends=[
        Backend("native", f"{_HERE}._native:mma_attention", ("cpu",), untracked_transform, NATIVE_PROBE),
        Backend("triton", f"{_HERE}._triton:mma_attention", _triton.DEVICES, _triton.objections, _triton.PROBE),
        Backend("torch", f"{_HERE}._torch:mma_attention"),
        Backend("reference", f"{_HERE}.reference:mma_attention"),
        Backend("upstream", f"{_HERE}._upstream:mma_attention", ("cuda",), declines=_upstream_declines),
    ],
)


def mma_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: MMAMask | None = None,
    *,
    scale: float | None = None,
    mass_weights: torch.Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Softmax attention that computes only what an interval-and-rectangle mask keeps.

    out[b, i, h] = sum_j P[i, j] v[b, j, g], P[i, j] = keep(b, i, j) exp(scale q[b, i, h] . k[b, j, g] - lse[b, h, i]),
    lse[b, h, i] = log sum_{j kept} exp(scale q[b, i, h] . k[b, j, g]), with g = h nkvheads // nheads the key-value head
    of query head h.  arXiv 1706.03762, equation 1.

    Args:
        q: (batch, qlen, nheads, headdim), any strides, any headdim; float32, bfloat16, float16 or float64.
        k: (batch, klen, nkvheads, headdim) in q's dtype; nkvheads divides nheads.
        v: (batch, klen, nkvheads, headdim) in q's dtype.
        mask: an `MMAMask` for this batch, qlen and klen (`mma_mask` and its constructors); None: causal, with the last
            row on the last key when qlen < klen.
        scale: multiplies the scores; None: headdim ** -0.5.
        mass_weights: (batch, qlen), any float dtype: also return the attention mass of every key.  1 for the rows that
            count (the last row, a [CLS] row), 0 elsewhere.
        return_lse: also return lse.
        backend: None for the automatic choice, or a backend's name.

    Returns:
        out (batch, qlen, nheads, headdim) in q's dtype; with return_lse also lse (batch, nheads, qlen); with
        mass_weights also mass (batch, nheads, klen) = sum_i mass_weights[b, i] P[i, j], in that order; both float32
        (float64 for float64).  A row that keeps no key has out 0, lse -inf, and no part in any gradient.

    Raises:
        ShapeError: sizes disagree, nkvheads does not divide nheads, a mask for other sizes, qlen > klen without a mask.
        DtypeError: a dtype outside the four, q, k and v of different dtypes, a mask that is not an MMAMask.
        DeviceError: tensors on different devices.

    Numerics: scores, softmax and sums in float32 (float64 for float64), one rounding on output; deterministic.  Where
    16-bit numbers are multiplied as such (GPUs, bfloat16 on AMD CPUs from Zen 4 on) P is rounded to them before P V.
    Gradients reach q, k and v, through out and lse; mass is a statistic without gradient.  Keys and values that a row
    does not attend must still be finite: a backend may read the tile they share with others.
    Cost: 4 * headdim flops for every kept pair and head (tiles that keep nothing are skipped); memory O(qlen + klen).

    Example:
        >>> import torch, mmkernels
        >>> q, kv = torch.randn(1, 6, 4, 8), torch.randn(1, 6, 2, 8)
        >>> mask = mmkernels.mma_mask(6, spans=[(0, 1, 3, 3, 5)])  # image rows 1, 2 read the question at 3, 4
        >>> mmkernels.mma_attention(q, kv, kv, mask).shape
        torch.Size([1, 6, 4, 8])

    Source: checked against the formula in float64 and against torch's scaled_dot_product_attention with the dense mask.
    """
    function = "mma_attention"
    sizes = Sizes(function)
    sizes.bind("q", q, "batch qlen nheads headdim", "Heads come third; use q.transpose(1, 2) if they came second.")
    sizes.bind("k", k, "batch klen nkvheads headdim", "Heads come third; use k.transpose(1, 2) if they came second.")
    sizes.bind("v", v, "batch klen nkvheads headdim", "Heads come third; use v.transpose(1, 2) if they came second.")
    if sizes["headdim"] < 1:
        raise ShapeError(
            f"{function}: q must have headdim >= 1; got {tuple(q.shape)}. Scores need at least one channel."
        )
    sizes.divides("nkvheads", "nheads", "Query heads share key-value heads in groups of nheads / nkvheads.")
    floating(function, q=q)
    same_dtype(function, q=q, k=k, v=v)
    batch, qlen, klen = q.shape[0], q.shape[1], k.shape[1]
    row_start, row_end, rects = _rows(function, q, mask, batch, qlen, klen)
    if mass_weights is not None:
        sizes.bind("mass_weights", mass_weights, "batch qlen")
        floating(function, mass_weights=mass_weights)
        mass_weights = mass_weights.to(torch.promote_types(q.dtype, torch.float32))
    same_device(function, q=q, k=k, v=v, mask=row_start, mass_weights=mass_weights)
    out, lse, mass = MMA_ATTENTION(
        backend,
        {
            "q": q,
            "k": k,
            "v": v,
            "row_start": row_start,
            "row_end": row_end,
            "rects": rects,
            "scale": q.shape[3] ** -0.5 if scale is None else float(scale),
            "mass_weights": mass_weights,
            "return_lse": return_lse,
        },
    )
    if not return_lse and mass_weights is None:
        return out
    return (out, *((lse,) if return_lse else ()), *((mass,) if mass_weights is not None else ()))


def _rows(
    function: str, q: torch.Tensor, mask: MMAMask | None, batch: int, qlen: int, klen: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if mask is None:
        if qlen > klen:
            raise ShapeError(
                f"{function}: k must have at least as many tokens as q for the causal mask; got klen={klen}, "
                f"qlen={qlen}. Pass mask=MMAMask.full(qlen, klen) for cross-attention."
            )
        mask = mma_mask(qlen, klen, batch=batch, device=q.device)
    if not isinstance(mask, MMAMask):
        raise DtypeError(
            f"{function}: mask must be an MMAMask or None; got {type(mask).__name__}. Build it with mma_mask; for a "
            "dense mask use torch's scaled_dot_product_attention."
        )
    if (mask.batch, mask.qlen, mask.klen) != (batch, qlen, klen):
        raise ShapeError(
            f"{function}: mask must be for batch={batch}, qlen={qlen}, klen={klen}; got batch={mask.batch}, "
            f"qlen={mask.qlen}, klen={mask.klen}. Build it for this call; mask.expand(batch) repeats one for a batch."
        )
    return mask.row_start, mask.row_end, mask.rects
