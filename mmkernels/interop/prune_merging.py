"""Run a vision tower whose blocks merge tokens between attention and MLP (ToMe, arXiv 2210.09461)."""

from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.errors import BackendError
from mmkernels.interop.prune_mlp import activations_in_place
from mmkernels.interop.prune_tower import Tower, TowerDone
from mmkernels.pruning.pruner import Encoder, Pruned
from mmkernels.pruning.tome import ToMe

_PARTS = ("layer_norm1", "self_attn", "layer_norm2", "mlp")


def check_blocks(tower: Tower) -> None:
    """Refuse towers whose blocks are not x + attention(norm(x)), then x + mlp(norm(x)), named as in CLIP."""
    if not all(hasattr(layer, part) for layer in tower.layers for part in _PARTS):
        raise BackendError(
            f"prune: tome must have a tower with the blocks of CLIP or SigLIP; got {type(tower.module).__name__}. "
            "Use tome_after, which merges behind the tower."
        )


def run_merging(
    tower: Tower, inputs: Tensor, pruner: ToMe, encoder: Encoder, *, end: bool = False
) -> tuple[Tensor, Pruned]:
    """Encode images while tokens are merged away.

    Args:
        tower: a tower that `check_blocks` lets pass.
        inputs: what it takes.
        pruner: says how many tokens to merge in each layer, and which.
        encoder: its facts; layers behind `feature_layer` do not run.
        end: put the tower's final norm behind them.

    Returns:
        prefix: (images, num_prefix, dim), never merged.
        pruned: the patches that are left.
    """
    x, sizes, places = _embedded(tower, inputs), None, None
    for layer, r in enumerate(pruner.schedule(encoder)):
        x, keys = _attend(tower, layer, x, None if sizes is None else pruner.attention_bias(sizes, x.dtype))
        if r:
            x, sizes, places = pruner.merge(x, keys, sizes, places, r=r, num_prefix=tower.num_prefix)
        block: Any = tower.layers[layer]
        with activations_in_place([block]):
            x = x + block.mlp(block.layer_norm2(x))
    if end:
        x = tower.module.post_layernorm(x)
    if sizes is None or places is None:  # nothing was merged
        sizes = torch.ones(x.shape[:2], device=x.device)
        places = (torch.arange(x.shape[1], device=x.device) - tower.num_prefix).clamp(min=-1).expand(x.shape[:2])
    return x[:, : tower.num_prefix], pruner.finish(x, sizes, places, num_prefix=tower.num_prefix)


def _attend(tower: Tower, layer: int, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The sum of x and its attention, and the layer's keys, (images, seqlen, heads, headdim)."""
    at, seen = tower.projections[layer], []
    handle = at.key.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        block: Any = tower.layers[layer]
        out = block.self_attn(hidden_states=block.layer_norm1(x), attention_mask=bias)
    finally:
        handle.remove()
    _, keys = at.split(seen[0], seen[0])
    return x + (out[0] if isinstance(out, tuple) else out), keys


def _embedded(tower: Tower, inputs: Tensor) -> Tensor:
    """What enters the first layer."""
    seen: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])
        raise TowerDone

    handle = tower.layers[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        tower.module(inputs)
    except TowerDone:
        pass
    finally:
        handle.remove()
    return seen[0]
