"""One token through a Mamba-2 block: one call, part by part through our ops, and transformers' block on its CPU path.

Sizes of mamba2-130m and mamba2-1.3b, bfloat16 and float32 weights.  One call walks through as many layers as the models
have, so that weights and states come from memory; the figure is per walk.  extra_info["us/layer"] is per layer.
"""

import pytest
import torch
from transformers import Mamba2Config
from transformers.cache_utils import DynamicCache
from transformers.models.mamba2.modeling_mamba2 import Mamba2Block as PeerBlock

from mmkernels.layers import Mamba2Block, Mamba2Mixer, place_for_decode

SIZES = {"130m": (768, 24), "1.3b": (2048, 12)}  # d_model, layers walked through
DTYPES = [torch.bfloat16, torch.float32]
# The same step in another order, with roundings to the weights' dtype after every part (peer) or at the end (ours).
TOLERANCE = {torch.float32: {"rtol": 1e-3, "atol": 1e-3}, torch.bfloat16: {"rtol": 6e-2, "atol": 6e-2}}


def ours(d_model, layers, dtype):
    torch.manual_seed(0)
    blocks = torch.nn.ModuleList(
        Mamba2Block(d_model, mixer=Mamba2Mixer(d_model, dtype=dtype), dtype=dtype) for _ in range(layers)
    ).requires_grad_(False)
    place_for_decode(blocks)
    return blocks


def transformers_blocks(blocks, d_model, dtype):
    """The same weights in transformers' blocks."""
    config = Mamba2Config(
        hidden_size=d_model,
        num_heads=d_model // 32,
        head_dim=64,
        state_size=128,
        n_groups=1,
        expand=2,
        num_hidden_layers=len(blocks),
    )
    peers = [PeerBlock(config, i).to(dtype).eval().requires_grad_(False) for i in range(len(blocks))]
    for peer, block in zip(peers, blocks, strict=True):
        peer.load_state_dict(block.state_dict())
    return peers, config


def contestants(d_model, layers, dtype):
    """name -> function of a token (1, d_model); states start from zeros and move on with every call."""
    blocks = ours(d_model, layers, dtype)
    peers, config = transformers_blocks(blocks, d_model, dtype)
    cache = DynamicCache(config=config)
    warm = torch.zeros(1, 4, d_model, dtype=dtype)
    for peer in peers:
        peer(warm, cache_params=cache)

    def stepping(part_by_part):
        states = []
        for i in range(layers):
            conv = torch.zeros(1, blocks[i].mixer.conv_dim, blocks[i].mixer.d_conv - 1, dtype=dtype)
            states.append((conv, cache.layers[i].recurrent_states.clone().float()))

        def step(token):
            hidden, residual = token, None
            for block, (conv, ssm) in zip(blocks, states, strict=True):
                if part_by_part:
                    u, residual = block._add_norm(hidden, residual)
                    hidden = step_in_parts(block.mixer, u, conv, ssm)
                else:
                    hidden, residual = block.step(hidden, residual, conv, ssm)
            return hidden + residual

        return step

    def peer_step(token):
        hidden = token[:, None]
        for peer in peers:
            hidden = peer(hidden, cache_params=cache)
        return hidden[:, 0]

    return {"one-call": stepping(False), "parts": stepping(True), "transformers": peer_step}


def step_in_parts(mixer, u, conv_state, ssm_state):
    from mmkernels import causal_conv1d_update, decode_linear, gated_rms_norm, ssd_update

    z, xBC, dt = decode_linear(u, mixer.in_proj.weight).split([mixer.d_inner, mixer.conv_dim, mixer.nheads], dim=-1)
    weight = mixer.conv1d.weight.squeeze(1)
    x, B, C = mixer._heads(causal_conv1d_update(xBC, conv_state, weight, mixer.conv1d.bias, activation="silu"))
    y = ssd_update(ssm_state, x, dt, mixer._rate(), B, C, D=mixer.D, dt_bias=mixer.dt_bias, dt_softplus=True)
    return decode_linear(gated_rms_norm(y.flatten(-2), mixer.norm.weight, z=z), mixer.out_proj.weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("who", ["one-call", "parts", "transformers"])
@pytest.mark.parametrize("size", SIZES)
def bench_walk(benchmark, size, who, dtype):
    d_model, layers = SIZES[size]
    benchmark.group = f"mamba2_step {size} {dtype}"
    with torch.no_grad():
        walks = contestants(d_model, layers, dtype)
        token = torch.randn(1, d_model, generator=torch.Generator().manual_seed(1)).to(dtype)
        results = {name: walk(token).float() for name, walk in walks.items()}
        for name, result in results.items():
            torch.testing.assert_close(result, results["parts"], **TOLERANCE[dtype], msg=lambda m, n=name: f"{n}: {m}")
        benchmark(walks[who], token)
    if benchmark.stats is not None:
        benchmark.extra_info["us/layer"] = round(benchmark.stats.stats.median / layers * 1e6, 1)
