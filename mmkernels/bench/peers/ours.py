"""The ops of mmkernels itself: their native backend, another by name, or the automatic choice."""

from typing import Any

from torch import Tensor, nn

import mmkernels
from mmkernels.bench.problems import Prepared, Problem, Unavailable
from mmkernels.errors import BackendError
from mmkernels.layers import Mamba2Mixer


def require_ready(backend: str | None, op: str) -> None:
    """Refuse to race a backend that is not there; None asks for no promise.

    A race of "mmkernels" that quietly fell back to plain torch would be mislabelled.

    Raises:
        Unavailable: the op has no such backend, or it cannot run here.
    """
    state = "ready" if backend is None else mmkernels.backends()[op].get(backend, "there is none")
    if state != "ready":
        raise Unavailable(f"its {backend} backend is not ready: {state}")


def scan(problem: Problem, *, backend: str | None = "native") -> Prepared:
    """`mmkernels.ssd_scan`."""
    require_ready(backend, "ssd_scan")
    args = problem.args
    return Prepared(lambda: mmkernels.ssd_scan(**args, dt_softplus=True, backend=backend))


def conv(problem: Problem, *, backend: str | None = "native") -> Prepared:
    """`mmkernels.causal_conv1d`."""
    require_ready(backend, "causal_conv1d")
    args = problem.args
    return Prepared(lambda: mmkernels.causal_conv1d(**args, activation="silu", backend=backend))


def norm(problem: Problem, *, backend: str | None = "native") -> Prepared:
    """`mmkernels.gated_rms_norm`."""
    require_ready(backend, "gated_rms_norm")
    args, first = problem.args, problem.cell.sizes.norm_per_head
    return Prepared(lambda: mmkernels.gated_rms_norm(**args, norm_before_gate=first, backend=backend))


def update(problem: Problem, *, backend: str | None = "native") -> Prepared:
    """`mmkernels.ssd_update`, one call for each layer."""
    require_ready(backend, "ssd_update")
    states, rest = problem.args["states"], {k: v for k, v in problem.args.items() if k != "states"}

    def run() -> Tensor:
        for state in states:
            y = mmkernels.ssd_update(state, **rest, dt_softplus=True, backend=backend)
        return y

    return Prepared(run, lambda y: with_state(y, states[-1]), len(states))


def conv_update(problem: Problem, *, backend: str | None = "native") -> Prepared:
    """`mmkernels.causal_conv1d_update`, one call for each layer."""
    require_ready(backend, "causal_conv1d_update")
    a = problem.args
    layers = list(zip(a["states"], a["weights"], a["biases"], strict=True))

    def run() -> Tensor:
        for state, weight, bias in layers:
            y = mmkernels.causal_conv1d_update(a["x"], state, weight, bias, activation="silu", backend=backend)
        return y

    return Prepared(run, lambda y: with_state(y, a["states"][-1]), len(layers))


def mixer(problem: Problem) -> Prepared:
    """`mmkernels.layers.Mamba2Mixer` with identities in place of its projections."""
    for op in ("ssd_scan", "causal_conv1d", "gated_rms_norm"):
        require_ready("native", op)
    a, s = problem.args, problem.cell.sizes
    layer = Mamba2Mixer(
        s.d_inner // 2, d_state=s.dstate, d_conv=s.conv_width, headdim=s.headdim, ngroups=s.ngroups,
        dtype=a["zxbcdt"].dtype,
    )  # fmt: skip
    layer.in_proj = layer.out_proj = nn.Identity()  # type: ignore[assignment]
    layer.d_model = a["zxbcdt"].shape[-1]
    fill_mixer(layer, a)
    return Prepared(lambda: layer(a["zxbcdt"]))


def fill_mixer(module: nn.Module, args: dict[str, Tensor]) -> None:
    """Copy a mixer problem into a Mamba-2 mixer's parameters, all of them; both packages use the official names."""
    values = {
        "conv1d.weight": args["conv_weight"][:, None],
        "conv1d.bias": args["conv_bias"],
        "norm.weight": args["norm_weight"],
        **{name: args[name] for name in ("A_log", "D", "dt_bias")},
    }
    parameters = dict(module.named_parameters())
    if set(parameters) != set(values):
        raise BackendError(f"bench: parameters must be {sorted(values)}; got {sorted(parameters)}. Adapt the peer.")
    for name, value in values.items():
        parameters[name].data.copy_(value)


def with_state(y: Any, state: Tensor) -> Tensor:
    """An output and the state after it in one row of float64."""
    import torch

    return torch.cat([y.double().flatten(), state.double().flatten()])
