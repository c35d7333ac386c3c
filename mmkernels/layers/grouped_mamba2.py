"""The mmMamba mixer: a Mamba-2 scan in the shape of grouped-query attention (arXiv 2502.13145, section 4.1).

It has the projections of the attention layer it replaces (W_Q -> C, W_K -> B, W_V -> x, W_O) and a few new parameters.
"""

import math

import torch
from torch import Tensor, nn

from mmkernels.errors import ConfigError, nearest
from mmkernels.layers import _mixing
from mmkernels.layers.norm import GatedRMSNorm
from mmkernels.ops.causal_conv1d.api import causal_conv1d_update
from mmkernels.ops.ssd.api import ssd_update

Output = Tensor | tuple[Tensor, Tensor, Tensor]
STYLES = ("mimic", "default")
# Without the step size in the input weight, x is divided by it before a scan that multiplies by it; this keeps the
# quotient finite.  A smaller step would forget less than 3e-6 of the state per token anyway.
_SMALLEST_STEP = 2.0**-20


class GroupedMamba2Mixer(nn.Module):
    """Mix tokens in linear time with the weights of a grouped-query attention layer.

    [v | k | q] = silu(conv([W_V u | W_K u | W_Q u]));  with g(h) = h // (nheads / nkvheads):
    dt_h = softplus(W_dt u + dt_bias);  S_t = exp(-exp(A_log_bias) dt) S_{t-1} + dt v_{g(h)} k_{g(h)}^T;  y = S q_h;
    out = W_O [ RMSNorm(y_h) * silu((W_G u)_h) ]_h        (arXiv 2502.13145, equations 2-4; dt on the input as in
    Mamba-2).  No softmax, no rotary embedding, no scale: order comes from the convolution and the decay.

    Args:
        d_model: channels of u and of the output.
        nheads: query heads.
        nkvheads: key and value heads; divides nheads.
        headdim: channels of a head, also the size of its state: headdim x headdim.
        d_conv: taps of the convolution.
        chunk_size: tokens per chunk of the scan; a matter of speed only.
        conv_bias: whether the convolution has a bias.
        use_gate: whether silu(W_G u) gates the normalised output.
        use_D: add D_h v to y.
        use_qk_norm: LayerNorm over each head of q and k after the convolution.
        eps: of the norm of the heads.
        scale_input_by_dt: False leaves dt out of the input weight (the paper's equation 2 as printed; computed in
            float32, with dt at least 2^-20).
        device: of the parameters.
        dtype: of the parameters; A_log_bias, dt_bias and D are at least float32 always.

    Example:
        >>> import torch
        >>> from mmkernels.layers import GroupedMamba2Mixer
        >>> mixer = GroupedMamba2Mixer(64, nheads=4, nkvheads=2, headdim=16)
        >>> out, conv_state, ssm_state = mixer(torch.randn(2, 10, 64), return_states=True)
        >>> mixer.step(torch.randn(2, 64), conv_state, ssm_state).shape
        torch.Size([2, 64])
    """

    def __init__(
        self,
        d_model: int,
        *,
        nheads: int,
        nkvheads: int,
        headdim: int,
        d_conv: int = 2,
        chunk_size: int | None = None,
        conv_bias: bool = True,
        use_gate: bool = True,
        use_D: bool = False,
        use_qk_norm: bool = False,
        eps: float = 1e-5,
        scale_input_by_dt: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        _mixing.require_divides("GroupedMamba2Mixer", "nkvheads", nkvheads, "nheads", nheads)
        self.d_model, self.nheads, self.nkvheads, self.headdim = d_model, nheads, nkvheads, headdim
        self.d_conv, self.chunk_size, self.scale_input_by_dt = d_conv, chunk_size, scale_input_by_dt
        self.q_dim, self.kv_dim = nheads * headdim, nkvheads * headdim
        self.conv_dim = self.q_dim + 2 * self.kv_dim

        def linear(size_in: int, size_out: int) -> nn.Linear:
            return nn.Linear(size_in, size_out, bias=False, device=device, dtype=dtype)

        self.q_proj, self.k_proj = linear(d_model, self.q_dim), linear(d_model, self.kv_dim)
        self.v_proj, self.o_proj = linear(d_model, self.kv_dim), linear(self.q_dim, d_model)
        self.in_proj = linear(d_model, nheads)
        self.g_proj = linear(d_model, self.q_dim) if use_gate else None
        # Only its parameters are used: the convolution itself is mmkernels.causal_conv1d.
        self.conv1d = nn.Conv1d(
            self.conv_dim, self.conv_dim, d_conv, groups=self.conv_dim, bias=conv_bias, device=device, dtype=dtype
        )
        self.g_norm = GatedRMSNorm(headdim, eps=eps, norm_before_gate=True, device=device, dtype=dtype)
        self.q_norm = nn.LayerNorm(headdim, device=device, dtype=dtype) if use_qk_norm else None
        self.k_norm = nn.LayerNorm(headdim, device=device, dtype=dtype) if use_qk_norm else None
        self.dt_bias = _mixing.scan_parameter(nheads, device, dtype)
        self.A_log_bias = _mixing.scan_parameter(nheads, device, dtype)
        self.D = _mixing.scan_parameter(nheads, device, dtype) if use_D else None
        self.reset_new_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter again, the attention projections included."""
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            projection.reset_parameters()
        self.reset_new_parameters()

    def reset_new_parameters(self, style: str = "mimic") -> None:
        """Set the parameters an attention layer does not have; q, k, v and o projections stay.

        Args:
            style: "mimic" starts near decayed linear attention: the convolution passes the current token, step sizes
                do not depend on the input and are log-uniform in [1e-3, 1e-1], A = -e.  "default" draws convolution,
                in_proj and A as a Mamba-2 layer does, with dt_bias 0.  The gate (Xavier-uniform, gain 2^-2.5) and the
                norms are the same in both.
        """
        if style not in STYLES:
            raise ConfigError(
                f"reset_new_parameters: style must name a way to start; got {style!r}. {nearest(style, STYLES)}"
            )
        if style == "mimic":
            nn.init.zeros_(self.conv1d.weight)
            nn.init.ones_(self.conv1d.weight[..., -1])
            if self.conv1d.bias is not None:
                nn.init.zeros_(self.conv1d.bias)
            nn.init.zeros_(self.in_proj.weight)
            _mixing.draw_dt_bias(self.dt_bias, 1e-3, 1e-1, 1e-3)
            nn.init.ones_(self.A_log_bias)
        else:
            self.conv1d.reset_parameters()
            self.in_proj.reset_parameters()
            nn.init.zeros_(self.dt_bias)
            _mixing.draw_log_uniform_rate(self.A_log_bias, 1.0, 16.0)
        if self.g_proj is not None:
            nn.init.xavier_uniform_(self.g_proj.weight, gain=2.0**-2.5)
        if self.D is not None:
            nn.init.ones_(self.D)
        for norm in (self.g_norm, self.q_norm, self.k_norm):
            if norm is not None:
                norm.reset_parameters()

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
        """Mix the tokens of u: o_proj of `context`, whose arguments it takes.

        Returns:
            (batch, seqlen, d_model); with return_states also conv_state (u's dtype) and ssm_state (float32).
        """
        out = self.context(
            u,
            attention_mask=attention_mask,
            seq_idx=seq_idx,
            cu_seqlens=cu_seqlens,
            conv_state=conv_state,
            ssm_state=ssm_state,
            return_states=return_states,
        )
        return (self.o_proj(out[0]), out[1], out[2]) if isinstance(out, tuple) else self.o_proj(out)

    def context(
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
        """The heads' outputs before o_proj, from fresh states or continuing from given ones (which are not modified).

        Args:
            u: (batch, seqlen, d_model).
            attention_mask: (batch, seqlen), 0 = padding, on the left or on the right: it changes no state and no
                output at a real token.
            seq_idx: (batch, seqlen) ids of packed sequences, as in `mmkernels.ssd_scan`; negative = padding.
            cu_seqlens: (n+1,) offsets of n sequences packed in a batch of 1; states then have n rows.
            conv_state: (batch or n, conv_dim, d_conv-1), the last inputs of the convolution, channels v | k | q.
            ssm_state: (batch or n, nheads, headdim, headdim).
            return_states: also return both states after the last real token.

        Returns:
            (batch, seqlen, nheads * headdim); with return_states also conv_state and ssm_state (float32).
        """
        _mixing.check_inputs(
            "GroupedMamba2Mixer", self.d_model, u, attention_mask, seq_idx, cu_seqlens, conv_state, ssm_state
        )
        vkq, conv_state = _mixing.convolve(
            self._project(u),
            self.conv1d,
            attention_mask=attention_mask,
            seq_idx=seq_idx,
            cu_seqlens=cu_seqlens,
            conv_state=conv_state,
            return_states=return_states,
        )
        x, dt, B, C, dt_bias = self._scan_inputs(vkq, self.in_proj(u))
        y, ssm_state = _mixing.scan(
            x,
            dt,
            self._rate(),
            B,
            C,
            dt_bias=dt_bias,
            dt_limit=(0.0, math.inf),
            D=None,
            z=None,
            attention_mask=attention_mask,
            seq_idx=seq_idx,
            cu_seqlens=cu_seqlens,
            chunk_size=self.chunk_size,
            ssm_state=ssm_state,
            return_states=return_states,
        )
        out = self._close(y, vkq, u)
        if conv_state is None or ssm_state is None or not return_states:
            return out
        return out, conv_state, ssm_state

    def step(self, u: Tensor, conv_state: Tensor, ssm_state: Tensor) -> Tensor:
        """Mix one more token per row, u (batch, d_model) -> (batch, d_model); both states are updated IN PLACE."""
        weight = self.conv1d.weight.squeeze(1)
        vkq = causal_conv1d_update(self._project(u), conv_state, weight, self.conv1d.bias, activation="silu")
        x, dt, B, C, dt_bias = self._scan_inputs(vkq, self.in_proj(u))
        y = ssd_update(ssm_state, x, dt, self._rate(), B, C, dt_bias=dt_bias, dt_softplus=dt_bias is not None)
        return self.o_proj(self._close(y, vkq, u))

    def init_states(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """Zero states (conv_state in dtype, default the weights'; ssm_state in float32) for `step` or `forward`."""
        like = self.q_proj.weight
        dtype, device = dtype or like.dtype, device or like.device
        conv_state = torch.zeros(batch, self.conv_dim, self.d_conv - 1, device=device, dtype=dtype)
        wide = torch.promote_types(dtype, torch.float32)
        return conv_state, torch.zeros(batch, self.nheads, self.headdim, self.headdim, device=device, dtype=wide)

    def _project(self, u: Tensor) -> Tensor:
        return torch.cat([self.v_proj(u), self.k_proj(u), self.q_proj(u)], dim=-1)

    def _scan_inputs(self, vkq: Tensor, dt: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        # x, dt, B, C, dt_bias of the scan, from the convolved channels and the projected step sizes.
        v, k, q = vkq.split([self.kv_dim, self.kv_dim, self.q_dim], dim=-1)
        k, q = k.unflatten(-1, (self.nkvheads, self.headdim)), q.unflatten(-1, (self.nheads, self.headdim))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        x, B = self._repeat(v.unflatten(-1, (self.nkvheads, self.headdim))), self._repeat(k)
        if self.scale_input_by_dt:
            return x, dt, B, q, self.dt_bias
        step = _mixing.step_size(dt, self.dt_bias, (_SMALLEST_STEP, math.inf))
        return x / step[..., None], step, B.to(step.dtype), q.to(step.dtype), None

    def _repeat(self, heads: Tensor) -> Tensor:
        # Key and value heads, each for its nheads / nkvheads query heads; no copy when there is one query head each.
        times = self.nheads // self.nkvheads
        return heads if times == 1 else heads.repeat_interleave(times, dim=-2, output_size=self.nheads)

    def _rate(self) -> Tensor:
        return -torch.exp(self.A_log_bias.to(torch.promote_types(self.A_log_bias.dtype, torch.float32)))

    def _close(self, y: Tensor, vkq: Tensor, u: Tensor) -> Tensor:
        if self.D is not None:
            v = self._repeat(vkq[..., : self.kv_dim].unflatten(-1, (self.nkvheads, self.headdim)))
            y = y + self.D.to(torch.promote_types(self.D.dtype, torch.float32))[:, None] * v
        y = y.to(vkq.dtype)
        gate = None if self.g_proj is None else self.g_proj(u).unflatten(-1, (self.nheads, self.headdim))
        return self.g_norm(y, gate).flatten(-2)

    def extra_repr(self) -> str:
        """Sizes for print(module)."""
        return f"nheads={self.nheads}, nkvheads={self.nkvheads}, headdim={self.headdim}, d_conv={self.d_conv}"
