"""Test inputs of ssd_scan and ssd_update."""

from collections.abc import Callable
from typing import Any

import torch

from mmkernels.testing.cases import Case, register_cases

Args = dict[str, Any]
Build = Callable[[torch.Generator], Args]
TOKENWISE = ("x", "dt", "B", "C", "z")  # the arguments of ssd_scan with a token axis (axis 1)


def ssd_inputs(
    generator: torch.Generator,
    batch: int,
    seqlen: int | None,
    nheads: int,
    headdim: int,
    dstate: int,
    ngroups: int = 1,
    *,
    skip: str | None = None,
    gate: bool = False,
    softplus: bool = False,
    states: int | None = None,
    **rest: Any,
) -> Args:
    """Keyword arguments of ssd_scan in float64; without a token axis when seqlen is None.

    Args:
        skip: "head" or "channel" for a D of that shape.
        gate: make z.
        softplus: make dt_bias and apply softplus; otherwise dt is a positive step size already.
        states: make that many initial states.
        **rest: passed through.
    """

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    lead = (batch,) if seqlen is None else (batch, seqlen)
    made: Args = {
        "x": normal(*lead, nheads, headdim),
        "dt": normal(*lead, nheads) if softplus else 0.05 + normal(*lead, nheads).abs(),
        "A": -normal(nheads).exp(),
        # Products with the state keep the size of x: entries of B and C have variance 1 / sqrt(dstate).
        "B": normal(*lead, ngroups, dstate) / dstate**0.25,
        "C": normal(*lead, ngroups, dstate) / dstate**0.25,
    }
    if skip is not None:
        made["D"] = normal(nheads, headdim) if skip == "channel" else normal(nheads)
    if gate:
        made["z"] = normal(*lead, nheads, headdim)
    if softplus:
        made.update(dt_bias=normal(nheads) - 1, dt_softplus=True)
    if states is not None:
        made["initial_states"] = normal(states, nheads, headdim, dstate)
    return {**made, **rest}


def tokens(args: Args, part: Any) -> Args:
    """The call restricted to some tokens, or with its tokens in another order; `part` indexes the token axis."""
    return {**args, **{name: args[name][:, part] for name in TOKENWISE if args.get(name) is not None}}


def cast(args: Args, dtype: torch.dtype) -> Args:
    """The same call with every floating tensor in another dtype."""
    return {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in args.items()}


