"""Backend "triton" of causal_conv1d and its update: allocation and launches; see _triton_kernels.py and _state.py."""

import torch
from torch import Tensor

from mmkernels import _triton
from mmkernels._gradients import wants_gradient
from mmkernels.ops.causal_conv1d import _autograd

_triton.require()
from mmkernels import _triton_math  # noqa: E402  (needs triton, which is known to be there only now)
from mmkernels.ops.causal_conv1d import _triton_kernels as kernels  # noqa: E402
from mmkernels.ops.causal_conv1d import _triton_kernels_state as state_kernels  # noqa: E402

_PROGRAMS = 1024  # of the backward: some for every processor of the largest GPUs, each with its share of sums


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    return_final_states: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """See mmkernels.causal_conv1d."""
    if initial_states is not None and initial_states.dtype != x.dtype:
        initial_states = initial_states.to(x.dtype)  # states are raw inputs; autograd converts the gradient back
    op = _fwd if wants_gradient(x, weight, bias, initial_states) else _inference
    silu = activation == "silu"
    y, final = op(x, weight, bias, initial_states, seq_idx, cu_seqlens, silu, reverse, return_final_states)
    return (y, final) if return_final_states else y


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    state_indices: Tensor | None,
) -> Tensor:
    """See mmkernels.causal_conv1d_update."""
    return _update(x, conv_state, weight, bias, state_indices, activation == "silu")


