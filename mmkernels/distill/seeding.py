"""Seeds a linear-time mixer from a trained softmax attention layer: V -> x, K -> B, Q -> C, W_O kept.

Source: mmMamba (arXiv 2502.13145) section 4.1; the initial values were read from the behaviour of the official code.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmkernels.errors import ConfigError, ShapeError, nearest

if TYPE_CHECKING:
    from mmkernels.layers import GroupedMamba2Mixer

STRATEGIES = ("scratch", "inherit", "inherit_mimic")


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
        generator: a CPU generator that decides the random values; None = torch's global one.

    Raises:
        ShapeError: a weight does not fit the mixer.
        ConfigError: an unknown strategy.

    Numerics: one number is taken from the generator and seeds torch while the mixer is drawn; the global random states
        are put back.  Values on the CPU and on a GPU differ, as torch's generators do.
    Source: mmMamba section 4.1 and its ablation (Table 4).
    """
    if strategy not in STRATEGIES:
        raise ConfigError(f"seed_mixer: strategy must be known; got {strategy!r}. {nearest(strategy, STRATEGIES)}")
    pairs = {
        "q_weight": (mixer.q_proj.weight, q_weight),
        "k_weight": (mixer.k_proj.weight, k_weight),
        "v_weight": (mixer.v_proj.weight, v_weight),
        "o_weight": (mixer.o_proj.weight, o_weight),
    }
    for name, (parameter, weight) in pairs.items():
        if weight.shape != parameter.shape:
            raise ShapeError(
                f"seed_mixer: {name} must have shape {tuple(parameter.shape)}; got {tuple(weight.shape)}. "
                "The mixer must have the heads of the attention it replaces."
            )
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        mixer.reset_parameters()
        mixer.reset_new_parameters("mimic" if strategy == "inherit_mimic" else "default")
    for name, (parameter, weight) in pairs.items():
        if strategy != "scratch" or name == "o_weight":
            parameter.copy_(weight)
