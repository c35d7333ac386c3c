"""Decoding one token after a long context: latency and cache size, every model served alike.

A published 20x for the linear model compares a CUDA-graph loop with an eager one that concatenates its cache.  Here the
teacher has a preallocated static cache, the same threads and the same loop as the linear models.
"""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def _cache_tensors(cache: Any) -> list[Tensor]:
    """Every tensor a cache holds, whatever kind of layer it belongs to."""
    found: list[Tensor] = []

    def collect(value: Any) -> None:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, dict):
            for item in value.values():
                collect(item)
        elif isinstance(value, list | tuple):
            for item in value:
                collect(item)

    for layer in cache.layers:
        for value in vars(layer).values():
            collect(value)
    return found


def cache_bytes(cache: Any) -> int:
    """Bytes of every tensor in the cache, shared storage counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _cache_tensors(cache)}
    return sum(storages.values())


@torch.no_grad()
def prepared_cache(model: Any, context: int, room: int, *, seed: int = 0) -> Any:
    """A static cache that holds `context` tokens of noise and has room for `room` more."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=context + room)
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    model(input_ids=token, past_key_values=cache, use_cache=True)  # allocates every layer
    generator = torch.Generator().manual_seed(seed)
    for layer in cache.layers:
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length.fill_(context)  # type: ignore[union-attr]
    for tensor in _cache_tensors(cache):
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float32))
    return cache


@torch.no_grad()
def decode_series(
    models: dict[str, Any], contexts: Sequence[int], *, repeats: int = 15, warmup: int = 3
) -> dict[str, Any]:
    """Median milliseconds of a one-token step and the cache's bytes, for each model and context length.

    The models take turns step by step, so that a busy moment of the machine hits all of them.

    Args:
        models: name -> causal model of transformers' interface.
        contexts: tokens already in the cache.
        repeats: timed steps of each model at each context.
        warmup: steps not counted.

    Returns:
        {"contexts": [...], "threads": n, "repeats": n, "models": {name: {"milliseconds": [...], "cache_bytes":
        [...]}}}.
    """
    series: dict[str, dict[str, list[float]]] = {name: {"milliseconds": [], "cache_bytes": []} for name in models}
    for context in contexts:
        caches = {name: prepared_cache(model, context, warmup + repeats + 1) for name, model in models.items()}
        times: dict[str, list[float]] = {name: [] for name in models}
        for step in range(warmup + repeats):
            for name, model in models.items():
                token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
                position = torch.full((1, 1), context + step, dtype=torch.long, device=model.device)
                started = time.perf_counter()
                model(input_ids=token, position_ids=position, past_key_values=caches[name], use_cache=True)
                times[name].append(time.perf_counter() - started)
        for name in models:
            series[name]["milliseconds"].append(1e3 * statistics.median(times[name][warmup:]))
            series[name]["cache_bytes"].append(cache_bytes(caches[name]))
    return {"contexts": list(contexts), "threads": torch.get_num_threads(), "repeats": repeats, "models": series}
