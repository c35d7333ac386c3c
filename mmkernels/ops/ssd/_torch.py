"""The state-space scan in chunks, in plain PyTorch: matrix products inside a chunk, one recurrence step between chunks.

Section 6 of Dao and Gu, "Transformers are SSMs" (2024); README.md derives what differs: prefix sums in float64, changes
of sequence as decays of e^-1024, ragged batches spread to chunk boundaries.  Traceable, and differentiable twice.

Letters in this file: b batch, c chunks, q tokens of a chunk, g groups, r heads of a group, h = g r, p headdim, n dstate.
"""

import torch
import torch.nn.functional as F

# A decay nobody survives: exp(-1024) is exactly 0 in float32 and float64.  A change of sequence is one such step, so
# packed sequences need no masks; steeper decays are cut here, which changes no result and keeps prefix sums small.
RESET = 1024.0
# The decay matrices of one piece stay within half of a 2 MiB L2 cache.
PIECE_BYTES = 1 << 20


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
    return exponent.to(work).clamp(max=0.0).exp()


def skip_and_gate(y: torch.Tensor, x: torch.Tensor, D: torch.Tensor | None, z: torch.Tensor | None) -> torch.Tensor:
    """(y + D x) silu(z), for y and x of shape (..., nheads, headdim)."""
    if D is not None:
        y = torch.addcmul(y, x.to(y.dtype), (D if D.dim() == 2 else D[:, None]).to(y.dtype))
    return y if z is None else y * F.silu(z.to(y.dtype))


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
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    step = step_size(dt, dt_bias, dt_softplus, dt_limit, work)
    fall = log_decay(step, A)
    state = None if initial_states is None else initial_states.to(work)
    q = chunk_size or (64 if x.device.type == "cpu" else 256)
    length = x.shape[1]
    if length == 0:
        if state is None:
            rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            state = step.new_zeros(rows, *x.shape[2:], B.shape[-1])
        y = torch.zeros_like(x)
        return (y, state) if return_final_states else y
    layout = None
    if cu_seqlens is not None:
        if state is not None or return_final_states:
            layout = Layout(cu_seqlens, length, q, reverse)
            q = layout.q
            x, step, fall, B, C = (layout.spread(t) for t in (x, step, fall, B, C))
            z = None if z is None else layout.spread(z)
        else:
            ids = torch.searchsorted(
                cu_seqlens, torch.arange(length, device=x.device, dtype=cu_seqlens.dtype), right=True
            )
            fall = torch.where(changes(ids[None] - 1, reverse)[..., None], -RESET, fall)
    if seq_idx is not None:
        padding = (seq_idx < 0)[:, :, None]
        fall = torch.where(changes(seq_idx, reverse)[..., None], -RESET, fall)
        step = step.masked_fill(padding, 0.0)
        x, B, C = (t.masked_fill(padding[..., None], 0.0) for t in (x, B, C))
        z = None if z is None else z.masked_fill(padding[..., None], 0.0)
    y, state = scan(x, step, fall, B, C, D, z, state, layout, q, reverse, return_final_states)
    if layout is not None:
        y = layout.gather(y)
    return (y, state) if return_final_states else y


