"""Attention of new tokens over a part of what they see, to be merged with other parts.

Shapes: B batch, H query heads, G key/value heads, R = H/G, T new tokens, N queries of a chunk, S stored slots, D head
dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pikv_core.cache.chunks import CHUNK_ELEMENTS, CHUNK_QUERIES
from pikv_core.cache.store import Store
from pikv_kernels.merge_partials import join_partials
from pikv_kernels.partial_attention import Partial


def attend_part(
    stores: Sequence[Store],
    query: torch.Tensor,
    num_kv_heads: int,
    position: torch.Tensor,
    window: int | None,
    has_empty: bool,
    scale: float,
    softcap: float | None,
    alike: bool = True,
) -> Partial:
    """Attend query [B,H,T,D] at `position` [B,T] over stores; rows [B,G,R·T].

    window: tokens a query may look back, itself included, None for all. has_empty: whether there are
    empty slots. alike: whether the heads of a store hold the same tokens.
    """
    B, H, T, D = query.shape
    G, R = num_kv_heads, H // num_kv_heads
    num_slots = sum(store.num_slots for store in stores)
    if not num_slots:
        rows = query.view(B, G, R * T, D) if query.is_contiguous() else query.reshape(B, G, R * T, D)
        return Partial(torch.zeros_like(rows), rows.new_full(rows.shape[:3], -torch.inf, dtype=torch.float32), None)
    masked = T > 1 or has_empty or window is not None
    read = stores if T == 1 else [store.plain() for store in stores]
    chunk = max(1, min(CHUNK_QUERIES, CHUNK_ELEMENTS // (B * H * num_slots)))
    outputs, lses = [], []
    for start in range(0, T, chunk):
        new = slice(start, min(T, start + chunk))
        by_group = query[:, :, new].reshape(B, G, -1, D)
        parts = []
        for store in read:
            visible = _visible(store, position[:, new], window, alike) if masked else None
            by_row = visible if T == 1 or visible is None else visible.repeat(1, 1, R, 1)
            parts.append(store.attend(by_group, by_row, scale, softcap, False))
        part = join_partials(parts)
        outputs.append(part.output.unflatten(2, (R, -1)))
        lses.append(part.lse.unflatten(2, (R, -1)))
    return Partial(torch.cat(outputs, dim=3).flatten(2, 3), torch.cat(lses, dim=3).flatten(2), None)


def _visible(store: Store, position: torch.Tensor, window: int | None, alike: bool) -> torch.Tensor:
    """Return bool [B,1|G,N,S]: which slots the queries at `position` [B,N] see."""
    held = store.position[:, :1] if alike else store.position
    ahead = position[:, None, :, None] - held[:, :, None]
    visible = (held >= 0)[:, :, None] & (ahead >= 0)
    return visible if window is None else visible & (ahead < window)
