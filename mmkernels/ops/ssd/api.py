"""`ssd_scan` and `ssd_update`: the Mamba-2 state-space recurrence over whole sequences and token by token.

Signatures, argument checks and one dispatch line each; the mathematics is in reference.py, the derivation in README.md.
"""

import math
from itertools import pairwise

import torch

from mmkernels import _checks, _triton
from mmkernels._dispatch import NATIVE_PROBE, Backend, Op
from mmkernels._gradients import no_gradient_in_place, untracked_transform
from mmkernels.errors import DtypeError, ShapeError

# The integer 0 on purpose: torch.compile(dynamic=True) makes float defaults symbolic and then traces everything twice.
_NO_LIMIT = (0, math.inf)

_HERE = "mmkernels.ops.ssd"

SSD_SCAN = Op(
    "ssd_scan",
    key="x",
    public="mmkernels.ops.ssd.api.ssd_scan",
    backends=[
        Backend("native", f"{_HERE}._native:ssd_scan", ("cpu",), untracked_transform, NATIVE_PROBE),
        Backend("triton", f"{_HERE}._triton:ssd_scan", _triton.DEVICES, _triton.objections, _triton.PROBE),
        Backend("torch", f"{_HERE}._torch:ssd_scan"),
        Backend("reference", f"{_HERE}.reference:ssd_scan"),
    ],
)

SSD_UPDATE = Op(
    "ssd_update",
    key="x",
    public="mmkernels.ops.ssd.api.ssd_update",
    backends=[
        Backend(
            "native",
            f"{_HERE}._native_update:ssd_update",
            ("cpu",),
            no_gradient_in_place,
            NATIVE_PROBE,
            direct=f"{_HERE}._native_update:library_op",
        ),
        Backend(
            "triton",
            f"{_HERE}._triton_update:ssd_update",
            _triton.DEVICES,
            _triton.objections_in_place,
            _triton.PROBE,
        ),
        Backend("torch", f"{_HERE}._torch_update:ssd_update"),
        Backend("reference", f"{_HERE}.reference:ssd_update"),
    ],
)
_verified_updates = _checks.Verified()


