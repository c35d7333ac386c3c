"""The Triton backends on a CUDA device against PyTorch, the compiler, and the CUDA packages (`make gpu`).

Sizes of mamba2-2.7b (d_inner 5120, 80 heads of 64, state 128) in bfloat16: a prompt of 8192 tokens, a decode batch of
64, a grid of 27 x 27 in four directions; attention of Phi-3-mini (32 heads of 96), causal, over 4096 tokens; scores of
CLIP ViT-L/14-336, 8 images.
Every contestant is checked against torch in float32 before it is timed; a call ends when the device has finished.
extra_info["bytes"] is what has to be moved at least, for the share of the memory's speed.
"""

import importlib

import pytest
import torch

import mmkernels
from mmkernels._dispatch import registered
from mmkernels.testing import error_of
from mmkernels.testing.cases_causal_conv1d import conv_inputs, states
from mmkernels.testing.cases_gated_rms_norm import norm_inputs
from mmkernels.testing.cases_mma_attention import attention_inputs
from mmkernels.testing.cases_scan2d import CROSS, ssd_2d_inputs
from mmkernels.testing.cases_ssd import ssd_inputs
from mmkernels.testing.cases_token_pruning import score_inputs

DEVICE = "cuda"
DTYPE = torch.bfloat16
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


def _update_inputs(generator):
    made = ssd_inputs(generator, 64, None, 80, 64, 128, skip="head", gate=True, softplus=True, states=64)
    made["state"] = made.pop("initial_states")
    return made


def _conv_update_inputs(generator):
    made = conv_inputs(generator, 64, 1, 5376, 4, activation="silu")
    return {**made, "x": made["x"][:, 0], "conv_state": states(generator, 64, 5376, 3)}


PROBLEMS = {
    "gated_rms_norm": lambda g: norm_inputs(g, (1, 8192, 5120)),
    "causal_conv1d": lambda g: conv_inputs(g, 1, 8192, 5376, 4, activation="silu"),
    "causal_conv1d_update": _conv_update_inputs,
    "ssd_scan": lambda g: ssd_inputs(g, 1, 8192, 80, 64, 128, skip="head", gate=True, softplus=True),
    "ssd_update": _update_inputs,
    "ssd_scan_2d": lambda g: ssd_2d_inputs(g, 1, (27, 27), 80, 64, 1, 128, CROSS),
    "mma_attention": lambda g: attention_inputs(g, 1, 4096, 32, 32, 96),
    "cls_attention_scores": lambda g: score_inputs(g, 8, 577, 16, 64),
    "attention_column_scores": lambda g: score_inputs(g, 8, 577, 16, 64, rows=577),
}
TRAINED = ("gated_rms_norm", "causal_conv1d", "ssd_scan", "mma_attention")
WRITTEN = {"causal_conv1d_update": "conv_state", "ssd_update": "state"}


def _mamba_norm(x, weight, *, z):
    function = importlib.import_module("mamba_ssm.ops.triton.layernorm_gated").rmsnorm_fn
    return lambda: function(x, weight, None, z=z, eps=1e-5, norm_before_gate=False)


def _package_conv(x, weight, bias, *, activation):
    function = importlib.import_module("causal_conv1d").causal_conv1d_fn
    swapped = x.transpose(1, 2)  # channels-last memory, the layout that package is fastest in
    return lambda: function(swapped, weight, bias, activation=activation).transpose(1, 2)


def _package_conv_update(x, conv_state, weight, bias, *, activation):
    function = importlib.import_module("causal_conv1d").causal_conv1d_update
    return lambda: function(x, conv_state, weight, bias, activation)


def _mamba_scan(x, dt, A, B, C, *, D, z, dt_bias, dt_softplus):
    function = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    return lambda: function(x, dt, A, B, C, chunk_size=256, D=D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus)


def _mamba_update(state, x, dt, A, B, C, *, D, z, dt_bias, dt_softplus):
    function = importlib.import_module("mamba_ssm.ops.triton.selective_state_update").selective_state_update
    rows, columns = state.shape[2:]
    wide = {
        "dt": dt[..., None].expand(-1, -1, rows),
        "A": A[:, None, None].expand(-1, rows, columns),
        "D": D[:, None].expand(-1, rows),
        "dt_bias": dt_bias[:, None].expand(-1, rows),
    }
    return lambda: function(
        state, x, wide["dt"], wide["A"], B, C, wide["D"], z=z, dt_bias=wide["dt_bias"], dt_softplus=dt_softplus
    )


