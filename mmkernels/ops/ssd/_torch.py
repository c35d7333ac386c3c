"""The state-space scan in chunks, in plain PyTorch: matrix products inside a chunk, one recurrence step between chunks.

Section 6 of Dao and Gu, "Transformers are SSMs" (2024); README.md derives what differs: prefix sums in float64, changes
of sequence as decays of e^-1024, ragged batches spread to chunk boundaries.  Traceable, and differentiable twice.

Letters here: b batch, c chunks, q tokens of a chunk, g groups, r heads of a group, h = g r heads, p headdim, n dstate.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

# A decay nobody survives: exp(-1024) is exactly 0 in float32 and float64.  A change of sequence is one such step, so
# packed sequences need no masks; steeper decays are cut here, which changes no result and keeps prefix sums small.
RESET = 1024  # an int: torch.compile(dynamic=True) makes global floats symbolic
# Decay matrices of one piece: their few temporaries stay in a second-level cache.  256 KiB to 1 MiB are equally fast,
# 4 MiB and more cost up to 1.5x.
PIECE_BYTES = 1 << 19


def step_size(
    dt: torch.Tensor, dt_bias: torch.Tensor | None, dt_softplus: bool, dt_limit: tuple[float, float], work: torch.dtype
) -> torch.Tensor:
    """clamp(softplus(dt + dt_bias), *dt_limit) in the dtype `work`."""
    dt = dt.to(work)
    if dt_bias is not None:
        dt = dt + dt_bias.to(work)
    if dt_softplus:
        dt = softplus(dt)
    low, high = dt_limit
    if low > 0.0 or high != float("inf") or not dt_softplus:
        dt = dt.clamp(low, high)
    return dt


def softplus(v: torch.Tensor) -> torch.Tensor:
    """log1p(exp(v)), the identity above 20: no overflow, and full relative precision for very negative v."""
    return F.softplus(v, beta=1.0, threshold=20.0)


def decay(exponent: torch.Tensor, work: torch.dtype) -> torch.Tensor:
    """exp(min(exponent, 0)) in the dtype `work`.

    The minimum makes the unused half of a decay matrix, where exponents are positive, harmless in value and gradient.
    """
    exponent = exponent.to(work).clamp(max=0.0)
    return exponent.exp_() if in_place() else exponent.exp()


def in_place() -> bool:
    """Whether temporaries may be overwritten: nobody differentiates or transforms, and no compiler plans the memory."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return not torch._C._are_functorch_transforms_active()  # vmap cannot write a batch into an unbatched output


def skip_and_gate(y: torch.Tensor, x: torch.Tensor, D: torch.Tensor | None, z: torch.Tensor | None) -> torch.Tensor:
    """(y + D x) silu(z), for y and x of shape (..., nheads, headdim)."""
    if D is not None:
        y = torch.addcmul(y, x.to(y.dtype), (D if D.dim() == 2 else D[:, None]).to(y.dtype))
    return y if z is None else y * F.silu(z.to(y.dtype))


