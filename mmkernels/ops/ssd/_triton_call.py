"""One call of the state-space scan on Triton: how it is cut, how its kernels are compiled, and its tensors."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from mmkernels import _triton
from mmkernels._triton import Config

SHARED_HEADS = 16  # heads of a group whose dB and dC are summed in registers; each block of them writes one share


@dataclasses.dataclass(frozen=True)
class Plan:
    """Rows, spans and chunks of one call.

    Args:
        rows: states: elements of the batch, packed sequences, or elements of the batch times directions.
        every: chunks of a span; the state is stored once a span.
        tokens: of a chunk.
        spans: of each row; of a packed call, an upper bound for all rows together.
        total: spans of all rows together.
        span_row: (total,) the row each span belongs to, `rows` for what is too much; only of a packed call.
        first_span: (rows + 1,) each row's first span, and one past the last; only of a packed call.
    """

    rows: int
    every: int
    tokens: int
    spans: int
    total: int
    span_row: Tensor | None = None
    first_span: Tensor | None = None

    @property
    def chunks(self) -> int:
        return self.total * self.every

    @property
    def span(self) -> int:
        return self.every * self.tokens


def plan(batch: int, seqlen: int, cu_seqlens: Tensor | None, tokens: int, every: int) -> Plan:
    """Cut `batch` rows of `seqlen` tokens, or packed sequences, whose lengths are never read."""
    if cu_seqlens is None:
        if seqlen <= tokens:
            every = 1
        spans = -(-seqlen // (tokens * every))
        return Plan(batch, every, tokens, spans, batch * spans)
    rows = cu_seqlens.shape[0] - 1
    span = tokens * every
    total = seqlen // span + rows
    count = (cu_seqlens.diff() + span - 1) // span
    last = count.cumsum(0)
    numbers = torch.arange(total, device=cu_seqlens.device, dtype=last.dtype)
    span_row = torch.searchsorted(last, numbers, right=True).to(torch.int32)
    first_span = torch.nn.functional.pad(last, (1, 0)).to(torch.int32)
    return Plan(rows, every, tokens, total, total, span_row, first_span)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How long chunks are, and how each kernel is compiled.

    Args:
        tokens: of a chunk.
        every: chunks of a span.
        steps, states, scan, inputs, keys, step_gradients: of each kernel.
    """

    tokens: int
    every: int
    steps: Config
    states: Config
    scan: Config
    inputs: Config
    keys: Config
    step_gradients: Config


