"""The definition of mma_attention, head by head on dense scores: the oracle, in any float dtype."""

import torch
from torch import Tensor

from mmkernels.ops.mma_attention.mask import MMAMask
from mmkernels.ops.mma_attention.views import dense


def mma_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_start: Tensor,
    row_end: Tensor,
    rects: Tensor,
    scale: float,
    mass_weights: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See mmkernels.mma_attention."""
    batch, qlen, nheads, _ = q.shape
    klen, nkvheads = k.shape[1:3]
    keep = dense(MMAMask(row_start, row_end, rects, klen))
    acc = torch.promote_types(q.dtype, torch.float32)
    out = q.to(acc).masked_fill(torch.ones_like(q, dtype=torch.bool), 0)  # an empty batch has its (empty) gradient too
    lse = q.new_full((batch, nheads, qlen), float("-inf"), dtype=acc)
    mass = None if mass_weights is None else q.new_zeros(batch, nheads, klen, dtype=acc)
    for b in range(batch):
        alive = keep[b].any(-1).nonzero()[:, 0]  # a row without keys has no softmax: output 0, lse -inf
        for h in range(nheads):
            kv = h // (nheads // nkvheads)
            scores = scale * q[b, alive, h].to(acc) @ k[b, :, kv].to(acc).T
            scores = scores.masked_fill(~keep[b, alive], float("-inf"))
            total = torch.logsumexp(scores, -1)
            p = torch.exp(scores - total[:, None])
            out[b, alive, h] = p @ v[b, :, kv].to(acc)
            lse[b, h, alive] = total
            if mass is not None and mass_weights is not None:
                mass[b, h] = (mass_weights[b, alive].detach() @ p).detach()
    return out.to(q.dtype), lse if return_lse else None, mass