def leaves(args: Args) -> tuple[Args, dict[str, torch.Tensor]]:
    """The same call on fresh leaves that require grad, and those leaves by name."""
    floating = {k: v for k, v in args.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    fresh = {name: value.detach().clone().requires_grad_() for name, value in floating.items()}
    return {**args, **fresh}, fresh


def _scan(*sizes: int, **options: Any) -> Build:
    return lambda generator: ssd_inputs(generator, *sizes, **options)


def _model_views(generator: torch.Generator) -> Args:
    # As a mixer passes them: x, B and C are slices of one convolution's output, z and dt of one projection's.
    made = ssd_inputs(generator, 2, 7, 4, 3, 2, 2, skip="head", gate=True, softplus=True, chunk_size=3)
    xBC = torch.randn(2, 7, 12 + 4 + 4, generator=generator, dtype=torch.float64)
    made["x"], B, C = xBC[..., :12].unflatten(-1, (4, 3)), xBC[..., 12:16], xBC[..., 16:]
    made.update(B=B.unflatten(-1, (2, 2)), C=C.unflatten(-1, (2, 2)))
    zdt = torch.randn(2, 7, 16, generator=generator, dtype=torch.float64)
    made.update(z=zdt[..., :12].unflatten(-1, (4, 3)), dt=zdt[..., 12:])
    return made


def _transposed(generator: torch.Generator) -> Args:
    # Heads before tokens in memory, the state axis outermost, and one gate for every token.
    made = ssd_inputs(generator, 2, 6, 2, 3, 2, gate=True, states=2, chunk_size=4, return_final_states=True)
    made["x"] = made["x"].transpose(1, 2).contiguous().transpose(1, 2)
    made["B"] = made["B"].permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    made["initial_states"] = made["initial_states"].transpose(-1, -2).contiguous().transpose(-1, -2)
    made["z"] = made["z"][:, :1].expand(-1, 6, -1, -1)
    return made


def _steep(generator: torch.Generator) -> Args:
    # Steps that forget everything (|A| dt to 1000) among steps that forget nothing: differences of prefix sums of
    # thousands must still be exact to the last digits.
    made = ssd_inputs(generator, 1, 40, 3, 4, 5, skip="head", states=1, chunk_size=16, return_final_states=True)
    made["A"] = torch.tensor([-1.0, -0.01, -10.0], dtype=torch.float64)
    made["dt"] = torch.where(made["dt"] > 1.2, 100.0, 0.01 * made["dt"])
    return made


def _update(
    batch: int, seqlen: int | None, *sizes: int, slots: list[int] | None = None, nslots: int = 6, **options: Any
) -> Build:
    def build(generator: torch.Generator) -> Args:
        made = ssd_inputs(generator, batch, seqlen, *sizes, states=batch if slots is None else nslots, **options)
        made["state"] = made.pop("initial_states")
        if slots is not None:
            made["state_indices"] = torch.tensor(slots, dtype=torch.int32)
        return made

    return build


def _bounds(*offsets: int) -> torch.Tensor:
    return torch.tensor(offsets, dtype=torch.int32)


_MIXER: Args = {"skip": "head", "gate": True, "softplus": True}
_FINAL: Args = {"return_final_states": True}
# Runs inside a chunk, across chunks, an id that returns, padding before, between and after, a leading 0 and none.
_IDS = torch.tensor([[0, 0, 1, 1, 1, 0, -1], [-1, -1, 3, -2, 4, 4, 4]], dtype=torch.int32)
_IDS_BACK = torch.tensor([[2, 1, 1, 0, 0, 0, 0], [-1, 3, 3, 3, -1, 0, 5]], dtype=torch.int64)
_BLOCKS = torch.arange(100, dtype=torch.int32).div(37, rounding_mode="floor").expand(2, -1)

# What these have, others have too: Triton's interpreter leaves them out.
_HEAVY = {"mixer", "reverse", "packed", "groups-all", "packed-finals", "model-views"}
_HEAVY |= {"training", "packed-150", "ids-100", "chunk-256", "odd-129-reverse"}

register_cases(
    *(
        # gradients of A and dt_bias sum over 14 tokens at most
        Case("ssd_scan", name, build, small=True, summands=14, heavy=name in _HEAVY)
        for name, build in (
            ("reverse-one-chunk", _scan(1, 5, 2, 3, 2, reverse=True)),  # the first is the one tests repeat: a cheap one
            ("plain", _scan(2, 5, 2, 3, 2, chunk_size=3)),
            ("one-token", _scan(2, 1, 2, 3, 2, **_MIXER, **_FINAL)),
            ("one-chunk", _scan(2, 6, 2, 3, 2, **_MIXER)),
            ("mixer", _scan(2, 7, 2, 3, 2, **_MIXER, chunk_size=3)),
            ("D-channel", _scan(1, 5, 2, 3, 2, skip="channel", chunk_size=2)),
            ("dt-limit", _scan(2, 6, 2, 3, 2, softplus=True, dt_limit=(0.2, 0.6), chunk_size=3, **_FINAL)),
            ("groups", _scan(1, 6, 4, 3, 2, 2, **_MIXER, chunk_size=3, **_FINAL)),
            ("groups-all", _scan(1, 5, 3, 2, 2, 3, skip="channel", gate=True, chunk_size=2)),
            ("states", _scan(2, 7, 2, 3, 2, **_MIXER, states=2, chunk_size=3, **_FINAL)),
            ("states-one-chunk", _scan(2, 5, 2, 3, 2, states=2, **_FINAL)),
            ("reverse", _scan(2, 7, 2, 3, 2, **_MIXER, states=2, chunk_size=3, reverse=True, **_FINAL)),
            ("ids", _scan(2, 7, 2, 3, 2, **_MIXER, states=2, seq_idx=_IDS, chunk_size=3, **_FINAL)),
            ("ids-reverse", _scan(2, 7, 2, 3, 2, states=2, seq_idx=_IDS_BACK, reverse=True, chunk_size=3, **_FINAL)),
            ("ids-one-chunk", _scan(2, 7, 2, 3, 2, **_MIXER, seq_idx=_IDS)),
            ("packed", _scan(1, 7, 2, 3, 2, **_MIXER, states=4, cu_seqlens=_bounds(0, 1, 1, 6, 7), **_FINAL)),
            (
                "packed-chunks",
                _scan(1, 7, 4, 3, 2, 2, **_MIXER, states=3, cu_seqlens=_bounds(0, 5, 7, 7), chunk_size=2, **_FINAL),
            ),
            (
                "packed-reverse",
                _scan(1, 7, 2, 3, 2, states=3, cu_seqlens=_bounds(0, 0, 5, 7), reverse=True, chunk_size=3, **_FINAL),
            ),
            ("packed-stateless", _scan(1, 7, 2, 3, 2, **_MIXER, cu_seqlens=_bounds(0, 4, 4, 7), chunk_size=3)),
            ("packed-finals", _scan(1, 6, 2, 3, 2, cu_seqlens=_bounds(0, 4, 4, 6), chunk_size=3, **_FINAL)),
            ("model-views", _model_views),
            ("transposed", _transposed),
        )
    ),
    *(
        Case("ssd_scan", name, build, summands=tokens, heavy=name in _HEAVY)
        for name, tokens, build in (
            ("empty-seqlen", 0, _scan(2, 0, 2, 3, 2, **_MIXER, states=2, **_FINAL)),
            ("empty-batch", 0, _scan(0, 5, 2, 3, 2, **_MIXER, chunk_size=2, **_FINAL)),
            ("empty-packed", 0, _scan(1, 0, 2, 3, 2, states=2, cu_seqlens=_bounds(0, 0, 0), **_FINAL)),
            ("steep", 40, _steep),
            ("odd-65", 130, _scan(2, 65, 6, 17, 19, 3, **_MIXER, states=2, **_FINAL)),
            ("odd-129-reverse", 129, _scan(1, 129, 6, 5, 33, 2, **_MIXER, reverse=True, **_FINAL)),
            ("chunk-256", 300, _scan(1, 300, 2, 16, 16, **_MIXER, chunk_size=256, **_FINAL)),
            ("mamba2", 130, _scan(1, 130, 4, 64, 128, **_MIXER, **_FINAL)),
            ("training", 160, _scan(8, 20, 4, 32, 32, **_MIXER)),
            ("ids-100", 200, _scan(2, 100, 4, 16, 16, **_MIXER, seq_idx=_BLOCKS)),
            (
                "packed-150",
                150,
                _scan(1, 150, 4, 16, 16, 2, **_MIXER, states=5, cu_seqlens=_bounds(0, 64, 65, 65, 130, 150), **_FINAL),
            ),
        )
    ),
    *(
        Case("ssd_update", name, build, small=True, mutates=("state",))
        for name, build in (
            ("plain", _update(2, None, 2, 3, 2)),
            ("mixer", _update(3, None, 4, 3, 2, 2, **_MIXER)),
            ("D-channel", _update(2, None, 2, 3, 2, skip="channel", softplus=True, dt_limit=(0.2, 0.6))),
            ("one-of-four-axes", _update(2, 1, 2, 3, 2, **_MIXER)),
            ("several-tokens", _update(2, 5, 4, 3, 2, 2, **_MIXER)),
            ("slots", _update(4, None, 2, 3, 2, slots=[4, -1, 0, -7], **_MIXER)),
            ("slots-several", _update(3, 3, 2, 3, 2, slots=[-1, 5, 1], **_MIXER)),
            ("all-padding", _update(2, None, 2, 3, 2, slots=[-1, -1])),
            ("empty-batch", _update(0, None, 2, 3, 2, **_MIXER)),
        )
    ),
    Case("ssd_update", "mamba2", _update(2, None, 24, 64, 128, **_MIXER), mutates=("state",)),
    Case("ssd_update", "past-a-chunk", _update(1, 70, 2, 8, 8, **_MIXER), mutates=("state",)),
)
