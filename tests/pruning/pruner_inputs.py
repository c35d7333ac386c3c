"""Inputs of pruners: random features, and taps of the right shapes."""

import torch

from mmkernels.pruning import Encoder, VisionInputs

CLIP = Encoder(num_layers=24, feature_layer=22, num_prefix=1, grid=(24, 24))
SIGLIP = Encoder(num_layers=27, feature_layer=25, num_prefix=0, grid=(27, 27), has_probe=True)
TINY = Encoder(num_layers=5, feature_layer=3, num_prefix=1, grid=(3, 4))


def inputs_for(pruner, encoder, images=2, dim=5, seed=0, **more):
    """Random features and taps of the right shapes; attention rows from a softmax."""
    draw = torch.Generator().manual_seed(seed)
    height, width = encoder.grid
    tokens = height * width
    heads, headdim = 2, 4
    shapes = {"keys": (images, encoder.num_prefix + tokens, heads, headdim), "cls_query": (images, heads, headdim)}
    taps = {}
    for tap in pruner.taps(encoder):
        if tap.what in shapes:
            taps[tap] = torch.randn(shapes[tap.what], generator=draw)
        else:
            taps[tap] = torch.randn(images, tokens + 1, generator=draw).softmax(-1)[:, 1:]
    features = torch.randn(images, tokens, dim, generator=draw)
    prefix = torch.randn(images, encoder.num_prefix, dim, generator=draw)
    return VisionInputs(features, encoder.grid, prefix, taps, **more)


def one(inputs, i):
    """Image i of a call, alone."""
    part = slice(i, i + 1)
    taps = {tap: value[part] for tap, value in inputs.taps.items()}
    mask = None if inputs.mask is None else inputs.mask[part]
    return VisionInputs(inputs.features[part], inputs.grid, inputs.prefix[part], taps, mask)
