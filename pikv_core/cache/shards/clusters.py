"""Clusters of keys, made when the first tokens come and followed as more do; k-means, the same result every time.

Shapes: B batch, G key/value heads, N new tokens, E clusters, D head dim.
"""

from __future__ import annotations

import torch

ITERATIONS = 8


def assign(keys: torch.Tensor, is_token: torch.Tensor, count: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Return the cluster [B,G,N] of each of the keys [B,G,N,D]: that of the nearest mean.

    is_token: bool [B,G,N], False for padding, whose cluster means nothing. count [B,G,E] and total [B,G,E,D]: tokens
    that the clusters have, and the sum of their keys. Clusters that have none start from keys at even distances, and
    all means move while they settle.
    """
    keys = keys.float()
    is_empty = count == 0
    mean = total / count.clamp(min=1)[..., None]
    if not bool(is_empty.any()):
        return _nearest(keys, mean, is_empty)
    num_new = is_token.sum(-1, keepdim=True)
    order = is_token.int().argsort(dim=-1, descending=True, stable=True)  # tokens first
    E = count.shape[-1]
    place = (torch.arange(E, device=keys.device) * num_new // E).clamp(max=keys.shape[2] - 1)
    start = keys.gather(2, order.gather(2, place)[..., None].expand(*place.shape, keys.shape[3]))
    mean = torch.where(is_empty[..., None], start, mean)
    is_void = is_empty & (num_new == 0)
    weight = is_token.float()
    for _ in range(ITERATIONS):
        member = torch.nn.functional.one_hot(_nearest(keys, mean, is_void), E) * weight[..., None]
        size = count + member.sum(2)
        moved = (total + member.mT @ keys) / size.clamp(min=1)[..., None]
        mean = torch.where((size > 0)[..., None], moved, mean)
    return _nearest(keys, mean, is_void)


def _nearest(keys: torch.Tensor, mean: torch.Tensor, is_void: torch.Tensor) -> torch.Tensor:
    """Return the nearest of the means [B,G,E,D], the first of equally near ones, none of those that are void."""
    distance = mean.square().sum(-1)[:, :, None] - 2 * keys @ mean.mT
    return distance.masked_fill(is_void[:, :, None], torch.inf).argmin(-1)
