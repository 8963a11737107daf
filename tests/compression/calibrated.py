"""Codecs ready to encode: by registry name, fitted on random low-rank samples where they are calibrated."""

import torch

from pikv_core.components import Component, build
from pikv_core.compression import CODECS
from pikv_core.compression.base import LayerSamples

_fitted = {}  # what fitting found, by what was asked: some codecs take a second


def ready(name, head_dim=64, num_heads=2, num_layers=1, num_tokens=256, rank=4, seed=0, **options):
    """Return layer 0's codec, fitted on the samples of `low_rank_samples` with the same arguments where it must be."""
    codec = build(CODECS, Component(name, options))
    if not codec.calibrated:
        return codec.for_layer(0, {}, None)
    asked = (head_dim, num_heads, num_layers, num_tokens, rank, seed)
    key = (name, repr(options), *asked)
    if key not in _fitted:
        _fitted[key] = codec.fit(low_rank_samples(*asked)).tensors
    return codec.for_layer(0, _fitted[key], None)


def low_rank_samples(head_dim=64, num_heads=2, num_layers=1, num_tokens=256, rank=4, seed=0):
    """Return one LayerSamples a layer, of one sequence and two query heads a group.

    The keys, and the values, of a head lie in `rank` dimensions of its own.
    """
    generator = torch.Generator().manual_seed(seed)

    def low_rank():
        coordinates = torch.randn(1, num_heads, num_tokens, rank, generator=generator)
        return coordinates @ torch.randn(1, num_heads, rank, head_dim, generator=generator)

    return [
        LayerSamples(
            queries=torch.randn(1, 2 * num_heads, num_tokens, head_dim, generator=generator),
            keys=low_rank(),
            values=low_rank(),
            position=torch.arange(num_tokens),
            scale=head_dim**-0.5,
            rotary=None,
        )
        for _ in range(num_layers)
    ]