def log_decay(step: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """A dt, in float64 where the device has it, so that differences of its prefix sums are exact to float32."""
    wide = torch.float32 if step.device.type == "mps" else torch.float64
    return (step.to(wide) * A.to(wide)).clamp(min=-RESET)


def ssd_scan(
    *,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    initial_states: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    chunk_size: int | None,
    reverse: bool,
    return_final_states: bool,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`mmkernels.ssd_scan` on validated arguments."""
    length, heads = x.shape[1:3]
    pin_sizes(chunk_size or 0, *x.shape[2:], *B.shape[2:])
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    state = None if initial_states is None else initial_states.to(work)
    if state is None and (return_final_states or length == 0):
        rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        state = x.new_zeros(rows, heads, x.shape[3], B.shape[3], dtype=work)
    if length == 0:
        nothing = skip_and_gate(torch.zeros_like(x, dtype=work), x, D, z).to(x.dtype)
        return _results(nothing, None if state is None else state.clone(), return_final_states)
    if seq_idx is not None:
        x, dt, B, C, z = silence(seq_idx < 0, x, dt, B, C, z)
    step = step_size(dt, dt_bias, dt_softplus, dt_limit, work)
    if seq_idx is not None:
        (step,) = silence(seq_idx < 0, step)
    tokens = Tokens(x, step, log_decay(step, A), B, C, z)
    q = chunk_size or default_chunk(x.device)
    if cu_seqlens is not None and state is not None:
        layout = Layout(cu_seqlens, length, q, state, reverse)
        y, _ = scan(tokens.map(layout.spread), D, None, layout.q, reverse, layout)
        y, state = layout.gather(y), layout.finals()
    else:
        if cu_seqlens is not None:
            tokens = tokens.separate(sequence_of(cu_seqlens, length)[None], reverse)
        elif seq_idx is not None:
            tokens = tokens.separate(seq_idx, reverse)
        y, state = scan(tokens, D, state, q, reverse)
    return _results(y, state, return_final_states)


def _results(
    y: torch.Tensor, state: torch.Tensor | None, return_final_states: bool
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    if not return_final_states:
        return y
    assert state is not None  # ssd_scan starts from zeros when the last state is asked for
    return y, state


def silence(padding: torch.Tensor, *tensors: torch.Tensor | None) -> list[Any]:
    """Zero the padding tokens, so that whatever is stored there, even NaN, reaches no output and no gradient."""
    return [
        None if t is None else t.masked_fill(padding.view(*padding.shape, *[1] * (t.dim() - 2)), 0.0) for t in tensors
    ]


def pin_sizes(*sizes: int) -> None:
    """Make sizes of the model constants of a graph being compiled; batch and seqlen stay symbolic.

    With every size a symbol, tracing spends ten seconds of algebra on what divides what.
    """
    if torch.compiler.is_compiling():
        for size in sizes:
            len(range(size))  # the length of a range is a plain int: asking for it fixes the symbol


def default_chunk(device: torch.device) -> int:
    """Tokens per chunk: a CPU pays for the exponentials of long chunks, a GPU for the states of short ones."""
    return 64 if device.type == "cpu" else 256


def sequence_of(cu_seqlens: torch.Tensor, length: int) -> torch.Tensor:
    """(seqlen,) the sequence each token belongs to; empty sequences own none."""
    token = torch.arange(length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens, token, right=True) - 1


class Tokens(NamedTuple):
    """Everything that has a token axis (axis 1): x, step sizes, their log-decays, B, C and the gate."""

    x: torch.Tensor
    step: torch.Tensor
    fall: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    z: torch.Tensor | None

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Tokens":
        """Apply one change to every tensor."""
        return Tokens(*(None if t is None else change(t) for t in self))  # type: ignore[arg-type]

    def split(self, sizes: list[int]) -> list["Tokens"]:
        """Consecutive stretches of the token axis; one split, not many slices, as its gradient is one concatenation."""
        if len(sizes) == 1:
            return [self]
        columns = [(None,) * len(sizes) if t is None else t.split(sizes, dim=1) for t in self]
        return [Tokens(*row) for row in zip(*columns, strict=True)]  # type: ignore[arg-type]

    def separate(self, seq_idx: torch.Tensor, reverse: bool) -> "Tokens":
        """Forget everything where the id differs from the one the scan met just before (0 before its first token)."""
        if reverse:
            changed = seq_idx != F.pad(seq_idx[:, 1:], (0, 1))
        else:
            changed = seq_idx != F.pad(seq_idx[:, :-1], (1, 0))
        return self._replace(fall=torch.where(changed[..., None], -RESET, self.fall))


class Layout:
    """Ragged sequences moved apart so that each begins on a chunk boundary; sizes depend on shapes only, never on data.

    Every chunk then belongs to one sequence (`owner`), and the state is replaced by that sequence's initial one before
    the chunk where the scan enters it (`begins`).  Gaps have step size 0, which leaves any state as it is.
    """

    def __init__(self, cu_seqlens: torch.Tensor, length: int, q: int, initial: torch.Tensor, reverse: bool):
        nseqs = initial.shape[0]
        if not torch.compiler.is_compiling():  # would pin symbolic sizes to the traced ones
            q = min(q, max(16, 1 << (length // max(1, nseqs)).bit_length()))
        offsets = cu_seqlens.to(torch.int64)
        count = (offsets.diff() + q - 1) // q
        stop = count.cumsum(0)
        start = stop - count
        seq = sequence_of(offsets, length)
        self.q, self.chunks, self.initial = q, length // q + nseqs, initial
        chunk = torch.arange(self.chunks, device=offsets.device)
        self.owner = torch.searchsorted(stop, chunk, right=True).clamp(max=nseqs - 1)
        self.begins = (chunk == (stop - 1 if reverse else start)[self.owner])[:, None, None, None]
        self.last = (start if reverse else stop - 1).clamp(min=0)
        self.empty = (count == 0)[:, None, None, None]
        self.position = start[seq] * q + torch.arange(length, device=offsets.device) - offsets[seq]
        self.leaving: list[torch.Tensor] = []

    def spread(self, t: torch.Tensor) -> torch.Tensor:
        """(1, seqlen, ...) -> (1, chunks * q, ...), zeros in the gaps."""
        return t.new_zeros(1, self.chunks * self.q, *t.shape[2:]).index_copy(1, self.position, t)

    def gather(self, t: torch.Tensor) -> torch.Tensor:
        """Undo `spread`."""
        return t.index_select(1, self.position)

    def enter(self, chunk: int, state: torch.Tensor) -> torch.Tensor:
        """The state entering a chunk: the running one, or the owner's initial one where its sequence begins."""
        return torch.where(self.begins[chunk], self.initial[self.owner[chunk : chunk + 1]], state)

    def finals(self) -> torch.Tensor:
        """Each sequence's last state out of the states leaving each chunk; an empty sequence keeps its initial one."""
        return torch.where(self.empty, self.initial, torch.cat(self.leaving)[self.last])


def scan(
    tokens: Tokens,
    D: torch.Tensor | None,
    state: torch.Tensor | None,
    q: int,
    reverse: bool,
    layout: Layout | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The scan over at least one token: y like x, and the last state (None when it started from None and needs none).

    Short sequences are one chunk.  Long ones go piece by piece, so that temporaries stay in cache; under torch.compile,
    which would unroll that loop, they are padded to one batch of chunks.
    """
    x = tokens.x
    b, length, h, p = x.shape
    if length > q and state is None:
        state = tokens.step.new_zeros(b, h, p, tokens.B.shape[3])
    if length > q and torch.compiler.is_compiling():
        missing = -length % q
        padded = tokens.map(lambda t: F.pad(t, (*[0, 0] * (t.dim() - 2), 0, missing)))
        y, state = _piece(padded, state, q, reverse, layout, 0)
        return skip_and_gate(y[:, :length], x, D, tokens.z).to(x.dtype).contiguous(), state
    sizes = piece_sizes(length, q, 4 * b * h * q * q)
    pieces = tokens.split(sizes)
    whole = torch.empty(x.shape, dtype=x.dtype, device=x.device) if in_place() else None
    parts = [x] * len(pieces) if whole is None else list(whole.split(sizes, dim=1))
    order = range(len(pieces))
    for i in reversed(order) if reverse else order:
        part = pieces[i]
        y, state = _piece(part, state, min(q, sizes[i]), reverse, layout, i * (sizes[0] // q))
        y = skip_and_gate(y, part.x, D, part.z)
        parts[i] = y.to(x.dtype) if whole is None else parts[i].copy_(y)
    if whole is None:
        whole = parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, dim=1)
    return whole, state


def piece_sizes(length: int, q: int, chunk_bytes: int) -> list[int]:
    """Tokens of each piece: whole chunks whose decay matrices fit in PIECE_BYTES together, then what is left."""
    if length <= q:
        return [length]
    per = q * max(1, PIECE_BYTES // max(1, chunk_bytes))
    whole, tail = length - length % q, length % q
    return [per] * (whole // per) + [size for size in (whole % per, tail) if size]


def _piece(
    tokens: Tokens, state: torch.Tensor | None, q: int, reverse: bool, layout: Layout | None, first: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Whole chunks of q tokens: S C for every token, and the state that leaves them."""
    x, step, fall, B, C, _ = tokens
    b, length, h, p = x.shape
    g = B.shape[2]
    c, r, work = length // q, h // g, step.dtype
    Bc = B.to(work).unflatten(1, (c, q)).transpose(2, 3)  # b c g q n
    Cc = C.to(work).unflatten(1, (c, q)).transpose(2, 3)
    u = (x.to(work) * step[..., None]).unflatten(1, (c, q))  # b c q h p
    fall = fall.unflatten(1, (c, q)).transpose(2, 3)  # b c h q
    s = fall.flip(-1).cumsum(-1).flip(-1) if reverse else fall.cumsum(-1)

    scores = Cc @ Bc.transpose(-1, -2)  # b c g q q
    scores = (scores.triu() if reverse else scores.tril())[:, :, :, None]
    decays = decay(s[..., :, None] - s[..., None, :], work).unflatten(2, (g, r))
    weights = decays.mul_(scores) if in_place() else decays * scores
    y = (weights.flatten(2, 3) @ u.transpose(2, 3)).transpose(2, 3)  # b c q h p
    if state is None and layout is None:
        return y.flatten(1, 2), None

    edge = s[..., :1] if reverse else s[..., -1:]
    kept = u * decay(edge - s, work).transpose(2, 3)[..., None]
    added = (kept.unflatten(3, (g, r)).permute(0, 1, 3, 4, 5, 2).flatten(3, 4) @ Bc).unflatten(3, (r, p)).flatten(2, 3)
    across = decay(edge, work)[..., None]  # b c h 1 1
    if torch.compiler.is_compiling():
        entering, state = _pass_traced(added, across, state, reverse, layout)
    else:
        entering, state = _pass_stepwise(added, across, state, reverse, layout, first)
    seen = (Cc @ entering.unflatten(2, (g, r)).flatten(3, 4).transpose(-1, -2)).unflatten(-1, (r, p)).transpose(2, 3)
    y = torch.addcmul(y, seen.reshape(b, c, q, h, p), decay(s, work).transpose(2, 3)[..., None])
    return y.flatten(1, 2), state


def _pass_stepwise(
    added: torch.Tensor,
    across: torch.Tensor,
    state: torch.Tensor | None,
    reverse: bool,
    layout: Layout | None,
    first: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """R_{c+1} = across_c R_c + added_c, chunk after chunk: the states entering each chunk, and the last one."""
    chunks = list(enumerate(zip(added.unbind(1), across.unbind(1), strict=True), start=first))
    running = torch.zeros_like(added[:, 0]) if state is None else state  # None: a layout of one chunk
    entering, leaving = [], []
    for chunk, (add, keep) in reversed(chunks) if reverse else chunks:
        if layout is not None:
            running = layout.enter(chunk, running)
        entering.append(running)
        running = torch.addcmul(add, running, keep)
        leaving.append(running)
    if reverse:
        entering.reverse()
        leaving.reverse()
    if layout is not None:
        layout.leaving = leaving + layout.leaving if reverse else layout.leaving + leaving
    return (entering[0][:, None] if len(entering) == 1 else torch.stack(entering, dim=1)), running


def _pass_traced(
    added: torch.Tensor, across: torch.Tensor, state: torch.Tensor | None, reverse: bool, layout: Layout | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same recurrence by doubling strides: log2(chunks) steps to trace, whatever number of chunks a call has."""

    def later(t: torch.Tensor, by: int) -> torch.Tensor:
        """t, `by` chunks later in scan order, zeros before."""
        return F.pad(t[:, by:], (*[0] * 6, 0, by)) if reverse else F.pad(t[:, :-by], (*[0] * 6, by, 0))

    chunks = added.shape[1]
    if layout is not None:
        start, begins = layout.initial[layout.owner][None], layout.begins[None]
    else:
        assert state is not None  # scan() starts from zeros when there is more than one chunk
        first = chunks - 1 if reverse else 0
        start, begins = state[:, None], (torch.arange(chunks, device=added.device) == first).view(1, -1, 1, 1, 1)
    total = added + torch.where(begins, across * start, 0.0)
    keep = torch.where(begins, 0.0, across)
    stride = 1
    while stride < chunks:
        total, keep, stride = total + keep * later(total, stride), keep * later(keep, stride), 2 * stride
    if layout is not None:
        layout.leaving = [total[0]]
    return torch.where(begins, start, later(total, 1)), total[:, 0 if reverse else -1]
