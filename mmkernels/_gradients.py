"""Gradients of native ops: the first by hand in C++, gradients of gradients by differentiating the torch backend.

A native op is three library ops: `<op>` (inference), `<op>_fwd` (also returns what the backward needs) and `<op>_bwd`.
Autograd of `<op>_fwd` calls `<op>_bwd`; autograd of `<op>_bwd` is `second_order` on the public function with
backend="torch", which is computed only when somebody differentiates a gradient.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad


def untracked_transform(**_: object) -> list[str]:
    """Why a native op declines: a transformation is active that its registered backward knows nothing of.

    Without this, forward-mode tangents would be dropped without a word.  Give it to `Backend(..., declines=...)`.
    """
    if torch._C._are_functorch_transforms_active():
        return ["torch.func transforms (grad, vmap, jvp) see through traceable backends only"]
    if forward_ad._current_level >= 0:
        return ["forward-mode gradients exist in traceable backends only"]
    return []


def no_gradient_in_place(**args: object) -> list[str]:
    """Why a native op that writes its state in place declines: somebody wants a gradient, which it does not have."""
    if torch.is_grad_enabled():
        for name, value in args.items():
            if isinstance(value, Tensor) and value.requires_grad:
                return [f"{name} requires a gradient; the in-place update has one in traceable backends only"]
    return untracked_transform()


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd is on and some tensor needs it: then call `<op>_fwd`, else the cheaper `<op>`."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def second_order(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    grad_outputs: Sequence[Tensor | None],
    cotangents: Sequence[Tensor | None],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Differentiate a backward pass by recomputing the forward with differentiable operations.

    The backward pass is g(grad_outputs, inputs) = d<function(inputs), grad_outputs> / d inputs; returned are the
    gradients of <g, cotangents>.  They can be differentiated again when gradients are enabled around the call.

    Args:
        function: of one positional argument per input (None included), differentiable twice by autograd.
        inputs: of the forward pass.
        grad_outputs: given to the backward pass, one per output of `function`; None counts as zero.
        cotangents: one per input: the incoming gradient of that input's gradient, or None.

    Returns:
        Gradients in each of grad_outputs, and in each of inputs; None where there is no dependence.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        leaves = [_differentiable(t) for t in inputs]
        seeds = [_differentiable(t) for t in grad_outputs]
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        used = [(out, seed) for out, seed in zip(outputs, seeds, strict=True) if seed is not None]
        asked = [(t, c) for t, c in zip(leaves, cotangents, strict=True) if t is not None and c is not None]
        if not used or not asked:
            return [None] * len(seeds), [None] * len(leaves)
        first = torch.autograd.grad(
            [out for out, _ in used], [t for t, _ in asked], [s for _, s in used], create_graph=True, allow_unused=True
        )
        pairs = [(g, c) for g, (_, c) in zip(first, asked, strict=True) if g is not None]
        given = [t for t in (*seeds, *leaves) if t is not None]
        second = iter(
            torch.autograd.grad(
                [g for g, _ in pairs], given, [c for _, c in pairs], create_graph=again, allow_unused=True
            )
            if pairs
            else [None] * len(given)
        )
    return [None if t is None else next(second) for t in seeds], [None if t is None else next(second) for t in leaves]


def _differentiable(tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    # A view, so that partial derivatives stop here although grad_outputs may themselves depend on the inputs, while
    # third derivatives still reach what the tensor came from.
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()
