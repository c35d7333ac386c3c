"""What a call costs beside its work: the ops of decoding at the smallest sizes, per call, gradients off.

Between calls of torch that do next to nothing either (add, linear) and the functions that transformers and mamba_ssm
have for the same step on a CPU.  One thread; the target is 3 us a call.
"""

import pytest
import torch
import torch.nn.functional as F

import mmkernels
from mmkernels.bench.peers import mamba_ssm_ref, transformers_cpu
from mmkernels.bench.problems import Unavailable

HEADS, HEADDIM, DSTATE, WIDTH = 1, 1, 16, 4
STATE = torch.zeros(1, HEADS, HEADDIM, DSTATE)
X, DT, A, D = torch.ones(1, HEADS, HEADDIM), torch.ones(1, HEADS), -torch.ones(HEADS), torch.ones(HEADS)
B = torch.ones(1, 1, DSTATE)
CHANNELS = torch.ones(1, DSTATE)
CONV_STATE, CONV_WEIGHT, BIAS = torch.zeros(1, DSTATE, WIDTH - 1), torch.ones(DSTATE, WIDTH), torch.ones(DSTATE)
WIDE_STATE = torch.zeros(1, DSTATE, WIDTH)  # transformers keeps one input more
WEIGHT = torch.ones(DSTATE, DSTATE)


def ssd_update():
    return mmkernels.ssd_update(STATE, X, DT, A, B, B, D=D, dt_bias=D, dt_softplus=True)


def _selective_update(function):
    """As mamba_ssm's signature wants it, the expanded views made beforehand."""
    rate, step = A[:, None, None].expand(-1, HEADDIM, DSTATE), DT[..., None].expand(-1, -1, HEADDIM)
    D_, bias = (t[:, None].expand(-1, HEADDIM) for t in (D, D))
    return lambda: function(STATE, X, step, rate, B, B, D_, dt_bias=bias, dt_softplus=True)


def ssd_update_transformers():
    return _selective_update(transformers_cpu._function("mamba2_selective_state_update"))


def ssd_update_mamba_ssm():
    module = mamba_ssm_ref._module("mamba_ssm.ops.triton.selective_state_update")
    return _selective_update(module.selective_state_update_ref)


def causal_conv1d_update():
    return mmkernels.causal_conv1d_update(CHANNELS, CONV_STATE, CONV_WEIGHT, BIAS, activation="silu")


def causal_conv1d_update_transformers():
    function = transformers_cpu._function("causal_conv1d_update")
    return lambda: function(CHANNELS[..., None], WIDE_STATE, CONV_WEIGHT, BIAS, activation="silu")


def decode_linear():
    return mmkernels.decode_linear(CHANNELS, WEIGHT, BIAS)


CALLS = {  # each makes the call to time
    "mmkernels.ssd_update": lambda: ssd_update,
    "transformers mamba2_selective_state_update": ssd_update_transformers,
    "mamba_ssm selective_state_update_ref": ssd_update_mamba_ssm,
    "mmkernels.causal_conv1d_update": lambda: causal_conv1d_update,
    "transformers causal_conv1d_update": causal_conv1d_update_transformers,
    "mmkernels.decode_linear": lambda: decode_linear,
    "torch.nn.functional.linear": lambda: lambda: F.linear(CHANNELS, WEIGHT, BIAS),
    "torch.add": lambda: lambda: torch.add(CHANNELS, CHANNELS),
    "torch.empty": lambda: lambda: torch.empty(1, DSTATE),
}


@pytest.mark.parametrize("name", CALLS)
def bench_call(benchmark, name):
    try:
        call = CALLS[name]()
    except Unavailable as why:
        pytest.skip(str(why))
    benchmark.group = "one call at the smallest sizes"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            assert call().isfinite().all()
            benchmark(call)
    finally:
        torch.set_num_threads(threads)
    if benchmark.stats is not None:
        benchmark.extra_info["us"] = round(benchmark.stats.stats.median * 1e6, 2)
