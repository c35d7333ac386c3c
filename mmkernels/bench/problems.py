"""What a contestant is given and what it must give back: inputs by cell, truth in float64, the bar for being right."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkernels
from mmkernels.bench.shapes import Cell
from mmkernels.testing import error_of

# Largest error of an output or gradient, in units of its largest magnitude.  Float32: sums over up to 256 tokens in
# other orders, with float32 prefix sums of decays (4e-5 in the peer that has them).  Bfloat16: some peers round
# intermediate results, which costs a few units in the last place (2^-8).
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
TINY_LENGTH = 512  # two chunks of the largest chunk size in use


class Unavailable(Exception):  # noqa: N818  (a fact about this machine or this cell, not a mistake)
    """Why a contestant does not take part; the table says it."""


# What other people's code raises when it does not fit this machine; reported in the table like any other absence.
PEER_ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, ImportError, AssertionError, OSError)


def failure(error: BaseException) -> str:
    """One line about an exception of a peer."""
    lines = str(error).strip().splitlines() or [""]
    return f"failed: {type(error).__name__}: {lines[0][:160]}"


def _same(out: Any) -> Any:
    return out


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A contestant at the start line.

    Attributes:
        run: what is timed.
        result: turns what `run` returned into a tensor comparable with the truth; not timed.
        calls: calls of the op in one `run`.
    """

    run: Callable[[], Any]
    result: Callable[[Any], Tensor] = _same
    calls: int = 1


@dataclasses.dataclass
class Problem:
    """Inputs of one cell; `args` hold tensors by the names of the op's public function."""

    cell: Cell
    args: dict[str, Any]

    def leaves(self) -> list[Tensor]:
        """The tensors that have gradients in a forward and backward cell."""
        return [v for v in self.args.values() if isinstance(v, Tensor) and v.requires_grad]


@dataclasses.dataclass(frozen=True)
class Contestant:
    """Somebody who can run an op.

    Attributes:
        name: as tables show it.
        prepare: makes a Prepared of a Problem, or raises Unavailable.
        dtypes: it takes.
        backward: None, or why it does not run forward and backward.
        tuned_malloc: runs in a child process whose allocator keeps large blocks instead of returning them.
        left_out: gives the reason why a cell is not worth its time, or None.
    """

    name: str
    prepare: Callable[[Problem], Prepared]
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    backward: str | None = None
    tuned_malloc: bool = False
    left_out: Callable[[Cell], str | None] | None = None

    def objection(self, cell: Cell) -> str | None:
        """Why it does not run this cell, as far as that is known beforehand."""
        if cell.dtype not in self.dtypes:
            return f"takes {' and '.join(self.dtypes)} only"
        if cell.backward and self.backward:
            return self.backward
        return self.left_out(cell) if self.left_out and not cell.tiny else None


def require_one_row(problem: Problem) -> None:
    """Refuse a batch, on behalf of contestants that are given one sequence here."""
    if problem.cell.sizes.batch != 1:
        raise Unavailable("raced with one sequence only")


def scan_problem(cell: Cell) -> Problem:
    """x, dt, A, B, C, D, dt_bias of a scan, with step sizes (1e-3 to 0.1) and decay rates (1 to 16) as models start."""
    s, generator = cell.sizes, torch.Generator().manual_seed(0)
    dtype = getattr(torch, cell.dtype)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    step = torch.empty(s.nheads).uniform_(-6.9, -2.3, generator=generator).exp()
    args = {
        "x": normal(s.batch, cell.seqlen, s.nheads, s.headdim).to(dtype),
        "dt": normal(s.batch, cell.seqlen, s.nheads),
        "A": -torch.empty(s.nheads).uniform_(1, 16, generator=generator),
        "B": (normal(s.batch, cell.seqlen, s.ngroups, s.dstate) / s.dstate**0.25).to(dtype),
        "C": (normal(s.batch, cell.seqlen, s.ngroups, s.dstate) / s.dstate**0.25).to(dtype),
        "D": normal(s.nheads),
        "dt_bias": step + torch.log(-torch.expm1(-step)),
    }
    return Problem(cell, tracked(cell, args))