def _sdpa(q, k, v):
    function = torch.nn.functional.scaled_dot_product_attention
    swapped = [t.transpose(1, 2) for t in (q, k, v)]
    return lambda: function(*swapped, is_causal=True).transpose(1, 2)


PACKAGES = {
    "gated_rms_norm": _mamba_norm,
    "causal_conv1d": _package_conv,
    "causal_conv1d_update": _package_conv_update,
    "ssd_scan": _mamba_scan,
    "ssd_update": _mamba_update,
    "mma_attention": _sdpa,  # PyTorch's own, which brings FlashAttention-2 and cuDNN's
}


def contestant(op, name, args):
    """A call without arguments, or a skip with the reason."""
    public = getattr(mmkernels, op)
    if name == "package":
        if op not in PACKAGES:
            pytest.skip(f"{op}: there is no package that does it")
        try:
            return PACKAGES[op](**{k: v for k, v in args.items() if v is not None})
        except ImportError as error:
            pytest.skip(f"{op}: {error}")
    if name == "compiled":
        compiled = torch.compile(lambda: public(**args, backend="torch"), fullgraph=True)
        return compiled
    if name not in registered()[op].entries:
        pytest.skip(f"{op} has no {name} backend")
    return lambda: public(**args, backend=name)


def arguments(op, *, grad=False):
    made = PROBLEMS[op](torch.Generator().manual_seed(0))
    args = {}
    for name, value in made.items():
        if isinstance(value, torch.Tensor):
            # Rates, their biases and the skip are float32 in every model, and so is the state of a decode step.
            wide = name in ("A", "D", "dt_bias", "state")
            value = value.to(DEVICE, torch.float32 if wide else DTYPE).requires_grad_(grad)
        args[name] = value
    return args


def check(op, name):
    """Outputs of a first call against torch in float32 from the same rounded inputs."""
    args = arguments(op)
    exact = {k: v.float().clone() if isinstance(v, torch.Tensor) else v for k, v in args.items()}
    truth = getattr(mmkernels, op)(**exact, backend="torch")
    error = error_of(contestant(op, name, args)(), truth)
    assert error < 2**-6, f"{op} by {name} is wrong by {error:.1e}"  # a few roundings to bfloat16 of the largest value
    return error


def finished(call):
    call()
    torch.cuda.synchronize()


def moved(op, args):
    """Bytes of the inputs, of the output, and of what is written in place."""
    sizes = {k: v.numel() * v.element_size() for k, v in args.items() if isinstance(v, torch.Tensor)}
    output = sizes["q"] if op == "mma_attention" else sizes.get("x", 0)  # scores are next to nothing
    output *= len(args.get("scans", ())) or 1  # one for each direction
    return sum(sizes.values()) + output + sizes.get(WRITTEN.get(op, ""), 0)


@pytest.mark.parametrize("name", ["triton", "torch", "compiled", "package"])
@pytest.mark.parametrize("op", PROBLEMS)
def bench_forward(benchmark, op, name):
    error = check(op, name)
    args = arguments(op)
    call = contestant(op, name, args)
    benchmark.group = f"{op}, forward"
    benchmark.extra_info.update(error=error, bytes=moved(op, args))
    with torch.no_grad():
        benchmark.pedantic(finished, (call,), rounds=50, warmup_rounds=5)


@pytest.mark.parametrize("name", ["triton", "torch", "compiled", "package"])
@pytest.mark.parametrize("op", TRAINED)
def bench_forward_backward(benchmark, op, name):
    error = check(op, name)
    args = arguments(op, grad=True)
    call = contestant(op, name, args)
    leaves = [v for v in args.values() if isinstance(v, torch.Tensor)]
    direction = torch.randn_like(args["q" if op == "mma_attention" else "x"])
    benchmark.group = f"{op}, forward and backward"
    benchmark.extra_info.update(error=error)
    benchmark.pedantic(finished, (lambda: torch.autograd.grad(call(), leaves, direction),), rounds=20, warmup_rounds=5)
