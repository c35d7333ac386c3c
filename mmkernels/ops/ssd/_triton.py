"""Backend "triton" of ssd_scan: the library ops; launches are in _triton_forward.py and _triton_backward.py.

Forward, three kernels: steps (dt -> step sizes and prefix sums of A dt), states (one walk over each row, a state stored
a span), scan (every chunk at once; C B^T, decays and weights exist in registers only).  A row that fits one span needs
no walk.  Bytes to and from memory, s of an element, Q tokens of a span, L tokens in all:

    s L (3 H P + 2 G N) + 2 s (L / Q) H P N + L H (s + 36)

Mamba-2 1.3b (H 64, P 64, N 128, G 1), L 8192, bf16, Q 128: 201 MB of x (twice) and y, 4 of B and C, 134 of states, 20
of step sizes: 359 MB.  The classic five kernels (cumulative sums, C B^T, chunk states, state passing, chunk scan) with
float32 states written, read, written and read, and C B^T in memory: 764 MB at Q 128, 503 MB at 256.

Backward, six kernels, seven with a gate: steps, states forwards and backwards, (gradients through the gate,) inputs
(dx, dD and the pieces of dA, head by head), keys (dB and dC, heads of a group summed in registers), step gradients; and
sums over chunks and blocks of heads.  All is computed again from the inputs; kept between kernels are two states a
chunk (64 tokens on sm_90 and sm_100, 16 or 32 elsewhere) and seven numbers a token and head.  Same shape, chunks of 64:
each state is written once and read twice, 0.8 GB, of 1.4 GB in all: about what the classic split moves at 256.

Bytes are counted from the kernels, not measured.  No atomics: every sum has a fixed order.
"""

from torch import Tensor

from mmkernels import _triton
from mmkernels._gradients import wants_gradient
from mmkernels.ops.ssd import _autograd

_triton.require()
from mmkernels.ops.ssd._triton_backward import backward  # noqa: E402  (needs triton, known to be there only now)
from mmkernels.ops.ssd._triton_call import prepare  # noqa: E402
from mmkernels.ops.ssd._triton_forward import forward  # noqa: E402


def ssd_scan(
    *,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int | None,
    reverse: bool,
    return_final_states: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """See mmkernels.ssd_scan; chunk_size is a limit."""
    tensors = (x, dt, A, B, C, D, z, dt_bias, initial_states)
    low, high = float(dt_limit[0]), float(dt_limit[1])
    op = _fwd if wants_gradient(*tensors) else _inference
    y, final = op(*tensors, seq_idx, cu_seqlens, dt_softplus, low, high, chunk_size or 0, reverse, return_final_states)
    return (y, final) if return_final_states else y


def _forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial: Tensor | None,
    ids: Tensor | None,
    cu_seqlens: Tensor | None,
    softplus: bool,
    low: float,
    high: float,
    chunk_size: int,
    reverse: bool,
    want_final: bool,
) -> tuple[Tensor, Tensor]:
    call = prepare(x, dt, A, B, C, D, z, dt_bias, ids, cu_seqlens, softplus, (low, high), chunk_size, reverse)
    shape = (call.plan.rows, x.shape[2], x.shape[3], B.shape[3])
    final = x.new_empty(shape if want_final else (0,), dtype=call.acc)
    initial = None if initial is None else initial.contiguous()
    return forward(call, initial, final if want_final else None), final


def _backward(
    grad_y: Tensor,
    grad_final: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial: Tensor | None,
    ids: Tensor | None,
    cu_seqlens: Tensor | None,
    softplus: bool,
    low: float,
    high: float,
    chunk_size: int,
    reverse: bool,
) -> tuple[Tensor, ...]:
    call = prepare(
        x, dt, A, B, C, D, z, dt_bias, ids, cu_seqlens, softplus, (low, high), chunk_size, reverse, backward=True
    )
    initial = None if initial is None else initial.contiguous()
    return backward(call, grad_y, None if grad_final is None else grad_final.contiguous(), initial)


_TENSORS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "Tensor? initial_states, Tensor? seq_idx, Tensor? cu_seqlens"
)
_OPTIONS = "bool dt_softplus, float dt_low, float dt_high, int chunk_size, bool reverse"
_RESULTS = "(Tensor y, Tensor final_states)"
_inference = _triton.define("ssd_scan", f"({_TENSORS}, {_OPTIONS}, bool return_final_states) -> {_RESULTS}", _forward)
_fwd = _triton.define("ssd_scan_fwd", f"({_TENSORS}, {_OPTIONS}, bool return_final_states) -> {_RESULTS}", _forward)
_bwd = _triton.define(
    "ssd_scan_bwd",
    f"(Tensor grad_y, Tensor? grad_final, {_TENSORS}, {_OPTIONS}) -> ({', '.join(['Tensor'] * 9)})",
    _backward,
)
_autograd.register(_inference, _fwd, _bwd)
