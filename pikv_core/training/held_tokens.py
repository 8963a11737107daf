"""What a policy would see of a layer whose cache is held, so that one can learn from it."""

from __future__ import annotations

import torch

from pikv_core.cache.layer import CacheLayer
from pikv_core.scheduling.base import Tokens


def held_tokens(layer: CacheLayer, capacity: int) -> Tokens:
    """Return the tokens of a held layer, all of its heads and rows, of which `capacity` a head may stay."""
    [lane] = layer.lanes
    keys, values, position = lane.contents()
    device = position.device
    return Tokens(
        position,
        dict(lane.tail.columns()),
        layer.num_seen.to(device),
        torch.full(position.shape[:2], capacity, device=device),
        lane.head.to(device),
        lane.row.to(device),
        lambda: keys,
        lambda: values,
        layer.run,
    )
