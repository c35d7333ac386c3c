"""Triton kernels of cls_attention_scores: attention of a few query rows to all keys, averaged over rows and heads."""

import triton
import triton.language as tl

from mmkernels import _triton
from mmkernels._triton import Config, Specimen


@triton.jit(do_not_specialize=["seqlen", "tiles"])
def logits_kernel(
    q,
    k,
    logits,
    largest,
    sums,
    scale,
    rows,
    seqlen,
    nheads,
    tiles,
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    GROUP: tl.constexpr,
    HEADDIM: tl.constexpr,
    ACC: tl.constexpr,
    KEYS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """logits[b, r, h, j] = scale q[b, r, h] . k[b, j, h // GROUP]; of a tile the largest and sum_j e^(logit - largest).

    Grid: (batch * nkvheads * tiles,).  A program owns KEYS keys of one key-value head, which it reads once, and the
    logits of all query rows and heads that read them.  Without `largest` only the logits are written.
    Bytes: k read once, q once for every tile, logits (batch, rows, nheads, seqlen) written once in ACC.
    """
    tile = tl.program_id(0) % tiles
    nkvheads = nheads // GROUP
    kv = (tl.program_id(0) // tiles % nkvheads).to(tl.int64)
    b = (tl.program_id(0) // tiles // nkvheads).to(tl.int64)
    key = tile * KEYS + tl.arange(0, KEYS)
    inside = key < seqlen
    channel = tl.arange(0, CHANNELS)
    at = b * k_batch + kv * k_head + key.to(tl.int64) * k_row
    keys = tl.load(k + at[:, None] + channel[None, :], inside[:, None] & (channel < HEADDIM)[None, :], other=0.0)
    keys = keys.to(ACC)
    for n in range(0, rows * GROUP):
        row = tl.cast(n // GROUP, tl.int64)
        head = kv * GROUP + n % GROUP
        query = tl.load(q + b * q_batch + row * q_row + head * q_head + channel, channel < HEADDIM, other=0.0)
        products = tl.sum(keys * query.to(ACC)[None, :], 1) * scale
        line = (b * rows + row) * nheads + head
        tl.store(logits + line * seqlen + key, products, inside)
        if largest is not None:
            products = tl.where(inside, products, float("-inf"))
            top = tl.max(products, 0)
            # A tile of nothing but -inf has the sum 0, not e^(-inf + inf).
            shift = tl.where(top == float("-inf"), 0.0, top)
            tl.store(largest + line * tiles + tile, top)
            tl.store(sums + line * tiles + tile, tl.sum(tl.exp(products - shift), 0))


@triton.jit(do_not_specialize=["seqlen", "tiles", "prefix"])
def mean_kernel(
    logits,
    largest,
    sums,
    lse,
    scores,
    share,
    rows,
    seqlen,
    nheads,
    tiles,
    prefix,
    l_batch,
    l_head,
    l_row,
    ACC: tl.constexpr,
    TOKENS: tl.constexpr,
    TILES: tl.constexpr,
):
    """scores[b, j - prefix] = share * sum_rh e^(logits[b, r, h, j] - lse[b, h, r]), heads and rows in order.

    Grid: (batch * cdiv(seqlen - prefix, TOKENS),).  A program owns TOKENS tokens of one sample.  Without lse it is put
    together from the tiles' largest logits and sums, TILES of them at least.
    Bytes: logits read once, largest and sums once for every TOKENS tokens, scores written once.
    """
    strips = tl.cdiv(seqlen - prefix, TOKENS)
    b = (tl.program_id(0) // strips).to(tl.int64)
    token = tl.program_id(0) % strips * TOKENS + tl.arange(0, TOKENS)
    inside = token < seqlen - prefix
    tile = tl.arange(0, TILES)
    total = tl.zeros((TOKENS,), ACC)
    for n in range(0, rows * nheads):
        line = b * rows * nheads + n
        if lse is None:
            tops = tl.load(largest + line * tiles + tile, tile < tiles, other=float("-inf"))
            parts = tl.load(sums + line * tiles + tile, tile < tiles, other=0.0)
            top = tl.max(tops, 0)
            norm = top + tl.log(tl.sum(parts * tl.exp(tops - top), 0))
        else:
            head, row = tl.cast(n % nheads, tl.int64), tl.cast(n // nheads, tl.int64)
            norm = tl.load(lse + b * l_batch + head * l_head + row * l_row).to(ACC)
        logit = tl.load(logits + line * seqlen + prefix + token, inside, other=float("-inf"))
        total += tl.exp(logit - norm)
    tl.store(scores + b * (seqlen - prefix) + token, total * share, inside)


def logits_config(headdim: int) -> Config:
    """4096 elements of k a program: 32 registers a thread, and hundreds of programs for one image."""
    channels = _triton.bucket(headdim, 16)
    return Config({"KEYS": max(16, 4096 // channels), "CHANNELS": channels})


def mean_config(tiles: int) -> Config:
    """128 tokens a program: loads of one warp's width for every head, many in flight."""
    return Config({"TOKENS": 128, "TILES": _triton.bucket(tiles, 1)})


def specimens(architecture: str) -> list[Specimen]:
    """What is compiled ahead of time: CLIP and SigLIP encoders, a resampler's grouped heads, a given lse."""
    types = dict.fromkeys(("logits", "largest", "sums", "lse", "scores"), "*fp32")
    types |= {"scale": "fp32", "share": "fp32", "rows": "i32", "seqlen": "i32", "nheads": "i32", "tiles": "i32"}
    types |= {f"{t}_{axis}": "i64" for t in "qk" for axis in ("batch", "row", "head")}
    types |= dict.fromkeys(("l_batch", "l_head", "l_row"), "i64")
    found = []
    for dtype, headdim, group in (("bf16", 64, 1), ("bf16", 72, 1), ("fp32", 64, 1), ("bf16", 128, 4)):
        constants = {"GROUP": group, "HEADDIM": headdim, "ACC": tl.float32}
        label = f"{dtype} headdim {headdim} group {group}"
        inputs = dict.fromkeys(("q", "k"), f"*{dtype}")
        found.append(Specimen(label, logits_kernel, types | inputs, logits_config(headdim), constants))
    given = {"ACC": tl.float32, "largest": None, "sums": None}
    found.append(Specimen("lse given", mean_kernel, types, mean_config(10), given))
    found.append(Specimen("577 keys", mean_kernel, types, mean_config(10), {"ACC": tl.float32, "lse": None}))
    return found