def sizes(
    architecture: str,
    dtype: torch.dtype,
    heads: int,
    groups: int,
    headdim: int,
    dstate: int,
    seqlen: int,
    chunk_size: int,
    backward: bool,
) -> Sizes:
    """Block sizes for a bucket of shapes: the largest that spill no registers, without autotuning.

    16-bit products run on tensor cores, whose tiles are 64 wide.  IEEE products of float32 run on plain multiply-adds,
    which hold whole rows of their operands in registers: their tiles are small, and they are for exactness, not speed.
    """
    interpreted = architecture == _triton.INTERPRETER
    small = dtype.itemsize > 2 and not interpreted
    # The backward's tiles of 64 tokens fit the registers only where operands of products stay in shared memory.
    roomy = interpreted or (architecture in ("sm_90", "sm_100") and headdim <= 64)
    tight = backward and architecture.startswith("gfx")  # operands of its products are held in registers
    longest = 16 if tight else 32 if small or (backward and not roomy) else 64
    tokens = min(chunk_size or longest, longest)
    every = 1 if backward or small or dstate > 128 else 2
    tile = _triton.bucket(min(tokens, max(seqlen, 1)), 16)
    span = _triton.bucket(every * tile, 16)
    n = _triton.bucket(dstate, 16, 16 if small else 64 if interpreted or tight else 128)
    p = _triton.bucket(headdim, 16, 32 if small or interpreted or tight else 64)
    block = _triton.bucket(heads, 1, 16)
    return Sizes(
        tokens=tokens,
        every=every,
        steps=Config({"SPAN": span, "HEADS": block}, 4, 1),
        states=Config({"SPAN": span, "BP": p, "BN": min(n, 64)}, 8, 1 if small else 2),
        scan=Config({"TOKENS": tile, "BP": p, "BN": n}, 8, 1 if small else 2),
        inputs=Config(
            {"TOKENS": tile, "BP": min(p, 16) if small else p, "BN": n},
            8,
            2 if architecture == "sm_120" and not small else 1,
        ),
        keys=Config(
            {
                "TOKENS": tile,
                "BP": p,
                "BN": min(n, 32 if tight else 2048 // tile, 64),
                "HEADS": min(heads // groups, SHARED_HEADS),
            },
            8,
            2 if architecture == "sm_100" and not small else 1,
        ),
        step_gradients=Config({"TOKENS": tile, "HEADS": block}, 4, 1),
    )


@dataclasses.dataclass(frozen=True)
class Call:
    """What every kernel of a call gets.  x, B, C and z are dense along their last axis.

    With an order (directions, seqlen), x, dt, B and C have an axis of directions after that of the batch, A, D and
    dt_bias one in front of the others; there are no ids, packed sequences and gate.
    """

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    ids: Tensor | None
    cu_seqlens: Tensor | None
    order: Tensor | None
    plan: Plan
    sizes: Sizes
    step_options: dict[str, Any]
    options: dict[str, Any]

    @property
    def seqlen(self) -> int:
        return self.x.shape[-3]

    @property
    def heads(self) -> int:
        return self.x.shape[-2]

    @property
    def headdim(self) -> int:
        return self.x.shape[-1]

    @property
    def groups(self) -> int:
        return self.B.shape[-2]

    @property
    def dstate(self) -> int:
        return self.B.shape[-1]

    @property
    def directions(self) -> int:
        return 1 if self.order is None else self.order.shape[0]

    @property
    def tokens(self) -> int:
        """Of all elements of the batch and all directions."""
        return self.x.shape[:-2].numel()

    def strides(self, t: Tensor) -> tuple[int, int, int, int]:
        """Of batch, directions, tokens and heads (or groups) of x, dt, B, C or a gradient."""
        batch, *directions, token, head = t.stride()[: self.x.dim() - 1]
        return batch, directions[0] if directions else 0, token, head

    @property
    def ids_strides(self) -> tuple[int, ...]:
        return (0, 0) if self.ids is None else self.ids.stride()

    @property
    def z_strides(self) -> tuple[int, ...]:
        return (0, 0, 0) if self.z is None else self.z.stride()[:3]

    @property
    def skip_strides(self) -> tuple[int, int, int]:
        """Of directions, heads and channels of D."""
        if self.D is None:
            return 0, 0, 0
        direction, *own = self.D.stride() if self.order is not None else (0, *self.D.stride())
        return direction, own[0], own[1] if len(own) == 2 else 0

    @property
    def acc(self) -> torch.dtype:
        return _triton.accumulator(self.x.dtype)


def dense(t: Tensor) -> Tensor:
    """t with a last axis of stride 1."""
    return t if t.shape[-1] == 1 or t.stride(-1) == 1 else t.contiguous()


def prepare(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    ids: Tensor | None,
    cu_seqlens: Tensor | None,
    softplus: bool,
    limit: tuple[float, float],
    chunk_size: int,
    reverse: bool,
    *,
    order: Tensor | None = None,
    backward: bool = False,
) -> Call:
    """The call with its plan and its block sizes; `order` is dense."""
    from mmkernels import _triton_math

    seqlen, heads, headdim = x.shape[-3:]
    where = _triton.architecture(x.device)
    chosen = sizes(where, x.dtype, heads, B.shape[-2], headdim, B.shape[-1], seqlen, chunk_size, backward)
    return Call(
        x=dense(x),
        dt=dt,
        A=A.contiguous(),
        B=dense(B),
        C=dense(C),
        D=D,
        z=None if z is None else dense(z),
        dt_bias=None if dt_bias is None else dt_bias.contiguous(),
        ids=ids,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.contiguous(),
        order=order,
        plan=plan(x.shape[:-3].numel(), seqlen, cu_seqlens, chosen.tokens, chosen.every),
        sizes=chosen,
        step_options={"SOFTPLUS": softplus, "LOW": limit[0], "HIGH": limit[1]},
        options={"REVERSE": reverse, "ACC": _triton_math.dtype(_triton.accumulator(x.dtype))},
    )
