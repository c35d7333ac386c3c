"""The best plain PyTorch we know how to write for torch.compile: all chunks at once, fused by inductor into C++.

Two compiled halves around a short eager loop: inductor would unroll the recurrence between chunks into one graph per
length, slower to compile and to run than one fused multiply-add per chunk into memory that is there already.
"""

import functools
import shutil
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.bench.problems import Prepared, Problem, Unavailable, require_one_row


def _inside(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, q: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the chunks do by themselves: outputs, states they leave, their whole decay, decay up to each token."""
    length, heads, width = x.shape
    groups, dstate = B.shape[1:]
    chunks, share = length // q, heads // groups
    step = F.softplus(dt + dt_bias)
    decay = (step * A).view(chunks, q, heads).cumsum(1)
    x_c, B_c, C_c = (
        x.view(chunks, q, heads, width),
        B.view(chunks, q, groups, dstate),
        C.view(chunks, q, groups, dstate),
    )
    B_g, C_g = B_c.transpose(1, 2), C_c.transpose(1, 2)
    scores = torch.matmul(C_g, B_g.transpose(2, 3))[:, :, None]  # chunks groups 1 q q, once for the heads of a group
    by_head = decay.transpose(1, 2)
    reach = by_head[..., :, None] - by_head[..., None, :]
    causal = torch.ones(q, q, dtype=torch.bool, device=x.device).tril()
    mask = reach.masked_fill(~causal, float("-inf")).exp().unflatten(1, (groups, share))
    weighted = (x_c * step.view(chunks, q, heads, 1)).to(x.dtype)
    y = torch.matmul((mask * scores).to(x.dtype).flatten(1, 2), weighted.transpose(1, 2)).transpose(1, 2)
    y = y + D[:, None].to(x.dtype) * x_c
    last = decay[:, -1:]
    kept = weighted * (last - decay).exp()[..., None].to(x.dtype)
    kept = kept.view(chunks, q, groups, share * width).permute(0, 2, 3, 1)
    states = torch.matmul(kept, B_g).float().view(chunks, heads, width, dstate)
    return y, states, last[:, 0].exp()[..., None, None], decay.exp()


def _across(y: Tensor, before: Tensor, C: Tensor, grown: Tensor) -> Tensor:
    """Add what the tokens of each chunk read from the state before it."""
    chunks, q, heads, width = y.shape
    groups, dstate = C.shape[1:]
    C_g = C.view(chunks, q, groups, dstate).transpose(1, 2)
    states = before.to(C.dtype).view(chunks, groups, heads // groups * width, dstate)
    read = torch.matmul(C_g, states.transpose(2, 3)).transpose(1, 2).reshape(chunks, q, heads, width)
    return (y + read * grown[..., None].to(C.dtype)).reshape(chunks * q, heads, width)


def between(states: Tensor, decay: Tensor) -> Tensor:
    """The state before each chunk, from the states the chunks leave and their decays."""
    if states.requires_grad:
        state, found = torch.zeros_like(states[0]), []
        for left, factor in zip(states, decay, strict=True):
            found.append(state)
            state = torch.addcmul(left, state, factor)
        return torch.stack(found)
    before = torch.empty_like(states)
    before[0] = 0
    for k in range(states.shape[0] - 1):
        torch.addcmul(states[k], before[k], decay[k], out=before[k + 1])
    return before


@functools.cache
def _compiled(threads: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        raise Unavailable("torch.compile needs a C++ compiler for its CPU code, and there is none")
    torch._dynamo.config.recompile_limit = 256  # every cell of the race is a shape of its own
    options: Any = {"cpp.threads": threads}
    return (
        torch.compile(_inside, dynamic=False, options=options),
        torch.compile(_across, dynamic=False, options=options),
    )


def scan(problem: Problem, *, chunk: int) -> Prepared:
    """The scan; step size, skip and recurrence included."""
    require_one_row(problem)
    if problem.cell.seqlen % chunk:
        raise Unavailable(f"takes lengths divisible by its chunk of {chunk} only")
    a = problem.args
    inside, across = _compiled(problem.cell.threads)

    def run() -> Tensor:
        C = a["C"][0]
        y, states, decay, grown = inside(a["x"][0], a["dt"][0], a["A"], a["B"][0], C, a["D"], a["dt_bias"], chunk)
        return across(y, between(states, decay), C, grown)

    return Prepared(run, lambda y: y[None])