def conv_problem(cell: Cell) -> Problem:
    """x, weight, bias of a convolution, channels last."""
    s, generator = cell.sizes, torch.Generator().manual_seed(0)
    dtype = getattr(torch, cell.dtype)
    args = {
        "x": torch.randn(s.batch, cell.seqlen, s.conv_dim, generator=generator).to(dtype),
        "weight": (torch.randn(s.conv_dim, s.conv_width, generator=generator) / 2).to(dtype),
        "bias": (torch.randn(s.conv_dim, generator=generator) / 2).to(dtype),
    }
    return Problem(cell, tracked(cell, args))


def norm_problem(cell: Cell) -> Problem:
    """x, z, weight of a gated norm: all channels after the gate, or every head before it."""
    s, generator = cell.sizes, torch.Generator().manual_seed(0)
    dtype = getattr(torch, cell.dtype)
    channels = (s.nheads, s.headdim) if s.norm_per_head else (s.d_inner,)
    size = (s.batch, cell.seqlen, *channels)
    args = {
        "x": torch.randn(size, generator=generator).to(dtype),
        "z": torch.randn(size, generator=generator).to(dtype),
        "weight": (1 + 0.1 * torch.randn(size[-1], generator=generator)).to(dtype),
    }
    return Problem(cell, tracked(cell, args))


def update_problem(cell: Cell) -> Problem:
    """One token for every layer of a model: a float32 state each, so that each call finds its state cold."""
    s, generator = cell.sizes, torch.Generator().manual_seed(0)
    one = dataclasses.replace(cell, seqlen=1, op="scan", backward=False)
    args = scan_problem(one).args
    args = {k: v[:, 0] if k in ("x", "dt", "B", "C") else v for k, v in args.items()}
    size = (s.batch, s.nheads, s.headdim, s.dstate)
    return Problem(cell, {"states": [torch.randn(size, generator=generator) for _ in range(s.layers)], **args})


def conv_update_problem(cell: Cell) -> Problem:
    """One token for the convolution of every layer of a model."""
    s, generator = cell.sizes, torch.Generator().manual_seed(0)
    dtype = getattr(torch, cell.dtype)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    return Problem(
        cell,
        {
            "states": [normal(s.batch, s.conv_dim, s.conv_width - 1) for _ in range(s.layers)],
            "weights": [normal(s.conv_dim, s.conv_width) / 2 for _ in range(s.layers)],
            "biases": [normal(s.conv_dim) / 2 for _ in range(s.layers)],
            "x": normal(s.batch, s.conv_dim),
        },
    )


def mixer_problem(cell: Cell) -> Problem:
    """Everything of a Mamba-2 mixer between its two projections: (1, seqlen, z | x B C | dt) and the parameters."""
    s, generator = cell.sizes, torch.Generator().manual_seed(0)
    dtype = getattr(torch, cell.dtype)
    wide, conv = scan_problem(dataclasses.replace(cell, backward=False)).args, conv_problem(cell).args
    size = (s.batch, cell.seqlen, s.d_inner + s.conv_dim + s.nheads)
    args = {
        "zxbcdt": torch.randn(size, generator=generator).to(dtype),
        "conv_weight": conv["weight"],
        "conv_bias": conv["bias"],
        "norm_weight": (1 + 0.1 * torch.randn(s.d_inner, generator=generator)).to(dtype),
        "A_log": (-wide["A"]).log(),
        "D": wide["D"],
        "dt_bias": wide["dt_bias"],
    }
    return Problem(cell, args)


def tracked(cell: Cell, args: dict[str, Tensor]) -> dict[str, Any]:
    """The same tensors, as leaves if gradients are raced."""
    return {k: v.requires_grad_() for k, v in args.items()} if cell.backward else args


def scan_truth(args: dict[str, Any]) -> Tensor:
    """The recurrence in float64."""
    return mmkernels.ssd_scan(**args, dt_softplus=True, backend="reference")  # type: ignore[return-value]


def conv_truth(args: dict[str, Any]) -> Tensor:
    """The convolution in float64."""
    return mmkernels.causal_conv1d(**args, activation="silu", backend="reference")  # type: ignore[return-value]


def norm_truth(args: dict[str, Any]) -> Tensor:
    """The gated norm in float64; norm first where it is per head."""
    per_head = args["x"].dim() == 4
    return mmkernels.gated_rms_norm(**args, norm_before_gate=per_head, backend="reference")


def update_truth(args: dict[str, Any]) -> Tensor:
    """Output and new state of the last layer, in one row."""
    state = args["states"][-1].clone()
    rest = {k: v for k, v in args.items() if k != "states"}
    y = mmkernels.ssd_update(state, **rest, dt_softplus=True, backend="reference")
    return torch.cat([y.flatten(), state.flatten()])


