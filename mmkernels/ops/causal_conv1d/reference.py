"""The oracle of causal_conv1d: one token after the other, from a window of the last `width` raw inputs.

out_t = act(bias + sum_k weight[:, k] window[k]); a change of id empties the window; a negative id is padding.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    return_final_states: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """See mmkernels.causal_conv1d; loops over sequences and tokens."""
    batch, seqlen, dim = x.shape
    history = weight.shape[1] - 1
    if cu_seqlens is None:
        pieces = [x[b] for b in range(batch)]
        ids = [[0] * seqlen if seq_idx is None else seq_idx[b].tolist() for b in range(batch)]
    else:
        bounds = cu_seqlens.tolist()
        pieces = [x[0, start:end] for start, end in pairwise(bounds)]
        ids = [[0] * len(piece) for piece in pieces]
    if initial_states is None:
        initial_states = x.new_zeros(len(pieces), dim, history)

    outs, finals = [], []
    for piece, piece_ids, state in zip(pieces, ids, initial_states, strict=True):
        if reverse:
            piece, piece_ids = piece.flip(0), piece_ids[::-1]
        out, final = _one_sequence(piece, piece_ids, weight, bias, activation, state.to(x.dtype))
        outs.append(out.flip(0) if reverse else out)
        finals.append(final)
    if not outs:
        y = _nothing(x, weight, bias)
    else:
        y = torch.stack(outs) if cu_seqlens is None else torch.cat(outs)[None]
    if not return_final_states:
        return y
    return y, torch.stack(finals) if finals else initial_states.to(x.dtype)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    state_indices: Tensor | None,
) -> Tensor:
    """See mmkernels.causal_conv1d_update; loops over rows and tokens."""
    batch = x.shape[0]
    slots = list(range(batch)) if state_indices is None else state_indices.tolist()
    tokens = x[:, None] if x.dim() == 2 else x
    history = weight.shape[1] - 1
    outs = []
    for row, slot in enumerate(slots):
        if slot < 0:
            outs.append(torch.zeros_like(tokens[row]))
            continue
        recent = conv_state[slot, :, conv_state.shape[2] - history :].to(x.dtype)
        outs.append(_one_sequence(tokens[row], [0] * tokens.shape[1], weight, bias, activation, recent)[0])
        extended = torch.cat([conv_state[slot], tokens[row].T.to(conv_state.dtype)], dim=1)
        conv_state[slot] = extended[:, tokens.shape[1] :]
    y = torch.stack(outs) if outs else _nothing(tokens, weight, bias)
    return y[:, 0] if x.dim() == 2 else y


def _one_sequence(
    x: Tensor, ids: list[int], weight: Tensor, bias: Tensor | None, activation: str | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    # x (seqlen, dim), state (dim, width-1); returns the outputs and the state after the last token.
    acc = torch.promote_types(x.dtype, torch.float32)
    empty = torch.zeros_like(state)
    window, before, outs = state, 0, []
    for token, now in zip(x, ids, strict=True):
        if now != before:
            window = empty
        taps = torch.cat([window, token[:, None]], dim=1)
        total = (weight.to(acc) * taps.to(acc)).sum(1)
        if bias is not None:
            total = total + bias.to(acc)
        if activation == "silu":
            total = F.silu(total)
        outs.append(total.to(x.dtype) if now >= 0 else torch.zeros_like(token))
        window = taps[:, 1:] if now >= 0 else empty
        before = now
    return torch.stack(outs) if outs else _nothing(x, weight, bias), window.clone()


def _nothing(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # No tokens: still a function of weight and bias, with gradients of zero.
    acc = torch.promote_types(x.dtype, torch.float32)
    y = x.to(acc) * weight[:, -1].to(acc)
    return (y if bias is None else y + bias.to(acc)).to(x.dtype)
