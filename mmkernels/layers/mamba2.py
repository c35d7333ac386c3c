"""The Mamba-2 mixer and its residual block: Dao and Gu, "Transformers are SSMs" (arXiv 2405.21060), section 7.

Parameter names, shapes and initial values are those of the official state-spaces/mamba2-* checkpoints.
"""

import math
from types import NoneType
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmkernels.layers import _mixing
from mmkernels.layers.norm import GatedRMSNorm
from mmkernels.ops.causal_conv1d.api import causal_conv1d_update
from mmkernels.ops.mamba2_step.api import mamba2_step
from mmkernels.ops.ssd.api import ssd_update

Output = Tensor | tuple[Tensor, Tensor, Tensor]


def is_hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward."""
    # Libraries that move weights around replace `forward` on the instance.
    return bool(module._forward_hooks or module._forward_pre_hooks) or "forward" in module.__dict__


class Mamba2Mixer(nn.Module):
    """Mix tokens in linear time: projection, short convolution, state-space scan, gated norm, projection.

    [z | xBC | dt] = W_in u;  [x | B | C] = silu(conv(xBC));
    dt^ = clamp(softplus(dt + dt_bias));  S_t = exp(-exp(A_log) dt^) S_{t-1} + dt^ x_t B_t^T;  y_t = S_t C_t + D x_t;
    out = W_out norm(y * silu(z))        (arXiv 2405.21060, section 7.1 and figure 6)

    Args:
        d_model: channels of u and of the output.
        d_state: dstate, columns of the recurrent state of a head.
        d_conv: taps of the convolution.
        expand: d_inner = expand * d_model.
        headdim: channels of a head; divides d_inner.
        ngroups: groups of heads that share B and C; divides the number of heads.
        chunk_size: tokens per chunk of the scan; a matter of speed only.
        dt_limit: smallest and largest step size.
        norm_before_gate: norm(y) * silu(z) instead of norm(y * silu(z)).
        conv_bias: whether the convolution has a bias.
        bias: whether the two projections have one.
        dt_min: lower end of the initial step sizes, drawn log-uniformly.
        dt_max: upper end.
        dt_init_floor: smallest initial step size.
        A_init_range: initial decay rates are drawn uniformly from this range.
        D_has_hdim: one skip weight per channel instead of one per head.
        rmsnorm: False leaves the norm out: y * silu(z).
        device: of the parameters.
        dtype: of the parameters; A_log, dt_bias and D are at least float32 always.

    Example:
        >>> import torch
        >>> from mmkernels.layers import Mamba2Mixer
        >>> mixer = Mamba2Mixer(64, headdim=16, d_state=16)
        >>> out, conv_state, ssm_state = mixer(torch.randn(2, 10, 64), return_states=True)
        >>> mixer.step(torch.randn(2, 64), conv_state, ssm_state).shape
        torch.Size([2, 64])
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 128,
        d_conv: int = 4,
        expand: int = 2,
        headdim: int = 64,
        ngroups: int = 1,
        chunk_size: int | None = None,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        norm_before_gate: bool = False,
        conv_bias: bool = True,
        bias: bool = False,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        dt_init_floor: float = 1e-4,
        A_init_range: tuple[float, float] = (1.0, 16.0),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        d_inner = expand * d_model
        _mixing.require_divides("Mamba2Mixer", "headdim", headdim, "expand * d_model", d_inner)
        nheads = d_inner // headdim
        _mixing.require_divides("Mamba2Mixer", "ngroups", ngroups, "nheads", nheads)
        self.d_model, self.d_inner, self.d_state, self.d_conv = d_model, d_inner, d_state, d_conv
        self.nheads, self.headdim, self.ngroups = nheads, headdim, ngroups
        self.chunk_size, self.dt_limit = chunk_size, (float(dt_limit[0]), float(dt_limit[1]))
        self.dt_init, self.A_init_range = (dt_min, dt_max, dt_init_floor), A_init_range
        self.conv_dim = d_inner + 2 * ngroups * d_state

        self.in_proj = nn.Linear(d_model, d_inner + self.conv_dim + nheads, bias=bias, device=device, dtype=dtype)
        # Only its parameters are used: the convolution itself is mmkernels.causal_conv1d.
        self.conv1d = nn.Conv1d(
            self.conv_dim, self.conv_dim, d_conv, groups=self.conv_dim, bias=conv_bias, device=device, dtype=dtype
        )
        self.dt_bias = _mixing.scan_parameter(nheads, device, dtype)
        self.A_log = _mixing.scan_parameter(nheads, device, dtype)
        self.D = _mixing.scan_parameter(d_inner if D_has_hdim else nheads, device, dtype)
        self.norm = None
        if rmsnorm:
            self.norm = GatedRMSNorm(
                d_inner, group_size=d_inner // ngroups, norm_before_gate=norm_before_gate, device=device, dtype=dtype
            )
        self.out_proj = nn.Linear(d_inner, d_model, bias=bias, device=device, dtype=dtype)
        self._reset_scan()

    def reset_parameters(self) -> None:
        """Draw every parameter again."""
        for module in (self.in_proj, self.conv1d, self.norm, self.out_proj):
            if module is not None:
                module.reset_parameters()
        self._reset_scan()

    def _reset_scan(self) -> None:
        for projection in (self.in_proj, self.out_proj):
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        _mixing.draw_dt_bias(self.dt_bias, *self.dt_init)
        _mixing.draw_log_uniform_rate(self.A_log, *self.A_init_range)
        nn.init.ones_(self.D)

    def forward(
        self,
        u: Tensor,
        *,
        attention_mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        conv_state: Tensor | None = None,
        ssm_state: Tensor | None = None,
        return_states: bool = False,
    ) -> Output:
        """Mix the tokens of u, from fresh states or continuing from given ones (which are not modified).

        Args:
            u: (batch, seqlen, d_model).
            attention_mask: (batch, seqlen), 0 = padding, on the left or on the right: it changes no state and no
                output at a real token.
            seq_idx: (batch, seqlen) ids of packed sequences, as in `mmkernels.ssd_scan`; negative = padding.
            cu_seqlens: (n+1,) offsets of n sequences packed in a batch of 1; states then have n rows.
            conv_state: (batch or n, conv_dim, d_conv-1), the last raw inputs of the convolution.
            ssm_state: (batch or n, nheads, headdim, d_state).
            return_states: also return both states after the last real token.

        Returns:
            (batch, seqlen, d_model); with return_states also conv_state (u's dtype) and ssm_state (float32).
        """
        _mixing.check_inputs("Mamba2Mixer", self.d_model, u, attention_mask, seq_idx, cu_seqlens, conv_state, ssm_state)
        z, xBC, dt = self.in_proj(u).split([self.d_inner, self.conv_dim, self.nheads], dim=-1)
        xBC, conv_state = _mixing.convolve(
            xBC,
            self.conv1d,
            attention_mask=attention_mask,
            seq_idx=seq_idx,
            cu_seqlens=cu_seqlens,
            conv_state=conv_state,
            return_states=return_states,
        )
        x, B, C = self._heads(xBC)
        y, ssm_state = _mixing.scan(
            x,
            dt,
            self._rate(),
            B,
            C,
            dt_bias=self.dt_bias,
            dt_limit=self.dt_limit,
            D=self._skip(),
            z=z.unflatten(-1, (self.nheads, self.headdim)) if self.norm is None else None,
            attention_mask=attention_mask,
            seq_idx=seq_idx,
            cu_seqlens=cu_seqlens,
            chunk_size=self.chunk_size,
            ssm_state=ssm_state,
            return_states=return_states,
        )
        out = self._close(y.flatten(-2), z)
        if conv_state is None or ssm_state is None or not return_states:
            return out
        return out, conv_state, ssm_state

    def step(self, u: Tensor, conv_state: Tensor, ssm_state: Tensor) -> Tensor:
        """Mix one more token per row, u (batch, d_model) -> (batch, d_model); both states are updated IN PLACE.

        One call of `mmkernels.mamba2_step` if `objections_to_one_call(u)` has nothing to say, else part by part.
        """
        if not self.objections_to_one_call(u):
            return cast(Tensor, mamba2_step(u, conv_state, ssm_state, **self.step_arguments()))
        z, xBC, dt = self.in_proj(u).split([self.d_inner, self.conv_dim, self.nheads], dim=-1)
        weight = self.conv1d.weight.squeeze(1)
        x, B, C = self._heads(causal_conv1d_update(xBC, conv_state, weight, self.conv1d.bias, activation="silu"))
        y = ssd_update(
            ssm_state,
            x,
            dt,
            self._rate(),
            B,
            C,
            D=self._skip(),
            z=z.unflatten(-1, (self.nheads, self.headdim)) if self.norm is None else None,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            dt_limit=self.dt_limit,
        )
        return self._close(y.flatten(-2), z)

    def objections_to_one_call(self, u: Tensor) -> list[str]:
        """Why `step` must run part by part, in words; none: it is one call of `mmkernels.mamba2_step`.

        One call reads the weights itself, so it cannot honour a module that does something else with them (an adapter
        in the place of a projection, a hook); it has no gradients; and it is faster on a CPU only, where other devices
        may have a kernel for a part.  Which backend runs the one call, `mmkernels.explain` says.
        """
        reasons = []
        if u.device.type != "cpu":
            reasons.append(f"the tensors are on {u.device.type}")
        if torch.is_grad_enabled() and (u.requires_grad or any(p.requires_grad for p in self.parameters())):
            reasons.append("a gradient is wanted")
        parts = self._modules
        kinds = [type(parts.get(name)) for name in ("in_proj", "conv1d", "out_proj", "norm")]
        if kinds[:3] != [nn.Linear, nn.Conv1d, nn.Linear] or kinds[3] not in (GatedRMSNorm, NoneType):
            reasons.append("a part was replaced by another module")
        if any(is_hooked(part) for part in parts.values() if part is not None):
            reasons.append("a part has forward hooks")
        return reasons

    def step_arguments(self) -> dict[str, Any]:
        """The parameters and options of this mixer as `mmkernels.mamba2_step` names them."""
        # Straight from the dictionaries: nn.Module's attribute access would be a quarter of the time between layers.
        parts, own = self._modules, self._parameters
        in_proj, conv1d, out_proj = (
            cast(nn.Module, parts[name])._parameters for name in ("in_proj", "conv1d", "out_proj")
        )
        norm = cast(GatedRMSNorm | None, parts.get("norm"))
        D = cast(Tensor, own["D"])
        return {
            "in_weight": in_proj["weight"],
            "conv_weight": conv1d["weight"],
            "A_log": own["A_log"],
            "dt_bias": own["dt_bias"],
            "D": D if D.shape[0] == self.nheads else D.unflatten(0, (self.nheads, self.headdim)),
            "out_weight": out_proj["weight"],
            "in_bias": in_proj["bias"],
            "conv_bias": conv1d["bias"],
            "gate_weight": None if norm is None else norm._parameters["weight"],
            "out_bias": out_proj["bias"],
            "gate_eps": 1e-5 if norm is None else norm.eps,
            "norm_before_gate": norm is not None and norm.norm_before_gate,
            "dt_limit": self.dt_limit,
        }

    def init_states(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """Zero states (conv_state in dtype, default the weights'; ssm_state in float32) for `step` or `forward`."""
        like = self.in_proj.weight
        dtype, device = dtype or like.dtype, device or like.device
        conv_state = torch.zeros(batch, self.conv_dim, self.d_conv - 1, device=device, dtype=dtype)
        wide = torch.promote_types(dtype, torch.float32)
        return conv_state, torch.zeros(batch, self.nheads, self.headdim, self.d_state, device=device, dtype=wide)

    def _heads(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        width = self.ngroups * self.d_state
        x, B, C = xBC.split([self.d_inner, width, width], dim=-1)
        groups = (self.ngroups, self.d_state)
        return x.unflatten(-1, (self.nheads, self.headdim)), B.unflatten(-1, groups), C.unflatten(-1, groups)

    def _rate(self) -> Tensor:
        return -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))

    def _skip(self) -> Tensor:
        return self.D if self.D.shape[0] == self.nheads else self.D.unflatten(0, (self.nheads, self.headdim))

    def _close(self, y: Tensor, z: Tensor) -> Tensor:
        return self.out_proj(y if self.norm is None else self.norm(y, z))

    def extra_repr(self) -> str:
        """Sizes for print(module)."""
        return f"nheads={self.nheads}, headdim={self.headdim}, d_state={self.d_state}, ngroups={self.ngroups}"