def ssd_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = _NO_LIMIT,
    initial_states: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    chunk_size: int | None = None,
    reverse: bool = False,
    return_final_states: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""Run the Mamba-2 state-space recurrence over a batch of sequences, in time linear in their length.

    Per head $h$, with $\hat\Delta_t = \mathrm{clamp}(\mathrm{softplus}(dt_t + dt\_bias))$ and $B$, $C$ of group
    $\lfloor hG/H \rfloor$:

    $$S_t = e^{A \hat\Delta_t} S_{t-1} + \hat\Delta_t\, x_t B_t^\top, \qquad
      y_t = (S_t C_t + D\, x_t) \cdot \mathrm{silu}(z_t)$$

    (Mamba-2, eq. 16 with the Euler input weight $\hat\Delta B$; computed in chunks by the state-space duality of its
    section 6.)  `dt_bias`, softplus, `D` and `z` are each optional.

    Args:
        x: (batch, seqlen, nheads, headdim) inputs, any strides.
        dt: (batch, seqlen, nheads) step sizes, before bias and softplus; may have another float dtype than x.
        A: (nheads,) decay rates, <= 0 (not checked: values are never read).
        B: (batch, seqlen, ngroups, dstate) input projections, x.dtype; ngroups divides nheads.
        C: (batch, seqlen, ngroups, dstate) output projections, x.dtype.
        D: (nheads,) or (nheads, headdim) skip weight.
        z: like x, the gate: the output is multiplied by silu(z).
        dt_bias: (nheads,) added to dt before softplus.
        dt_softplus: apply softplus to dt + dt_bias (log1p form, the identity above 20).
        dt_limit: smallest and largest step size after softplus, 0 <= low <= high.
        initial_states: (batch, nheads, headdim, dstate), or (nseqs, ...) with `cu_seqlens`; default zeros.
        seq_idx: (batch, seqlen) integer ids of sequences packed side by side.  A token sees only the unbroken run of
            equal ids it is in.  The id before the first token of the scan counts as 0, so `initial_states` belong to
            a leading run of id 0.  Negative ids are padding: output, state and gradients are 0 there.
        cu_seqlens: (nseqs + 1,) integer offsets 0 = c_0 <= c_1 <= ... = seqlen of sequences packed into a batch of 1;
            every sequence has its own initial and final state.  Empty sequences keep their initial state.
        chunk_size: tokens per chunk; a matter of speed only.  Default: the backend's choice (64 on a CPU).
        reverse: scan from the last token to the first (of every sequence); equals flip, scan, flip.
        return_final_states: also return the state after the last token of the scan.
        backend: run on this backend or raise; default: the first able one.

    Returns:
        y: like x.
        final_states: (batch or nseqs, nheads, headdim, dstate), float32 (float64 for float64 x), only if asked for.

    Raises:
        ShapeError: sizes disagree, ngroups does not divide nheads, or both `seq_idx` and `cu_seqlens` are given.
        DtypeError: a dtype is not supported, or z, B, C differ from x in dtype.
        DeviceError: the tensors live on different devices.
        BackendError: the named backend cannot run the call.

    Numerics:
        16-bit inputs are computed and accumulated in float32, rounded once on output; float64 stays float64.  On CPUs
        that are fast at it (AMD from Zen 4 on) the native backend rounds factors of bfloat16 products to bfloat16, sums
        and states stay float32.  Exponents that are differences of prefix sums are clamped at 0.  Deterministic.

    Cost:
        About seqlen nheads (chunk_size (headdim + dstate ngroups/nheads) + 2 headdim dstate) multiply-adds; memory
        linear in seqlen.

    Example:
        >>> import torch, mmkernels
        >>> x, dt = torch.randn(1, 100, 4, 16), torch.rand(1, 100, 4)
        >>> A, B, C = -torch.ones(4), torch.randn(1, 100, 1, 8), torch.randn(1, 100, 1, 8)
        >>> y, state = mmkernels.ssd_scan(x, dt, A, B, C, return_final_states=True)
        >>> y.shape, state.shape
        (torch.Size([1, 100, 4, 16]), torch.Size([1, 4, 16, 8]))

    Source:
        Dao and Gu, "Transformers are SSMs" (2024), eq. 16 and section 6; checked against the recurrence in float64.
    """
    sizes = _checks.Sizes("ssd_scan")
    sizes.bind("x", x, "batch seqlen nheads headdim")
    sizes.bind("dt", dt, "batch seqlen nheads")
    sizes.bind("A", A, "nheads")
    sizes.bind("B", B, "batch seqlen ngroups dstate")
    sizes.bind("C", C, "batch seqlen ngroups dstate")
    if z is not None:
        sizes.bind("z", z, "batch seqlen nheads headdim")
    _check_options(sizes, D, dt_bias, dt_limit)
    states = "batch"
    if cu_seqlens is not None:
        _check_cu_seqlens(sizes, cu_seqlens, seq_idx)
        states = "nseqs"
    if seq_idx is not None:
        sizes.bind("seq_idx", seq_idx, "batch seqlen")
    if initial_states is not None:
        sizes.bind("initial_states", initial_states, f"{states} nheads headdim dstate")
    if chunk_size is not None and chunk_size < 1:
        raise ShapeError(
            f"ssd_scan: chunk_size must be at least 1; got {chunk_size}. Leave it out for the backend's choice."
        )
    _checks.floating("ssd_scan", x=x, dt=dt, A=A, D=D, dt_bias=dt_bias, initial_states=initial_states)
    _checks.same_dtype("ssd_scan", x=x, B=B, C=C, z=z)
    _checks.integer("ssd_scan", seq_idx=seq_idx, cu_seqlens=cu_seqlens)
    _checks.same_device(
        "ssd_scan",
        x=x,
        dt=dt,
        A=A,
        B=B,
        C=C,
        D=D,
        z=z,
        dt_bias=dt_bias,
        initial_states=initial_states,
        seq_idx=seq_idx,
        cu_seqlens=cu_seqlens,
    )
    args = {
        "x": x,
        "dt": dt,
        "A": A,
        "B": B,
        "C": C,
        "D": D,
        "z": z,
        "dt_bias": dt_bias,
        "dt_softplus": dt_softplus,
        "dt_limit": dt_limit,
        "initial_states": initial_states,
        "seq_idx": seq_idx,
        "cu_seqlens": cu_seqlens,
        "chunk_size": chunk_size,
        "reverse": reverse,
        "return_final_states": return_final_states,
    }
    return SSD_SCAN(backend, args)


def ssd_update(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = _NO_LIMIT,
    state_indices: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    r"""Advance recurrent states by one token (or a few), in place, and return the outputs.

    $$S \leftarrow e^{A \hat\Delta} S + \hat\Delta\, x B^\top, \qquad y = (S C + D\, x) \cdot \mathrm{silu}(z)$$

    with $\hat\Delta$ as in `ssd_scan` (Mamba-2, eq. 16): stepping through a sequence equals scanning it.

    Args:
        state: (nslots, nheads, headdim, dstate), any float dtype, updated IN PLACE; rounded to its dtype once per call.
        x: (batch, nheads, headdim), or (batch, seqlen, nheads, headdim) for several tokens; the others accordingly.
        dt: (batch, [seqlen,] nheads) step sizes before bias and softplus.
        A: (nheads,) decay rates, <= 0.
        B: (batch, [seqlen,] ngroups, dstate) input projections, x.dtype; ngroups divides nheads.
        C: (batch, [seqlen,] ngroups, dstate) output projections, x.dtype.
        D: (nheads,) or (nheads, headdim) skip weight.
        z: like x, the gate: the output is multiplied by silu(z).
        dt_bias: (nheads,) added to dt before softplus.
        dt_softplus: apply softplus to dt + dt_bias (log1p form, the identity above 20).
        dt_limit: smallest and largest step size after softplus, 0 <= low <= high.
        state_indices: (batch,) integer slot of each row, no slot twice; negative = padding: output 0, no state is
            touched.  Default: row i owns slot i, and nslots = batch.
        backend: run on this backend or raise; default: the first able one.

    Returns:
        y: like x.

    Raises:
        ShapeError: sizes disagree or ngroups does not divide nheads.
        DtypeError: a dtype is not supported, or z, B, C differ from x in dtype.
        DeviceError: the tensors live on different devices.
        BackendError: the named backend cannot run the call.

    Numerics:
        All mathematics in float32 (float64 for float64 x), also for a 16-bit state.  Deterministic.

    Cost:
        2 headdim dstate multiply-adds a head and token; reads and writes each state once.

    Example:
        >>> import torch, mmkernels
        >>> state = torch.zeros(2, 4, 16, 8)
        >>> x, dt, BC = torch.randn(2, 4, 16), torch.rand(2, 4), torch.randn(2, 1, 8)
        >>> mmkernels.ssd_update(state, x, dt, -torch.ones(4), BC, BC).shape
        torch.Size([2, 4, 16])

    Source:
        Dao and Gu, "Transformers are SSMs" (2024), eq. 16; checked against `ssd_scan` in float64.
    """
    direct = SSD_UPDATE.direct(backend, x)
    if direct is not None and type(dt_limit) is tuple and len(dt_limit) == 2:
        try:
            if dt_softplus is True and z is None and state_indices is None and dt_limit == _NO_LIMIT:
                return direct(state, x, dt, A, B, C, D, dt_bias)
            low, high = float(dt_limit[0]), float(dt_limit[1])
            if high >= 0:
                return direct(state, x, dt, A, B, C, D, dt_bias, dt_softplus, z, state_indices, low, high)
        except RuntimeError:
            pass  # nothing has changed: below it is said in words, or done in another way
    seen = _verified_updates.signature(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, state_indices)
    if seen not in _verified_updates:
        _check_update(state, x, dt, A, B, C, D, z, dt_bias, dt_limit, state_indices)
        _verified_updates.add(seen)
    args = {
        "state": state,
        "x": x,
        "dt": dt,
        "A": A,
        "B": B,
        "C": C,
        "D": D,
        "z": z,
        "dt_bias": dt_bias,
        "dt_softplus": dt_softplus,
        "dt_limit": dt_limit,
        "state_indices": state_indices,
    }
    return SSD_UPDATE(backend, args)


def _check_update(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    dt_limit: tuple[float, float],
    state_indices: torch.Tensor | None,
) -> None:
    sizes = _checks.Sizes("ssd_update")
    tokens = "batch seqlen" if isinstance(x, torch.Tensor) and x.dim() == 4 else "batch"
    sizes.bind("x", x, f"{tokens} nheads headdim", "Several tokens a row are (batch, seqlen, nheads, headdim).")
    sizes.bind("dt", dt, f"{tokens} nheads")
    sizes.bind("A", A, "nheads")
    sizes.bind("B", B, f"{tokens} ngroups dstate")
    sizes.bind("C", C, f"{tokens} ngroups dstate")
    if z is not None:
        sizes.bind("z", z, f"{tokens} nheads headdim")
    _check_options(sizes, D, dt_bias, dt_limit)
    if state_indices is not None:
        sizes.bind("state_indices", state_indices, "batch")
        sizes.bind("state", state, "nslots nheads headdim dstate")
    else:
        sizes.bind(
            "state", state, "batch nheads headdim dstate", "Pass state_indices if the rows live in chosen slots."
        )
    _checks.floating("ssd_update", state=state, x=x, dt=dt, A=A, D=D, dt_bias=dt_bias)
    _checks.same_dtype("ssd_update", x=x, B=B, C=C, z=z)
    _checks.integer("ssd_update", state_indices=state_indices)
    _checks.same_device(
        "ssd_update", x=x, state=state, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, state_indices=state_indices
    )


def _check_options(
    sizes: _checks.Sizes, D: torch.Tensor | None, dt_bias: torch.Tensor | None, dt_limit: tuple[float, float]
) -> None:
    """The checks both functions share: groups, D of either shape, dt_bias, dt_limit."""
    sizes.divides("ngroups", "nheads", "Head h reads group h * ngroups // nheads of B and C.")
    if D is not None:
        per_channel = isinstance(D, torch.Tensor) and D.dim() == 2
        sizes.bind("D", D, "nheads headdim" if per_channel else "nheads", "D is (nheads,) or (nheads, headdim).")
    if dt_bias is not None:
        sizes.bind("dt_bias", dt_bias, "nheads")
    if not isinstance(dt_limit, (tuple, list)) or len(dt_limit) != 2:
        raise DtypeError(
            f"{sizes.function}: dt_limit must be a pair of numbers (low, high); got {dt_limit!r}. "
            "Use (0.0, float('inf')) for no limit."
        )
    if not 0.0 <= dt_limit[0] <= dt_limit[1]:
        raise ShapeError(
            f"{sizes.function}: dt_limit must satisfy 0 <= low <= high; got {tuple(dt_limit)}. "
            "A negative step size would make the state grow; use (0.0, float('inf')) for no limit."
        )


def _check_cu_seqlens(sizes: _checks.Sizes, cu_seqlens: torch.Tensor, seq_idx: torch.Tensor | None) -> None:
    """cu_seqlens stands alone, has one offset more than sequences, and needs a batch of 1."""
    if seq_idx is not None:
        raise ShapeError(
            "ssd_scan: cu_seqlens must be the only description of the packing; got seq_idx as well. "
            "Pass cu_seqlens for sequences with states of their own, seq_idx otherwise."
        )
    sizes.bind("cu_seqlens", cu_seqlens, "nseqs+1")
    if cu_seqlens.shape[0] < 1:
        raise ShapeError(
            "ssd_scan: cu_seqlens must hold nseqs + 1 offsets, the first of them 0; got none. "
            "Pass [0, seqlen] for a single sequence."
        )
    if sizes["batch"] != 1:
        raise ShapeError(
            f"ssd_scan: x must have batch 1 when cu_seqlens is given; got batch {sizes['batch']}. "
            "Concatenate the sequences along seqlen."
        )
    sizes.set(nseqs=cu_seqlens.shape[0] - 1)
    # The one place where values are read: free on a CPU, and a wrong offset would be a silent mix-up of sequences.
    if type(cu_seqlens) is torch.Tensor and cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        offsets = cu_seqlens.tolist()
        if offsets[0] != 0 or offsets[-1] != sizes["seqlen"] or any(a > b for a, b in pairwise(offsets)):
            raise ShapeError(
                f"ssd_scan: cu_seqlens must rise from 0 to seqlen={sizes['seqlen']}; got {offsets}. "
                "Pass the running sum of the lengths, with a leading 0."
            )
