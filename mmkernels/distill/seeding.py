"""Seeds a linear-time mixer from a trained softmax attention layer: V -> x, K -> B, Q -> C, W_O kept.

Source: mmMamba (arXiv 2502.13145) section 4.1; the initial values were read from the behaviour of the official code.
"""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmkernels.errors import ConfigError, ShapeError, nearest

if TYPE_CHECKING:
    from mmkernels.layers import GroupedMamba2Mixer

STRATEGIES = ("scratch", "inherit", "inherit_mimic")
STEP_RANGE = (1e-3, 1e-1)  # initial step sizes D0, log-uniform
DECAY_LOG = 1.0  # A = -exp(1): per-token decay exp(-e D0) between 0.762 and 0.9973
GATE_GAIN = 2**-2.5


def split_fused_qkv(weight: Tensor, *, heads: int, kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Splits a fused, grouped projection (InternLM2's wqkv) into W_Q, W_K, W_V.

    Rows come in kv_heads groups of (heads/kv_heads query heads | one key head | one value head), head_dim rows each.

    Args:
        weight: ((heads + 2*kv_heads) * head_dim, ...) weight or bias.
        heads, kv_heads, head_dim: sizes of the attention.

    Returns:
        Copies: (heads*head_dim, ...), (kv_heads*head_dim, ...), (kv_heads*head_dim, ...), heads in natural order.

    Raises:
        ShapeError: kv_heads does not divide heads, or the number of rows is another.

    Example:
        >>> q, k, v = split_fused_qkv(torch.arange(8.0)[:, None], heads=4, kv_heads=2, head_dim=1)
        >>> q.flatten().tolist(), k.flatten().tolist(), v.flatten().tolist()
        ([0.0, 1.0, 4.0, 5.0], [2.0, 6.0], [3.0, 7.0])

    Source: InternLM2 checkpoints; checked by a round trip with `fuse_qkv` and against attention with fused weights.
    """
    group = _group("split_fused_qkv", heads, kv_heads)
    rows = (heads + 2 * kv_heads) * head_dim
    if weight.shape[0] != rows:
        raise ShapeError(
            f"split_fused_qkv: weight must have (heads + 2*kv_heads)*head_dim = {rows} rows; got "
            f"{tuple(weight.shape)}. Check the sizes against the model's configuration."
        )
    grouped = weight.unflatten(0, (kv_heads, group + 2, head_dim))
    parts = (grouped[:, :group], grouped[:, group], grouped[:, group + 1])
    query, key, value = (part.reshape(-1, *weight.shape[1:]).clone() for part in parts)
    return query, key, value


def fuse_qkv(q_weight: Tensor, k_weight: Tensor, v_weight: Tensor, *, head_dim: int) -> Tensor:
    """The inverse of `split_fused_qkv`.

    Args:
        q_weight: (heads*head_dim, ...); k_weight, v_weight: (kv_heads*head_dim, ...).
        head_dim: rows of one head.

    Returns:
        ((heads + 2*kv_heads) * head_dim, ...).

    Raises:
        ShapeError: the head numbers do not divide, or K and V differ.
    """
    heads, kv_heads = q_weight.shape[0] // head_dim, k_weight.shape[0] // head_dim
    group = _group("fuse_qkv", heads, kv_heads)
    if k_weight.shape != v_weight.shape:
        raise ShapeError(
            f"fuse_qkv: v_weight must have the shape of k_weight {tuple(k_weight.shape)}; got {tuple(v_weight.shape)}. "
            "Keys and values have the same heads."
        )
    query = q_weight.unflatten(0, (kv_heads, group, head_dim))
    key, value = (w.unflatten(0, (kv_heads, 1, head_dim)) for w in (k_weight, v_weight))
    return torch.cat([query, key, value], dim=1).flatten(0, 2)


def _group(function: str, heads: int, kv_heads: int) -> int:
    if kv_heads < 1 or heads % kv_heads:
        raise ShapeError(
            f"{function}: kv_heads must divide heads; got heads={heads}, kv_heads={kv_heads}. "
            "Read both from the model's configuration."
        )
    return heads // kv_heads


def initial_steps(count: int, generator: torch.Generator | None = None) -> Tensor:
    """(count,) float32 step sizes D0, log-uniform in `STEP_RANGE`."""
    low, high = (math.log(bound) for bound in STEP_RANGE)
    steps = torch.exp(torch.rand(count, generator=generator) * (high - low) + low)
    return steps.clamp(*STEP_RANGE)  # exp(log) may round a hair outside


def inverse_softplus(x: Tensor) -> Tensor:
    """The y with softplus(y) = x > 0: x + log(1 - exp(-x)), without cancellation for small x."""
    return x + torch.log(-torch.expm1(-x))


@torch.no_grad()
def seed_mixer(
    mixer: "GroupedMamba2Mixer",
    q_weight: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    o_weight: Tensor,
    *,
    strategy: str = "inherit_mimic",
    generator: torch.Generator | None = None,
) -> None:
    """Writes every parameter of a mixer, in place, from the weights of the attention layer that it replaces.

    | strategy      | W_Q W_K W_V | conv            | W_gamma | step size at start         | A            |
    |---------------|-------------|-----------------|---------|----------------------------|--------------|
    | inherit_mimic | attention's | current token   | 0       | D0 log-uniform [1e-3, 0.1] | -e           |
    | inherit       | attention's | PyTorch default | default | softplus(W_gamma u)        | -U(1, 16)    |
    | scratch       | default     | PyTorch default | default | softplus(W_gamma u)        | -U(1, 16)    |

    W_O is inherited always, the gate is Xavier-uniform with gain 2^-2.5, norms and D are ones.  With inherit_mimic the
    mixer starts as decayed linear attention with SiLU feature maps; the gate is near zero, so it does not reproduce the
    attention's output before training.

    Args:
        mixer: the layer to fill.
        q_weight: (nheads*headdim, d_model); k_weight, v_weight: (nkvheads*headdim, d_model); o_weight: (d_model,
            nheads*headdim).
        strategy: "scratch", "inherit" or "inherit_mimic".
        generator: source of the random values, a CPU generator; None = torch's global one.

    Raises:
        ShapeError: a weight does not fit the mixer.
        ConfigError: an unknown strategy, or a mixer with parameters that seeding does not know.

    Numerics: random values are drawn in float32 on the CPU whatever the mixer's dtype and device.
    Source: mmMamba section 4.1 and its ablation (Table 4).
    """
    if strategy not in STRATEGIES:
        raise ConfigError(f"seed_mixer: strategy must be known; got {strategy!r}. {nearest(strategy, STRATEGIES)}")
    values: dict[str, Tensor] = {"o_proj.weight": o_weight}
    sources = {"q_proj.weight": q_weight, "k_proj.weight": k_weight, "v_proj.weight": v_weight}
    parameters = dict(mixer.named_parameters())
    for name, weight in {**sources, **values}.items():
        if weight.shape != parameters[name].shape:
            raise ShapeError(
                f"seed_mixer: {name[0]}_weight must have shape {tuple(parameters[name].shape)}; got "
                f"{tuple(weight.shape)}. The mixer must have the heads of the attention it replaces."
            )
    width = parameters["q_proj.weight"].shape[1]
    for name, weight in sources.items():
        values[name] = weight if strategy != "scratch" else _uniform(weight.shape, width**-0.5, generator)
    values.update(_new_values(parameters, strategy == "inherit_mimic", generator))
    unknown = sorted(parameters.keys() - values.keys())
    if unknown:
        raise ConfigError(
            f"seed_mixer: mixer must have known parameters only; got {', '.join(unknown)}. "
            "Seed an untouched GroupedMamba2Mixer, before adapters or extra layers are attached."
        )
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def _uniform(shape: Iterable[int], bound: float, generator: torch.Generator | None) -> Tensor:
    return torch.empty(tuple(shape)).uniform_(-bound, bound, generator=generator)


def _new_values(
    parameters: dict[str, nn.Parameter], mimic: bool, generator: torch.Generator | None
) -> dict[str, Tensor]:
    """Values of every parameter that attention does not have, drawn in the order of their names."""
    values: dict[str, Tensor] = {}
    for name in sorted(parameters):
        shape = parameters[name].shape
        if name == "conv1d.weight" and mimic:
            values[name] = torch.zeros(shape)
            values[name][..., -1] = 1
        elif name == "conv1d.bias" and mimic:
            values[name] = torch.zeros(shape)
        elif name in ("conv1d.weight", "conv1d.bias"):
            values[name] = _uniform(shape, parameters["conv1d.weight"].shape[-1] ** -0.5, generator)
        elif name == "in_proj.weight":
            values[name] = torch.zeros(shape) if mimic else _uniform(shape, shape[1] ** -0.5, generator)
        elif name == "dt_bias":
            values[name] = inverse_softplus(initial_steps(shape[0], generator)) if mimic else torch.zeros(shape)
        elif name == "A_log_bias":
            scratch = torch.empty(shape).uniform_(1, 16, generator=generator).log()
            values[name] = torch.full(shape, DECAY_LOG) if mimic else scratch
        elif name == "g_proj.weight":
            values[name] = _uniform(shape, GATE_GAIN * (6 / (shape[0] + shape[1])) ** 0.5, generator)
        elif name.endswith("norm.weight") or name == "D":
            values[name] = torch.ones(shape)
        elif name.endswith("norm.bias"):
            values[name] = torch.zeros(shape)
    return values
