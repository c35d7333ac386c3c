"""transformers' own CPU path: the functions and the module of its Mamba-2 model, at any chunk size."""

import functools
import logging
from typing import Any

from torch import Tensor, nn

from mmkernels.bench.peers.ours import fill_mixer, with_state
from mmkernels.bench.problems import Prepared, Problem, Unavailable


@functools.cache
def _mamba2() -> Any:
    try:
        from transformers.models.mamba2 import modeling_mamba2
    except ImportError as error:
        raise Unavailable(f"transformers with Mamba-2 is not installed ({error}); pip install transformers") from error
    # It says at every first call that it has no CUDA kernels: nobody expects them here.
    logging.getLogger("transformers.integrations.hub_kernels").setLevel(logging.ERROR)
    return modeling_mamba2


def _function(name: str) -> Any:
    # Beneath the decorator that looks for CUDA kernels on a hub.
    function = getattr(_mamba2(), name)
    return getattr(function, "__wrapped__", function)


def scan(problem: Problem, *, chunk: int) -> Prepared:
    """`mamba2_chunk_scan`."""
    a, function = problem.args, _function("mamba2_chunk_scan")

    def run() -> Any:
        return function(
            a["x"], a["dt"], a["A"], a["B"], a["C"], chunk, D=a["D"], dt_bias=a["dt_bias"], dt_softplus=True
        )

    return Prepared(run, lambda out: out[0] if isinstance(out, tuple) else out)


def conv(problem: Problem) -> Prepared:
    """`causal_conv1d_fn` over channels-first data, as its mixer calls it."""
    a, function = problem.args, _function("causal_conv1d_fn")

    def run() -> Tensor:
        return function(a["x"].transpose(1, 2), a["weight"], a["bias"], activation="silu").transpose(1, 2)

    return Prepared(run)


def norm(problem: Problem) -> Prepared:
    """`MambaRMSNormGated`: gate first, one group."""
    if problem.cell.sizes.norm_per_head:
        raise Unavailable("has no norm that comes before its gate")
    a, size = problem.args, problem.args["weight"].shape[0]
    module = _mamba2().MambaRMSNormGated(size, group_size=size, eps=1e-5)
    if problem.cell.backward:
        module.weight = nn.Parameter(a["weight"].detach())
        a["weight"] = module.weight  # the leaf whose gradient is asked for
    else:
        module.weight = nn.Parameter(a["weight"], requires_grad=False)
    return Prepared(lambda: module(a["x"], a["z"]))


def update(problem: Problem) -> Prepared:
    """`mamba2_selective_state_update` with the arguments its mixer makes."""
    a, s, function = problem.args, problem.cell.sizes, _function("mamba2_selective_state_update")

    def run() -> Tensor:
        for state in a["states"]:
            dt = a["dt"][..., None].expand(-1, -1, s.headdim)
            A = a["A"][:, None, None].expand(-1, s.headdim, s.dstate)
            D, bias = a["D"][:, None].expand(-1, s.headdim), a["dt_bias"][:, None].expand(-1, s.headdim)
            y = function(state, a["x"], dt, A, a["B"], a["C"], D, dt_bias=bias, dt_softplus=True)
        return y

    return Prepared(run, lambda y: with_state(y, a["states"][-1]), len(a["states"]))


def conv_update(problem: Problem) -> Prepared:
    """`causal_conv1d_update`, one call for each layer."""
    a, function = problem.args, _function("causal_conv1d_update")
    layers = list(zip(a["states"], a["weights"], a["biases"], strict=True))

    def run() -> Tensor:
        for state, weight, bias in layers:
            y = function(a["x"][..., None], state, weight, bias, activation="silu")
        return y

    return Prepared(run, lambda y: with_state(y, a["states"][-1]), len(layers))


def mixer_layer(sizes: Any, args: dict[str, Tensor], chunk: int) -> Any:
    """Its Mamba2Mixer with identities in place of the projections."""
    from transformers import Mamba2Config

    s = sizes
    config = Mamba2Config(
        hidden_size=s.d_inner // 2, num_hidden_layers=1, num_heads=s.nheads, head_dim=s.headdim, state_size=s.dstate,
        n_groups=s.ngroups, conv_kernel=s.conv_width, expand=2, chunk_size=chunk, layer_norm_epsilon=1e-5,
    )  # fmt: skip
    layer = _mamba2().Mamba2Mixer(config, 0).to(args["zxbcdt"].dtype).eval()
    layer.in_proj = layer.out_proj = nn.Identity()
    fill_mixer(layer, args)
    return layer


def mixer(problem: Problem, *, chunk: int) -> Prepared:
    """Its Mamba2Mixer without projections."""
    layer = mixer_layer(problem.cell.sizes, problem.args, chunk)
    return Prepared(lambda: layer(problem.args["zxbcdt"]))
