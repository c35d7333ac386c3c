"""Run the activations of a tower's MLPs in place, part by part, while nobody can tell the difference.

What the first projection of a ViT's MLP makes is the widest tensor of the tower, and an activation written in several
operations (CLIP's x sigmoid(1.702 x)) holds up to three more of that size at a time: most of the tower's peak memory.
"""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# Numbers that go through an activation at a time: their temporaries stay in the cache.  A multiple of every vector
# width, so that a number is computed by the same instructions as in one go.
_PART = 1 << 17
# Activations that look at one number at a time, by the names transformers and torch give them.
_ELEMENTWISE = {
    *("GELU", "ReLU", "SiLU", "GELUActivation", "GELUTanh", "SiLUActivation"),
    *("QuickGELUActivation", "NewGELUActivation", "FastGELUActivation"),
}


@contextmanager
def activations_in_place(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Within, what a layer's `fc1` makes is overwritten by its activation: on CPU, in this thread, without gradients.

    Found by the names of CLIP, SigLIP, ViT and DINOv2 (`fc1`, `activation_fn`); other layers run as they are, and so do
    modules that somebody watches with hooks, who would see parts, or numbers that change under them.

    Numerics: the same function of the same numbers, so no bit changes.  (torch computes the ends of what each thread
        gets by other instructions; where the number of threads cuts the tensor within a vector, a power of two seldom
        does, the last bit of some activations may differ, as it does between two numbers of threads.)
    Cost: no memory of the size of the MLP but `fc1`'s own output.
    """
    handles = [handle for act in _activations(layers) for handle in _hooked(act, threading.get_ident())]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _activations(layers: Iterable[nn.Module]) -> list[nn.Module]:
    """Activations behind a linear `fc1`, each once."""
    found: dict[int, nn.Module] = {}
    for layer in layers:
        for part in layer.modules():
            fc1: Any = getattr(part, "fc1", None)
            act: Any = getattr(part, "activation_fn", None)
            fits = isinstance(act, nn.Module) and type(act).__name__ in _ELEMENTWISE and type(fc1) is nn.Linear
            if fits and not (_watched(fc1) or _watched(act)):
                found[id(act)] = act
    return list(found.values())


def _watched(module: Any) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _is_ours(x: Tensor) -> bool:
    """Whether a tensor is worth it, and neither autograd nor a cast to another type wants it whole.

    On accelerators a pass of small kernels would cost more than the memory is worth: there nothing changes.
    """
    plain = x.device.type == "cpu" and x.is_contiguous() and x.numel() > _PART
    return plain and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def _hooked(act: nn.Module, thread: int) -> Iterator[Any]:
    """Two hooks: one does the work and leaves the module nothing to do, the other hands on what was overwritten."""
    wide: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> Any:
        x = args[0]
        if threading.get_ident() != thread or not _is_ours(x):
            return None
        flat = x.view(-1)
        for part in flat.split(_PART):
            part.copy_(module.forward(part))
        wide.append(x)
        return (flat[:0],)

    def after(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Any:
        return wide.pop() if wide and threading.get_ident() == thread else None

    yield act.register_forward_pre_hook(before)
    yield act.register_forward_hook(after)
