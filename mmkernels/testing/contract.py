"""The error bar of one case on one backend: what tests/ops/test_contract.py runs for every op, on any device."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmkernels.testing.cases import Case, on_device
from mmkernels.testing.poison import poisoned_allocations
from mmkernels.testing.tolerance import assert_within

PEER = {"native": "torch", "triton": "torch", "torch": "reference"}


def differentiable(case: Case, args: Mapping[str, Any]) -> dict[str, Tensor]:
    """The arguments that have gradients: floating tensors that the op does not write."""
    return {k: v for k, v in args.items() if isinstance(v, Tensor) and v.is_floating_point() and k not in case.mutates}


def forward_backward(
    case: Case, backend: str, dtype: torch.dtype, values: Mapping[str, Any], device: str = "cpu"
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Outputs and gradients, on the CPU, of one run in `dtype` on `device` from the same float64 values.

    The loss is a fixed random direction, the same for every backend and dtype.  An op that writes its state in place
    has no gradients of its own: the scan it belongs to has them.
    """
    args = {
        k: v.to(device, dtype if v.is_floating_point() else None) if isinstance(v, Tensor) else on_device(v, device)
        for k, v in values.items()
    }
    if case.mutates:
        return tuple(out.cpu() for out in case.run(args, backend)), {}
    for value in differentiable(case, args).values():
        value.requires_grad_()
    outputs = case.run(args, backend)
    used = [(o, c.to(device)) for o, c in zip(outputs, _directions(outputs), strict=True) if o.requires_grad]
    wide = torch.promote_types(dtype, torch.float32)
    wanted = differentiable(case, args)
    # No dependence and a gradient of zeros are the same answer.
    grads: tuple[Tensor, ...] = ()
    if used:
        loss = torch.stack([(o * c.to(o.dtype)).sum(dtype=wide) for o, c in used]).sum()
        grads = torch.autograd.grad(loss, list(wanted.values()), materialize_grads=True)
    return tuple(out.cpu() for out in outputs), {n: g.cpu() for n, g in zip(wanted, grads, strict=False)}


def _directions(outputs: Sequence[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(out.shape, generator=generator, dtype=torch.float64) for out in outputs]


def check_error_bar(case: Case, backend: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """Fail unless outputs and gradients keep within the bar of tolerance.py; uninitialised memory is NaN.

    The truth is `reference` in float64 on the CPU, the peer (PEER) runs in `dtype` on the same device.
    """
    # Inputs are rounded to dtype first, so that only the arithmetic is judged.
    rounded = case.args(dtype)
    values = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in rounded.items()}
    truth_out, truth_grad = forward_backward(case, "reference", torch.float64, values)
    peer_out, peer_grad = forward_backward(case, PEER[backend], dtype, values, device)
    with poisoned_allocations():
        outputs, grads = forward_backward(case, backend, dtype, values, device)
    for i, (out, truth, peer) in enumerate(zip(outputs, truth_out, peer_out, strict=True)):
        assert_within(f"output {i}", out, truth, peer, dtype=dtype, summands=case.summands)
    if set(grads) != set(truth_grad):
        raise AssertionError(f"gradients of {sorted(grads)} where those of {sorted(truth_grad)} exist")
    for name, grad in grads.items():
        if grad.dtype != dtype:
            raise AssertionError(f"the gradient of {name} is {grad.dtype}; it must be {dtype}")
        assert_within(f"grad of {name}", grad, truth_grad[name], peer_grad[name], dtype=dtype, summands=case.summands)
