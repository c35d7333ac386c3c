"""The library ops behind the Triton backends, as torch sees them; and why Triton is not to be had, in words."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmkernels import _triton
from mmkernels._dispatch import BackendUnavailable

ROOT = Path(__file__).resolve().parents[2]
DEVICE = "cpu" if _triton.interpreting() else "cuda"
needs_triton = pytest.mark.skipif(_triton.probe() is not None, reason=str(_triton.probe()))


def tensors(*shapes, grad=True):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).to(DEVICE).requires_grad_(grad) for shape in shapes]


def norm_fwd():
    from mmkernels.ops.gated_rms_norm._triton import _fwd

    x, weight, z, bias = tensors((2, 3, 8), (4,), (2, 3, 8), (4,))
    return _fwd, (x, weight, z, bias, 1e-5, 4, True)


def norm_bwd():
    from mmkernels.ops.gated_rms_norm._triton import _bwd

    grad, x, weight, z, rstd = tensors((2, 3, 8), (2, 3, 8), (8,), (2, 3, 8), (2, 3, 1), grad=False)
    return _bwd, (grad, x, weight, z, None, rstd.abs(), 1e-5, 8, False, True)


def conv_fwd():
    from mmkernels.ops.causal_conv1d._triton import _fwd

    x, weight, bias, initial = tensors((2, 5, 3), (3, 3), (3,), (2, 3, 2))
    return _fwd, (x, weight, bias, initial, None, None, True, False, True)


def conv_bwd():
    from mmkernels.ops.causal_conv1d._triton import _bwd

    grad, final, x, weight, initial = tensors((1, 5, 3), (2, 3, 2), (1, 5, 3), (3, 3), (2, 3, 2), grad=False)
    offsets = torch.tensor([0, 2, 5], device=DEVICE)
    return _bwd, (grad, final, x, weight, None, initial, None, offsets, True, True, True)


def conv_update():
    from mmkernels.ops.causal_conv1d._triton import _update

    x, state, weight = tensors((2, 3), (2, 3, 2), (3, 3), grad=False)
    return _update, (x, state, weight, None, None, True)


def attention_inputs():
    q, k, v = tensors((1, 4, 2, 3), (1, 5, 1, 3), (1, 5, 1, 3))
    ends = torch.ones(1, 4, dtype=torch.int32, device=DEVICE)
    return q, k, v, ends * 0, ends * 4, torch.tensor([[0, 1, 2, 4, 5]], dtype=torch.int32, device=DEVICE)


def attention_fwd():
    from mmkernels.ops.mma_attention._triton import _fwd

    return _fwd, (*attention_inputs(), None, 0.5)


def attention_bwd():
    from mmkernels.ops.mma_attention._triton import _bwd

    inputs = [t.detach() for t in attention_inputs()]
    out, lse = tensors((1, 4, 2, 3), (1, 2, 4), grad=False)
    return _bwd, (out * 2, lse * 2, *inputs, out, lse, 0.5)


def ssd_update():
    from mmkernels.ops.ssd._triton_update import _update

    state, x, dt, A, B = tensors((2, 2, 3, 4), (2, 2, 3), (2, 2), (2,), (2, 1, 4), grad=False)
    return _update, (state, x, dt, -A.abs(), B, B, None, None, None, None, True, 0.0, float("inf"))


def scores_fwd():
    from mmkernels.ops.token_pruning._triton import _scores_fwd

    q, k, lse = tensors((2, 1, 2, 3), (2, 4, 2, 3), (2, 2, 1))
    return _scores_fwd, (q, k, lse, 0.5, 1, 2.0)


def prune_fwd():
    from mmkernels.ops.token_pruning._triton import _prune_fwd

    features, scores = tensors((2, 4, 3), (2, 4))
    counts = torch.tensor([2, 3], device=DEVICE)
    return _prune_fwd, (features, scores.detach(), scores > -9, None, counts, 3, 5)


NORM_CONV = [norm_fwd, norm_bwd, conv_fwd, conv_bwd, conv_update]
REST = [attention_fwd, attention_bwd, ssd_update, scores_fwd, prune_fwd]


@needs_triton
@pytest.mark.parametrize("make", NORM_CONV + REST)
def test_opcheck(make):
    op, args = make()
    torch.library.opcheck(op, args)


SCRIPT = """
import os, sys, torch, mmkernels
from mmkernels import _triton
torch.cuda.is_available = lambda: False
x, w = torch.ones(2, 4), torch.ones(4)
assert mmkernels.explain("gated_rms_norm", x, w).chosen in ("native", "torch")
try:
    mmkernels.gated_rms_norm(x, w, backend="triton")
except mmkernels.errors.BackendError as error:
    print(error)
torch.cuda.is_available = lambda: True
_triton.probe.cache_clear()
print(_triton.probe(), _triton.objections(x=x))
"""


@needs_triton
def test_without_a_device_and_without_the_interpreter_it_says_so():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    asked, with_a_device = done.stdout.splitlines()
    assert "there is no CUDA device" in asked
    assert "TRITON_INTERPRET" in asked
    assert with_a_device.startswith("None ['compiled Triton kernels need CUDA tensors")


@needs_triton
def test_the_variable_set_too_late_is_noticed():
    script = (
        "import os, triton; os.environ['TRITON_INTERPRET'] = '1'; from mmkernels import _triton; print(_triton.probe())"
    )
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert "set it before Python starts" in done.stdout, done.stderr


def test_without_triton_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(_triton.importlib.util, "find_spec", lambda name: None)
    _triton.probe.cache_clear()
    try:
        with pytest.raises(BackendUnavailable, match=r"triton is not installed; pip install 'mmkernels\[triton\]'"):
            _triton.require()
    finally:
        monkeypatch.undo()
        _triton.probe.cache_clear()
