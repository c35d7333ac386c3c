"""run_on_mmkernels: transformers' Mamba-2 models (Mamba2, Bamba, Falcon-H1, Zamba2, Nemotron-H, Granite) on our ops.

Their modelling files call five functions by name: convolution and scan, whole and by the token.  Where mamba-ssm and
causal-conv1d are not installed, on every CPU, those are plain torch.  Here they are exchanged for ours, and back.
"""

import inspect
import sys
from collections.abc import Callable
from types import ModuleType, TracebackType
from typing import Any, cast

from torch import Tensor, nn

from mmkernels.errors import ConfigError
from mmkernels.interop import causal_conv1d, mamba_ssm
from mmkernels.ops.causal_conv1d.api import causal_conv1d as convolve


def _convolution(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    # The package's function knows no cu_seqlens; without them packed sequences would run into each other.
    x = hidden_states.transpose(1, 2)
    if cu_seqlens is not None:
        seq_idx = None
    y = convolve(x, weight, bias, activation=activation, seq_idx=seq_idx, cu_seqlens=cu_seqlens)
    return cast(Tensor, y).transpose(1, 2)


OURS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": _convolution,
    "causal_conv1d_update": causal_conv1d.causal_conv1d_update,
    "mamba2_chunk_scan": mamba_ssm.mamba_chunk_scan_combined,
    "mamba2_selective_state_update": mamba_ssm.selective_state_update,
    "mamba2_split_conv1d_scan_combined": mamba_ssm.mamba_split_conv1d_scan_combined,
}


class RunOnMMKernels:
    """The exchange, until `undo()` or the end of a `with` block."""

    def __init__(self, modules: list[ModuleType]):
        self.modules = modules
        self._theirs = {(module, name): getattr(module, name) for module in modules for name in OURS}
        for module, name in self._theirs:
            setattr(module, name, _taking_known_arguments(OURS[name]))

    def undo(self) -> None:
        """Put transformers' own functions back."""
        for (module, name), function in self._theirs.items():
            setattr(module, name, function)

    def __enter__(self) -> "RunOnMMKernels":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def run_on_mmkernels(model: nn.Module) -> RunOnMMKernels:
    """Run the Mamba-2 layers of a transformers model on this library's kernels.

    It exchanges functions of the modelling file, so every model of the same family in this process is affected.
    Weights, caches, `generate`, training and the projections stay as they are; packed batches (`seq_idx`), which raise
    without mamba-ssm, work.

    Args:
        model: a transformers model with Mamba-2 layers.

    Returns:
        A handle: `undo()`, or a `with` block, restores transformers' own functions.

    Raises:
        ConfigError: the model has no Mamba-2 layer of transformers.

    Example:
        >>> from transformers import Mamba2Config, Mamba2ForCausalLM
        >>> sizes = dict(hidden_size=32, num_heads=4, head_dim=16, state_size=8, n_groups=1, num_hidden_layers=1)
        >>> model = Mamba2ForCausalLM(Mamba2Config(vocab_size=50, **sizes))
        >>> with run_on_mmkernels(model):
        ...     out = model.generate(do_sample=False, max_new_tokens=2, eos_token_id=None)
    """
    names = dict.fromkeys(type(layer).__module__ for layer in model.modules())
    modules = [sys.modules[name] for name in names if name.startswith("transformers.")]
    modules = [module for module in modules if all(hasattr(module, function) for function in OURS)]
    if not modules:
        raise ConfigError(
            f"run_on_mmkernels: model must have Mamba-2 layers of transformers; got {type(model).__name__}. "
            "Models of mmkernels.models run on our kernels without it."
        )
    return RunOnMMKernels(modules)


def _taking_known_arguments(function: Callable[..., Any]) -> Callable[..., Any]:
    # A mixer passes on every keyword its model's forward was given.
    known = tuple(inspect.signature(function).parameters)

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **{name: value for name, value in kwargs.items() if name in known})

    return call
