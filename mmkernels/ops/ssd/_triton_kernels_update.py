"""Triton kernel of ssd_update: equation 16 of Dao and Gu, "Transformers are SSMs" (2024), on states kept in slots."""

import triton
import triton.language as tl

from mmkernels import _triton
from mmkernels._triton import Config, Specimen
from mmkernels._triton_math import silu, softplus

_TILE = 2048  # state elements a program: 16 a thread, held in float32 next to what B and C broadcast to


@triton.jit(do_not_specialize=["nslots"])
def update_kernel(
    state,
    x,
    dt,
    A,
    B,
    C,
    D,
    z,
    dt_bias,
    indices,
    y,
    tokens,
    nheads,
    headdim,
    dstate,
    heads_a_group,
    nslots,
    low,
    high,
    s_slot,
    s_head,
    s_row,
    s_column,
    x_batch,
    x_token,
    x_head,
    x_row,
    dt_batch,
    dt_token,
    dt_head,
    A_head,
    B_batch,
    B_token,
    B_group,
    B_column,
    C_batch,
    C_token,
    C_group,
    C_column,
    D_head,
    D_row,
    z_batch,
    z_token,
    z_head,
    z_row,
    SOFTPLUS: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """S <- exp(A dt) S + dt x B^T and y = (S C + D x) silu(z), token after token, the state in registers meanwhile.

    Grid: (batch * nheads * cdiv(headdim, ROWS),).  A program owns ROWS rows of one head's state.  A negative slot is
    padding: output 0.  A slot that is none: output NaN, and no memory is touched.
    Bytes: every addressed state read and written once per call; B and C are shared by a group's programs through L2.
    """
    slices = tl.cdiv(headdim, ROWS)
    program = tl.program_id(0)
    row = (program % slices) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    head = ((program // slices) % nheads).to(tl.int64)
    batch = (program // slices // nheads).to(tl.int64)
    group = head // heads_a_group
    column = tl.arange(0, COLUMNS).to(tl.int64)
    slot = batch
    if indices is not None:
        slot = tl.load(indices + batch).to(tl.int64)
    # As vectors: the interpreter makes integers of a boolean scalar that it has to broadcast.
    slots = slot + row * 0
    owned = (slots >= 0) & (slots < nslots) & (row < headdim)
    inside = owned[:, None] & (column < dstate)[None, :]
    at = slot * s_slot + head * s_head + row[:, None] * s_row + column[None, :] * s_column
    S = tl.load(state + at, inside, other=0.0).to(ACC)
    decay = tl.load(A + head * A_head).to(ACC)
    x += batch * x_batch + head * x_head
    B += batch * B_batch + group * B_group
    C += batch * C_batch + group * C_group
    for t in range(0, tokens):
        token = batch * 0 + t
        step = tl.load(dt + batch * dt_batch + token * dt_token + head * dt_head).to(ACC)
        if dt_bias is not None:
            step += tl.load(dt_bias + head).to(ACC)
        if SOFTPLUS:
            step = softplus(step)
        step = tl.minimum(tl.maximum(step, low), high).to(ACC)
        x_value = tl.load(x + token * x_token + row * x_row, row < headdim, other=0.0).to(ACC)
        b = tl.load(B + token * B_token + column * B_column, column < dstate, other=0.0).to(ACC)
        c = tl.load(C + token * C_token + column * C_column, column < dstate, other=0.0).to(ACC)
        S = S * tl.exp(decay * step) + (x_value * step)[:, None] * b[None, :]
        out = tl.sum(S * c[None, :], 1)
        if D is not None:
            out += x_value * tl.load(D + head * D_head + row * D_row, row < headdim, other=0.0).to(ACC)
        if z is not None:
            z_at = batch * z_batch + token * z_token + head * z_head + row * z_row
            out *= silu(tl.load(z + z_at, row < headdim, other=0.0).to(ACC))
        out = tl.where(owned, out, tl.where(slots < 0, 0.0, float("nan")))
        at_y = ((batch * tokens + token) * nheads + head) * headdim + row
        tl.store(y + at_y, out.to(y.dtype.element_ty), row < headdim)
    tl.store(state + at, S.to(state.dtype.element_ty), inside)


def config(architecture: str, headdim: int, dstate: int) -> Config:
    """Whole rows of the state, and as many of them as make a tile."""
    columns = _triton.bucket(dstate, 16)
    tile = _TILE if architecture != _triton.INTERPRETER else 1 << 14  # for which programs are dear and tiles are not
    rows = _triton.bucket(headdim, 1, max(1, tile // columns))
    return Config({"ROWS": rows, "COLUMNS": columns}, warps=_triton.bucket(rows * columns // 512, 1, 8))


def specimens(architecture: str) -> list[Specimen]:
    """What is compiled ahead of time: Mamba-2 and mmMamba, one token and all options; a small state, with nothing."""
    found = []
    for label, pointer, state, headdim, dstate, full in (
        ("Mamba-2 bf16, fp32 state", "*bf16", "*fp32", 64, 128, True),
        ("mmMamba bf16 state", "*bf16", "*bf16", 128, 128, True),
        ("plain fp32", "*fp32", "*fp32", 32, 16, False),
        ("odd fp32", "*fp32", "*fp32", 80, 200, True),
    ):
        types = dict.fromkeys(("x", "B", "C", "z", "y"), pointer) | {"state": state, "dt": pointer, "indices": "*i32"}
        types |= dict.fromkeys(("A", "D", "dt_bias"), "*fp32") | {"low": "fp32", "high": "fp32"}
        constants = {"SOFTPLUS": full, "ACC": tl.float32, "s_column": 1, "x_row": 1, "B_column": 1, "C_column": 1}
        constants |= {"dt_head": 1, "A_head": 1} | ({"z_row": 1} if full else {"z": None, "D": None, "dt_bias": None})
        constants |= {} if full else {"indices": None}
        found.append(Specimen(label, update_kernel, types, config(architecture, headdim, dstate), constants))
    return found