def conv_update_truth(args: dict[str, Any]) -> Tensor:
    """Output and new state of the last layer, in one row."""
    state = args["states"][-1].clone()
    weight, bias = args["weights"][-1], args["biases"][-1]
    y = mmkernels.causal_conv1d_update(args["x"], state, weight, bias, activation="silu", backend="reference")
    return torch.cat([y.flatten(), state.flatten()])


def mixer_truth(args: dict[str, Any]) -> Tensor:
    """norm(scan(silu(conv(xBC))) * silu(z)), every part by its reference."""
    nheads, inner = args["A_log"].shape[0], args["norm_weight"].shape[0]
    conv_dim = args["conv_weight"].shape[0]
    z, xbc, dt = args["zxbcdt"].split([inner, conv_dim, nheads], dim=-1)
    xbc = conv_truth({"x": xbc, "weight": args["conv_weight"], "bias": args["conv_bias"]})
    width = (conv_dim - inner) // 2
    x, B, C = xbc.split([inner, width, width], dim=-1)
    y = scan_truth(
        {
            "x": x.unflatten(-1, (nheads, -1)),
            "dt": dt,
            "A": -args["A_log"].exp(),
            "B": B[:, :, None],
            "C": C[:, :, None],
            "D": args["D"],
            "dt_bias": args["dt_bias"],
        }
    )
    return F.rms_norm(y.flatten(-2) * F.silu(z), (inner,), args["norm_weight"], 1e-5)


def backward_run(problem: Problem, prepared: Prepared) -> Prepared:
    """Forward and backward of a prepared forward: the gradients of the sum of squares, in one row."""
    leaves = problem.leaves()

    def run() -> tuple[Tensor, ...]:
        out = prepared.result(prepared.run())
        return torch.autograd.grad(out, leaves, out.detach())

    def result(gradients: tuple[Tensor, ...]) -> Tensor:
        # Each in units of its own largest element, or the largest tensor would hide the others.
        return torch.cat([(g.double() / g.double().abs().max()).flatten() for g in gradients])

    return Prepared(run, result, prepared.calls)


def truth_of(problem: Problem, formula: Callable[[dict[str, Any]], Tensor]) -> Tensor:
    """The float64 result of the inputs as they are, or the gradients as `backward_run` gives them."""

    def wide(value: Any) -> Any:
        if isinstance(value, list):
            return [wide(v) for v in value]
        return value.detach().double() if isinstance(value, Tensor) else value

    args = {k: wide(v) for k, v in problem.args.items()}
    if not problem.cell.backward:
        return formula(args)
    double = Problem(problem.cell, {k: v.requires_grad_() if isinstance(v, Tensor) else v for k, v in args.items()})
    prepared = backward_run(double, Prepared(lambda: formula(double.args)))
    return prepared.result(prepared.run())


def tiny_of(cell: Cell) -> Cell:
    """The small relative of a cell on which contestants are checked: several chunks, several heads or groups."""
    return dataclasses.replace(cell, tiny=True, threads=1, seqlen=min(cell.seqlen, TINY_LENGTH))


@functools.lru_cache(maxsize=64)
def tiny_truth(tiny: Cell, build: Callable[[Cell], Problem], formula: Callable[[dict[str, Any]], Tensor]) -> Tensor:
    """The truth of a tiny cell, once for all its contestants; inputs follow from the cell alone."""
    return truth_of(build(tiny), formula)


def require_right(
    cell: Cell,
    prepare: Callable[[Problem], Prepared],
    build: Callable[[Cell], Problem],
    formula: Callable[[dict[str, Any]], Tensor],
) -> float:
    """The error of a contestant on the tiny relative of a cell.

    Raises:
        Unavailable: it is wrong, and nobody times a wrong result; or it cannot run here.
    """
    tiny = tiny_of(cell)
    problem = build(tiny)
    prepared = prepare(problem)
    if tiny.backward:
        prepared = backward_run(problem, prepared)
    error = error_of(prepared.result(prepared.run()), tiny_truth(tiny, build, formula))
    bar = TOLERANCE[cell.dtype]
    if not error <= bar:
        what = "gradients" if cell.backward else "results"
        found = f"the error of its {what} against float64 is {error:.1e}, more than {bar:.0e}"
        raise Unavailable(f"its {what} are not finite" if math.isinf(error) else found)
    return error
