"""One token through all Mamba-2 blocks of a model in one native call.

Python spends about 50 us between two blocks, which at the smaller official sizes is a tenth of a token.  What is bound
is looked over at every call: a replaced module or weight, a hook or a forced backend counts from the next token on.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmkernels.layers.mamba2 import Mamba2Block, Mamba2Mixer, is_hooked
from mmkernels.ops.mamba2_step.api import MAMBA2_STEP


class StackStep:
    """Keeps a row of blocks bound to one call; copies and pickles of it are unbound.

    Example:
        >>> import torch
        >>> from mmkernels.layers import Mamba2Block
        >>> blocks = torch.nn.ModuleList(Mamba2Block(128) for _ in range(2))
        >>> states = zip(*(block.mixer.init_states(1) for block in blocks))
        >>> with torch.no_grad():
        ...     taken = StackStep()(blocks, torch.randn(1, 128), *map(list, states))
        >>> taken is None or taken[0].shape
        torch.Size([1, 128])
    """

    def __init__(self) -> None:
        self._blocks: list[nn.Module] = []
        self._parts: list[nn.Module] = []  # modules that a hook on would object
        self._held: list[tuple[dict[str, Any], str, Any]] = []  # where each module and parameter was found
        self._first: dict[str, Any] = {}
        self._kinds: Any = None
        self._call: Any = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return StackStep, ()

    def __call__(
        self, blocks: nn.ModuleList, hidden: Tensor, conv_states: Sequence[Tensor], ssm_states: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor] | None:
        """Take one token per row through the blocks, both states of each updated IN PLACE.

        Args:
            blocks: `Mamba2Block`s.
            hidden: (batch, d_model).
            conv_states: of each block, as `Mamba2Block.step` takes them.
            ssm_states: of each block.

        Returns:
            (hidden, residual) after the last block, the same bits as block by block; None, and nothing done, where a
            block objects to one call or another backend than the native one is to run it.
        """
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return None
        kinds: list[Any] = [(hidden.dtype, hidden.device)]
        kinds += [(s.dtype, s.stride(-1)) for s in ssm_states] + [(s.dtype, s.ndim) for s in conv_states]
        if self._call is None or kinds != self._kinds or not self._holds(blocks):
            self._call, self._kinds = self._bind(blocks, hidden, conv_states, ssm_states), kinds
        if self._call is None:
            return None
        # A forced backend (`use_backend`, the environment) may have come or gone since.
        first = {**self._first, "hidden": hidden, "conv_state": conv_states[0], "ssm_state": ssm_states[0]}
        if MAMBA2_STEP.resolve(None, first) is not MAMBA2_STEP.entries["native"].impl:
            return None
        return cast(tuple[Tensor, Tensor], self._call(hidden, None, conv_states, ssm_states))

    def _holds(self, blocks: nn.ModuleList) -> bool:
        """Whether the modules and parameters are those that were bound, and none has a hook."""
        if len(blocks) != len(self._blocks) or any(a is not b for a, b in zip(blocks, self._blocks, strict=True)):
            return False
        return all(found.get(name) is value for found, name, value in self._held) and not any(
            map(is_hooked, self._parts)
        )

    def _bind(
        self, blocks: nn.ModuleList, hidden: Tensor, conv_states: Sequence[Tensor], ssm_states: Sequence[Tensor]
    ) -> Any:
        """The call, or None if a block objects; from then on `_holds` says whether that is still so."""
        self._blocks, self._parts, self._held = list(blocks), [], []
        for module in (m for block in blocks for m in block.modules()):
            self._parts.append(module)
            for found in (module._modules, module._parameters):
                self._held += [(cast(dict[str, Any], found), name, value) for name, value in found.items()]
        if any(map(is_hooked, self._parts)):
            return None
        bound = []
        for block, conv_state, ssm_state in zip(blocks, conv_states, ssm_states, strict=True):
            if type(block) is not Mamba2Block or block.objections_to_one_call(hidden):
                return None
            mixer = cast(Mamba2Mixer, block.mixer)
            if mixer.D.shape[0] != mixer.nheads:
                return None  # its arguments hold a view, which would not follow the parameter to another dtype
            options = {
                **mixer.step_arguments(),
                "norm_weight": block.norm.weight,
                "eps": block.norm.eps,
                "residual_in_fp32": block.residual_in_fp32,
            }
            args = {**options, "hidden": hidden, "conv_state": conv_state, "ssm_state": ssm_state, "residual": None}
            if MAMBA2_STEP.resolve(None, args) is not MAMBA2_STEP.entries["native"].impl:
                return None
            bound.append(options)
        self._first = {**bound[0], "residual": None}
        from mmkernels.ops.mamba2_step._native import Steps

        return Steps(bound)