class Call:
    """What every kernel of one call is told about its tensors, in the order in which it expects it.

    With an order (directions, seqlen), dense, x has an axis of directions after that of the batch, weight and bias one
    in front of the others, and there are no states, ids and packed sequences.
    """

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        initial: Tensor | None,
        ids: Tensor | None,
        cu_seqlens: Tensor | None,
        order: Tensor | None = None,
    ):
        self.batch, self.seqlen, self.dim = x.shape[0], *x.shape[-2:]
        self.directions = 1 if order is None else order.shape[0]
        self.width = weight.shape[-1]
        self.bias = None if bias is None else bias.contiguous()
        # States of width 1 hold nothing, and an empty tensor has no address.
        self.initial = initial if initial is not None and initial.shape[2] > 0 else None
        self.x, self.weight, self.ids, self.cu_seqlens, self.order = x, weight, ids, cu_seqlens, order
        self.sequences = self.batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.acc = _triton.accumulator(x.dtype)
        self.architecture = _triton.architecture(x.device)
        self.i_strides = (0, 0, 0) if self.initial is None else self.initial.stride()
        self.ids_strides = (0, 0) if ids is None else ids.stride()
        self.w_strides = weight.stride() if order is not None else (0, *weight.stride())

    def strides(self, t: Tensor) -> tuple[int, ...]:
        """Of batch, directions, tokens and channels of x or a gradient."""
        batch, *others = t.stride()
        return (batch, *others) if self.order is not None else (batch, 0, *others)

    def tiles(self, config: _triton.Config) -> tuple[int, int]:
        """Tiles of tokens of one direction, and slices of channels."""
        blocks = -(-self.seqlen // config.blocks["TOKENS"])
        return self.batch * blocks, -(-self.dim // config.blocks["CHANNELS"])

    def forward(self, y: Tensor, silu: bool, reverse: bool, grad_y: Tensor | None = None) -> None:
        """Write y; or, given its gradient, that of the sums before silu."""
        config = kernels.config(self.architecture, self.seqlen, self.dim)
        tiles, slices = self.tiles(config)
        _triton.launch(
            kernels.forward_kernel,
            (tiles * self.directions * slices,),
            config,
            self.x,
            self.weight,
            self.bias,
            self.initial,
            self.ids,
            self.cu_seqlens,
            self.order,
            grad_y,
            y,
            self.seqlen,
            self.dim,
            self.sequences,
            self.sequences.bit_length(),
            self.directions,
            *self.strides(self.x),
            *self.w_strides,
            *self.i_strides,
            *self.ids_strides,
            *((0, 0, 0, 0) if grad_y is None else self.strides(grad_y)),
            SILU=silu,
            REVERSE=reverse,
            ACC=_triton_math.dtype(self.acc),
            WIDTH=self.width,
        )

    def final_states(self, reverse: bool) -> Tensor:
        final = self.x.new_empty((self.sequences, self.dim, self.width - 1))
        if self.width == 1:
            return final
        config = state_kernels.config(self.dim, self.width - 1)
        _triton.launch(
            state_kernels.final_states_kernel,
            (self.sequences * -(-self.dim // config.blocks["CHANNELS"]),),
            config,
            self.x,
            self.initial,
            self.ids,
            self.cu_seqlens,
            final,
            self.seqlen,
            self.dim,
            *self.x.stride(),
            *self.i_strides,
            *self.ids_strides,
            REVERSE=reverse,
            HISTORY=self.width - 1,
        )
        return final

    def backward(
        self, grad: Tensor, grad_final: Tensor | None, silu: bool, reverse: bool, parameters: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of x, weight and bias, `grad` as backward_kernel wants it."""
        config = kernels.config(self.architecture, self.seqlen, self.dim, tight=self.order is not None)
        tiles, slices = self.tiles(config)
        strips = min(tiles, max(1, _PROGRAMS // max(1, slices * self.directions)))
        grad_x = torch.empty_like(self.x, memory_format=torch.contiguous_format)
        of_weight = self.x.new_empty((strips, *self.weight.shape), dtype=self.acc) if parameters else None
        of_bias = None
        if parameters and self.bias is not None:
            of_bias = self.x.new_empty((strips, *self.bias.shape), dtype=self.acc)
        _triton.launch(
            kernels.backward_kernel,
            (strips * self.directions * slices,),
            config,
            grad,
            grad_final,
            self.x,
            self.weight,
            self.bias,
            self.initial,
            self.ids,
            self.cu_seqlens,
            self.order,
            grad_x,
            of_weight,
            of_bias,
            self.seqlen,
            self.dim,
            self.sequences,
            self.sequences.bit_length(),
            tiles,
            strips,
            self.directions,
            *self.strides(self.x),
            *self.w_strides,
            *self.i_strides,
            *self.ids_strides,
            *self.strides(grad),
            *((0, 0, 0) if grad_final is None else grad_final.stride()),
            SILU=silu,
            REVERSE=reverse,
            ACC=_triton_math.dtype(self.acc),
            WIDTH=self.width,
            TAPS=_triton.bucket(self.width),
        )
        of_weight = _triton_math.column_sums(of_weight, self.weight)
        return grad_x, of_weight, _triton_math.column_sums(of_bias, self.weight if self.bias is None else self.bias)

    def before_silu(self, grad_y: Tensor, silu: bool, reverse: bool) -> tuple[Tensor, bool]:
        """`grad` and `silu` for the backward kernels: wide filters store the gradient of the sums first."""
        if not silu or self.width <= kernels.WIDEST_RECOMPUTED:
            return grad_y, silu
        grad = torch.empty(self.x.shape, dtype=self.acc, device=self.x.device)
        self.forward(grad, silu, reverse, grad_y)
        return grad, False

    def initial_gradient(self, grad: Tensor, grad_final: Tensor | None, silu: bool, reverse: bool) -> Tensor:
        assert self.initial is not None
        out = self.x.new_empty(self.initial.shape)
        config = state_kernels.config(self.dim, self.width - 1)
        _triton.launch(
            state_kernels.initial_gradient_kernel,
            (self.sequences * -(-self.dim // config.blocks["CHANNELS"]),),
            config,
            grad,
            grad_final,
            self.x,
            self.weight,
            self.bias,
            self.initial,
            self.ids,
            self.cu_seqlens,
            out,
            self.seqlen,
            self.dim,
            *self.x.stride(),
            *self.weight.stride(),
            *self.i_strides,
            *self.ids_strides,
            *grad.stride(),
            *((0, 0, 0) if grad_final is None else grad_final.stride()),
            SILU=silu,
            REVERSE=reverse,
            ACC=_triton_math.dtype(self.acc),
            WIDTH=self.width,
        )
        return out


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial: Tensor | None,
    ids: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    reverse: bool,
    final: bool,
) -> tuple[Tensor, Tensor]:
    call = Call(x, weight, bias, initial, ids, cu_seqlens)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    call.forward(y, silu, reverse)
    return y, call.final_states(reverse) if final else x.new_empty((0,))


def _backward(
    grad_y: Tensor,
    grad_final: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial: Tensor | None,
    ids: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    reverse: bool,
    parameters: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = Call(x, weight, bias, initial, ids, cu_seqlens)
    grad_final = grad_final if grad_final is not None and call.width > 1 else None
    grad, silu = call.before_silu(grad_y, silu, reverse)
    grad_x, of_weight, of_bias = call.backward(grad, grad_final, silu, reverse, parameters)
    of_initial = x.new_empty((0,) if initial is None else initial.shape)
    if call.initial is not None:
        of_initial = call.initial_gradient(grad, grad_final, silu, reverse)
    return grad_x, of_weight, of_bias, of_initial


def _step(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, indices: Tensor | None, silu: bool
) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    batch, dim, tokens = x.shape[0], x.shape[-1], x.shape[1] if x.dim() == 3 else 1
    config = state_kernels.config(dim, conv_state.shape[2])
    _triton.launch(
        state_kernels.update_kernel,
        (batch * -(-dim // config.blocks["CHANNELS"]),),
        config,
        x,
        conv_state,
        weight,
        None if bias is None else bias.contiguous(),
        None if indices is None else indices.contiguous(),
        y,
        tokens,
        dim,
        *conv_state.shape[::2],
        x.stride(0),
        x.stride(1) if x.dim() == 3 else 0,
        x.stride(-1),
        *conv_state.stride(),
        *weight.stride(),
        SILU=silu,
        ACC=_triton_math.dtype(_triton.accumulator(x.dtype)),
        WIDTH=weight.shape[1],
    )
    return y


_INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor? initial_states, Tensor? seq_idx, Tensor? cu_seqlens"
_FORWARD = f"({_INPUTS}, bool silu, bool reverse, bool return_final_states) -> (Tensor, Tensor)"
_inference = _triton.define("causal_conv1d", _FORWARD, _forward)
_fwd = _triton.define("causal_conv1d_fwd", _FORWARD, _forward)
_bwd = _triton.define(
    "causal_conv1d_bwd",
    f"(Tensor grad_y, Tensor? grad_final, {_INPUTS}, bool silu, bool reverse, bool parameter_gradients)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
)
_update = _triton.define(
    "causal_conv1d_update",
    "(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, Tensor? state_indices, bool silu) -> Tensor",
    _step,
)
_autograd.register(_inference, _fwd, _bwd, _update)
