"""Test inputs of causal_conv1d and causal_conv1d_update."""

from collections.abc import Callable
from typing import Any

import torch

from mmkernels.testing.cases import Case, register_cases

Args = dict[str, Any]


def conv_inputs(
    generator: torch.Generator, batch: int, seqlen: int, dim: int, width: int, *, bias: bool = True, **rest: Any
) -> Args:
    """Keyword arguments of causal_conv1d in float64; `rest` is passed through."""
    made: Args = {
        "x": torch.randn(batch, seqlen, dim, generator=generator, dtype=torch.float64),
        "weight": torch.randn(dim, width, generator=generator, dtype=torch.float64) / width**0.5,
        "bias": torch.randn(dim, generator=generator, dtype=torch.float64) if bias else None,
    }
    return {**made, **rest}


def states(generator: torch.Generator, rows: int, dim: int, length: int) -> torch.Tensor:
    """Random conv states (rows, dim, length) in float64."""
    return torch.randn(rows, dim, length, generator=generator, dtype=torch.float64)


def _plain(batch: int, seqlen: int, dim: int, width: int, **rest: Any) -> Callable[[torch.Generator], Args]:
    return lambda generator: conv_inputs(generator, batch, seqlen, dim, width, **rest)


def _stateful(batch: int, seqlen: int, dim: int, width: int, **rest: Any) -> Callable[[torch.Generator], Args]:
    def build(generator: torch.Generator) -> Args:
        made = conv_inputs(generator, batch, seqlen, dim, width, return_final_states=True, **rest)
        rows = batch if "cu_seqlens" not in rest else rest["cu_seqlens"].numel() - 1
        return {**made, "initial_states": states(generator, rows, dim, width - 1)}

    return build


def _strided(generator: torch.Generator) -> Args:
    # x and the weight as a model passes them: a slice of a wider projection, an nn.Conv1d weight without its middle.
    made = conv_inputs(generator, 2, 9, 6, 4, activation="silu")
    wide = torch.randn(2, 9, 11, generator=generator, dtype=torch.float64)
    return {**made, "x": wide[..., 3:9], "weight": made["weight"].t().contiguous().t()}


def _update(
    batch: int, seqlen: int | None, dim: int, width: int, length: int, slots: list[int] | None, silu: bool
) -> Any:
    def build(generator: torch.Generator) -> Args:
        made = conv_inputs(generator, batch, seqlen or 1, dim, width, activation="silu" if silu else None)
        rows = batch if slots is None else 6
        made["x"] = made["x"] if seqlen else made["x"][:, 0]
        made["conv_state"] = states(generator, rows, dim, length)
        made["state_indices"] = None if slots is None else torch.tensor(slots, dtype=torch.int32)
        return made

    return build


_IDS = torch.tensor([[0, 0, 1, 1, 1, 0, 2, 2, -1], [-1, -1, 3, 4, 4, 4, -1, 4, 4]], dtype=torch.int32)
_LEADING = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1, 1, 0, 0]], dtype=torch.int32)
_SHORT = torch.tensor([[0, 1], [0, 0], [1, 1]], dtype=torch.int32)
_BOUNDS = torch.tensor([0, 1, 1, 6, 9], dtype=torch.int32)

register_cases(
    *(
        Case("causal_conv1d", name, build, small=small)
        for name, build, small in (
            ("plain", _plain(2, 5, 3, 4, bias=False), True),
            ("silu-bias", _plain(2, 6, 3, 2, activation="silu"), True),
            ("width1", _plain(2, 4, 3, 1, activation="silu", return_final_states=True), True),
            ("wide-short", _stateful(2, 2, 3, 5, activation="silu"), True),
            ("states", _stateful(2, 7, 3, 4, activation="silu"), True),
            ("states-reverse", _stateful(2, 7, 3, 4, reverse=True), True),
            ("ids", _stateful(2, 9, 2, 4, activation="silu", seq_idx=_IDS), True),
            ("ids-leading", _stateful(2, 9, 2, 4, activation="silu", seq_idx=_LEADING), True),
            ("ids-reverse", _stateful(2, 9, 2, 3, seq_idx=_LEADING, reverse=True), True),
            ("short-ids", _stateful(3, 2, 3, 4, seq_idx=_SHORT), True),
            ("packed", _stateful(1, 9, 2, 4, activation="silu", cu_seqlens=_BOUNDS), True),
            ("packed-reverse", _stateful(1, 9, 2, 3, activation="silu", cu_seqlens=_BOUNDS, reverse=True), True),
            ("packed-stateless", _plain(1, 9, 2, 4, cu_seqlens=_BOUNDS, return_final_states=True), True),
            ("strided", _strided, True),
            ("empty-seqlen", _stateful(2, 0, 3, 4), False),
            ("empty-batch", _stateful(0, 5, 3, 4, activation="silu"), False),
            ("mamba2", _stateful(2, 130, 96, 4, activation="silu"), False),
            ("mmmamba", _plain(3, 65, 64, 2, activation="silu"), False),
        )
    ),
    *(
        Case("causal_conv1d_update", name, build, small=True, mutates=("conv_state",))
        for name, build in (
            ("one-token", _update(3, None, 4, 4, 3, None, True)),
            ("long-state", _update(2, None, 4, 3, 5, None, False)),
            ("several-tokens", _update(2, 5, 4, 4, 3, None, True)),
            ("slots", _update(4, None, 4, 4, 3, [4, 0, -1, 2], True)),
            ("slots-several", _update(3, 2, 4, 2, 4, [-1, 5, 1], True)),
            ("all-padding", _update(2, None, 4, 4, 3, [-1, -1], False)),
            ("width1", _update(2, None, 4, 1, 0, None, True)),
        )
    ),
)