class Mamba2Block(nn.Module):
    """Add, RMSNorm, mixer, with the running sum kept in float32.

    residual <- residual + hidden;  hidden = Mixer(RMSNorm(residual))        (no residual yet: residual = hidden)

    Args:
        d_model: channels.
        mixer: any module called as mixer(u, **states); default Mamba2Mixer(d_model).
        norm_eps: of the RMSNorm.
        residual_in_fp32: keep the running sum in float32 whatever the dtype of the weights.
        device: of the parameters.
        dtype: of the parameters.

    Example:
        >>> import torch
        >>> from mmkernels.layers import Mamba2Block, Mamba2Mixer
        >>> block = Mamba2Block(64, mixer=Mamba2Mixer(64, headdim=16, d_state=16))
        >>> hidden, residual = block(torch.randn(2, 10, 64))
        >>> hidden, residual = block(hidden, residual)
    """

    def __init__(
        self,
        d_model: int,
        *,
        mixer: nn.Module | None = None,
        norm_eps: float = 1e-5,
        residual_in_fp32: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.residual_in_fp32 = residual_in_fp32
        self.norm = GatedRMSNorm(d_model, eps=norm_eps, device=device, dtype=dtype)
        self.mixer = Mamba2Mixer(d_model, device=device, dtype=dtype) if mixer is None else mixer

    def forward(
        self,
        hidden: Tensor,
        residual: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        conv_state: Tensor | None = None,
        ssm_state: Tensor | None = None,
        return_states: bool = False,
    ) -> tuple[Tensor, ...]:
        """(hidden, residual) of the next block; with return_states also conv_state and ssm_state of the mixer.

        The last block is followed by RMSNorm(hidden + residual).  Arguments as in `Mamba2Mixer.forward`.
        """
        u, residual = self._add_norm(hidden, residual)
        out = self.mixer(
            u,
            attention_mask=attention_mask,
            seq_idx=seq_idx,
            cu_seqlens=cu_seqlens,
            conv_state=conv_state,
            ssm_state=ssm_state,
            return_states=return_states,
        )
        return (out[0], residual, *out[1:]) if return_states else (out, residual)

    def step(
        self, hidden: Tensor, residual: Tensor | None, conv_state: Tensor, ssm_state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One token per row, (batch, d_model) each; both states are updated IN PLACE.

        One call of `mmkernels.mamba2_step`, norm and sum included, where the mixer's step is one.
        """
        if not self.objections_to_one_call(hidden):
            out = mamba2_step(
                hidden,
                conv_state,
                ssm_state,
                **cast(Mamba2Mixer, self.mixer).step_arguments(),
                residual=residual,
                norm_weight=self.norm.weight,
                eps=self.norm.eps,
                residual_in_fp32=self.residual_in_fp32,
            )
            return cast(tuple[Tensor, Tensor], out)
        u, residual = self._add_norm(hidden, residual)
        return cast(Mamba2Mixer, self.mixer).step(u, conv_state, ssm_state), residual

    def objections_to_one_call(self, hidden: Tensor) -> list[str]:
        """Why `step` is not one call, in words: as `Mamba2Mixer.objections_to_one_call`, for the norm as well."""
        mixer = self._modules["mixer"]
        if type(mixer) is not Mamba2Mixer:
            return [f"the mixer is a {type(mixer).__name__}"]
        reasons = mixer.objections_to_one_call(hidden)
        if type(self._modules["norm"]) is not GatedRMSNorm or is_hooked(self.norm):
            reasons.append("the norm was replaced or has forward hooks")
        elif torch.is_grad_enabled() and self.norm.weight.requires_grad and not reasons:
            reasons.append("a gradient is wanted")
        if is_hooked(mixer):
            reasons.append("the mixer has forward hooks")
        return reasons

    def _add_norm(self, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        residual = hidden if residual is None else residual + hidden
        if self.residual_in_fp32:
            residual = residual.to(torch.promote_types(residual.dtype, torch.float32))
        return self.norm(residual).to(self.norm.weight.dtype), residual