def log_decay(step: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """A dt, in float64 where the device has it, so that prefix sums of it keep small differences."""
    wide = torch.float32 if step.device.type == "mps" else torch.float64
    return (step.to(wide) * A.to(wide)).clamp(min=-RESET)


def changes(seq_idx: torch.Tensor, reverse: bool) -> torch.Tensor:
    """True where the id differs from the one the scan met just before; before the first token it met 0."""
    if reverse:
        return seq_idx != F.pad(seq_idx[:, 1:], (0, 1))
    return seq_idx != F.pad(seq_idx[:, :-1], (1, 0))


class Layout:
    """Ragged sequences moved apart so that each begins on a chunk boundary; sizes depend on shapes only, never on data.

    Every chunk then belongs to one sequence (`owner`), and the state is replaced by that sequence's initial one before
    the chunk where the scan enters it (`begins`).  Gaps have step size 0, which leaves any state as it is.
    """

    def __init__(self, cu_seqlens: torch.Tensor, length: int, q: int, reverse: bool):
        offsets = cu_seqlens.to(torch.int64)
        nseqs = offsets.shape[0] - 1
        if not torch.compiler.is_compiling():  # a Python loop over a symbolic size would be unrolled
            mean = max(1, length // max(1, nseqs))
            q = min(q, max(16, 1 << (mean - 1).bit_length()))
        self.q, self.nseqs, self.chunks = q, nseqs, length // q + nseqs
        count = (offsets.diff() + q - 1) // q
        stop = count.cumsum(0)
        start = stop - count
        chunk = torch.arange(self.chunks, device=offsets.device)
        self.owner = torch.searchsorted(stop, chunk, right=True).clamp(max=nseqs - 1)
        self.begins = chunk == (stop[self.owner] - 1 if reverse else start[self.owner])
        self.last = (start if reverse else stop - 1).clamp(min=0)
        self.empty = count == 0
        token = torch.arange(length, device=offsets.device)
        seq = torch.searchsorted(offsets, token, right=True) - 1
        self.position = start[seq] * q + token - offsets[seq]

    def enter(self, chunk: int, state: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
        """The state entering a chunk: the running one, or the owner's initial one where its sequence begins."""
        return torch.where(self.begins[chunk], initial[self.owner[chunk : chunk + 1]], state)

    def finals(self, leaving: list[torch.Tensor], initial: torch.Tensor) -> torch.Tensor:
        """Each sequence's last state out of the states leaving each chunk; an empty sequence keeps its initial one."""
        return torch.where(self.empty[:, None, None, None], initial, torch.cat(leaving)[self.last])

    def spread(self, t: torch.Tensor) -> torch.Tensor:
        """(1, seqlen, ...) -> (1, chunks * q, ...), zeros in the gaps."""
        return t.new_zeros(1, self.chunks * self.q, *t.shape[2:]).index_copy(1, self.position, t)

    def gather(self, t: torch.Tensor) -> torch.Tensor:
        """Undo `spread`."""
        return t.index_select(1, self.position)


def scan(
    x: torch.Tensor,
    step: torch.Tensor,
    fall: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    state: torch.Tensor | None,
    layout: Layout | None,
    q: int,
    reverse: bool,
    want_state: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The scan over at least one token with step sizes and log-decays computed: y like x, and the last state(s)."""
    b, length, h, p = x.shape
    sizes = _piece_sizes(length, q, 4 * b * h * q * q)
    initial = state
    if layout is not None:
        initial = step.new_zeros(layout.nseqs, h, p, B.shape[-1]) if state is None else state
        state = None
    want_state = want_state or len(sizes) > 1 or layout is not None
    split = [(None,) * len(sizes) if t is None else t.split(sizes, dim=1) for t in (x, step, fall, B, C, z)]
    pieces = list(zip(*split, strict=True))
    firsts = [0]
    for size in sizes:
        firsts.append(firsts[-1] + size // q)
    order = range(len(pieces))
    ys: list[torch.Tensor] = [x] * len(pieces)
    leaving: list[list[torch.Tensor]] = [[]] * len(pieces)
    for i in reversed(order) if reverse else order:
        px, ps, pf, pB, pC, pz = pieces[i]
        y, leaving[i] = _piece(
            px, ps, pf, pB, pC, state, initial, layout, firsts[i], min(q, px.shape[1]), reverse, want_state
        )
        state = None if not leaving[i] else leaving[i][0 if reverse else -1]
        ys[i] = skip_and_gate(y, px, D, pz).to(x.dtype)
    if layout is not None:
        state = layout.finals([s for part in leaving for s in part], initial)
    return (ys[0] if len(ys) == 1 else torch.cat(ys, dim=1)), state


def _piece_sizes(length: int, q: int, chunk_bytes: int) -> list[int]:
    """Tokens of each piece: whole chunks whose decay matrices fit in PIECE_BYTES together, then what is left."""
    if length <= q:
        return [length]
    per = q * max(1, PIECE_BYTES // max(1, chunk_bytes))
    whole, tail = length - length % q, length % q
    return [per] * (whole // per) + [size for size in (whole % per, tail) if size]


def _piece(
    x: torch.Tensor,
    step: torch.Tensor,
    fall: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    state: torch.Tensor | None,
    initial: torch.Tensor | None,
    layout: Layout | None,
    first: int,
    q: int,
    reverse: bool,
    want_state: bool,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Whole chunks of q tokens: S C for every token, and the state that leaves them."""
    b, length, h, p = x.shape
    g, n = B.shape[2:]
    c, r, work = length // q, h // g, step.dtype
    Bc = B.to(work).unflatten(1, (c, q)).transpose(2, 3)  # b c g q n
    Cc = C.to(work).unflatten(1, (c, q)).transpose(2, 3)
    u = (x.to(work) * step[..., None]).unflatten(1, (c, q))  # b c q h p
    fall = fall.unflatten(1, (c, q)).transpose(2, 3)  # b c h q
    s = fall.flip(-1).cumsum(-1).flip(-1) if reverse else fall.cumsum(-1)

    scores = Cc @ Bc.transpose(-1, -2)  # b c g q q
    scores = (scores.triu() if reverse else scores.tril())[:, :, :, None]
    weights = scores * decay(s[..., :, None] - s[..., None, :], work).unflatten(2, (g, r))
    y = (weights.flatten(2, 3) @ u.transpose(2, 3)).transpose(2, 3)  # b c q h p

    if c == 1 and state is None and not want_state:
        return y.flatten(1, 2), []
    edge = s[..., :1] if reverse else s[..., -1:]
    kept = u * decay(edge - s, work).transpose(2, 3)[..., None]
    added = (kept.unflatten(3, (g, r)).permute(0, 1, 3, 4, 5, 2).flatten(3, 4) @ Bc).view(b, c, h, p, n)
    entering, leaving = _pass_states(added, decay(edge, work)[..., None], state, reverse, initial, layout, first)
    seen = (Cc @ entering.view(b, c, g, r * p, n).transpose(-1, -2)).unflatten(-1, (r, p)).transpose(2, 3)
    y = torch.addcmul(y, seen.reshape(b, c, q, h, p), decay(s, work).transpose(2, 3)[..., None])
    return y.flatten(1, 2), leaving


def _pass_states(
    added: torch.Tensor,
    kept: torch.Tensor,
    state: torch.Tensor | None,
    reverse: bool,
    initial: torch.Tensor | None,
    layout: Layout | None,
    first: int,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """R_{c+1} = kept_c R_c + added_c from R_0 = state: the states entering each chunk, and the last one."""
    if state is None:
        state = torch.zeros_like(added[:, 0])
    entering, leaving = [], []
    triples = list(enumerate(zip(added.unbind(1), kept.unbind(1), strict=True)))
    for i, (add, keep) in reversed(triples) if reverse else triples:
        if layout is not None:
            state = layout.enter(first + i, state, initial)
        entering.append(state)
        state = torch.addcmul(add, state, keep)
        leaving.append(state)
    if reverse:
        entering.reverse()
        leaving.reverse()
    return torch.stack(entering, dim=1), leaving
