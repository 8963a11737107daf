"""Tokens that a caller hands to a layer himself, instead of a model.

Shapes: B batch, H query heads, G key/value heads, T new tokens, D head dim.
"""

from __future__ import annotations

import torch

from pikv_core.cache.layer import CacheLayer
from pikv_core.errors import UsageError

FORMS = "[G,D], [B,G,D] or [B,G,T,D]"


def append(
    layer: CacheLayer,
    token_id: int,
    keys: torch.Tensor,
    values: torch.Tensor,
    query: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor | None:
    """Hand tokens to a layer, see `PiKVCache.append`; raise UsageError where they do not follow what it has seen."""
    if keys.shape != values.shape:
        raise UsageError(f"keys are {_shape(keys)} and values {_shape(values)}", hint="give both in the same shape")
    k, v = _four(keys), _four(values)
    if token_id != layer.seen_length:
        raise UsageError(
            f"layer {layer.index} has seen {layer.seen_length} tokens, so the next is {layer.seen_length}, "
            f"not {token_id}",
            hint="give every layer every token once, in order; cache.reset() begins a new sequence",
        )
    if layer.is_initialized and layer.dimensions != (*k.shape[:2], k.shape[3]):
        rows, heads, channels = layer.dimensions
        raise UsageError(
            f"layer {layer.index} has {rows} rows of {heads} heads of {channels} channels, and the new keys are "
            f"{_shape(keys)}",
            hint=f"give {FORMS} of the same rows, heads and channels",
        )
    if query is None:
        layer.append(k, v)
        return None
    q = _four(query)
    if query.dim() != keys.dim() or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]) or q.shape[1] % k.shape[1]:
        raise UsageError(
            f"queries are {_shape(query)} and keys {_shape(keys)}",
            hint="give queries in the form of the keys, with a multiple of their heads",
        )
    layer.update(k, v)
    return layer.attend(q, k.shape[-1] ** -0.5 if scale is None else scale).reshape(query.shape)


def _four(x: torch.Tensor) -> torch.Tensor:
    """Return x as [B,G,T,D]."""
    if x.dim() not in (2, 3, 4):
        raise UsageError(f"expected keys, values and queries {FORMS}, got {_shape(x)}")
    x = x[None] if x.dim() == 2 else x
    return x[:, :, None] if x.dim() == 3 else x


def _shape(x: torch.Tensor) -> str:
    return str(list(x.shape))
