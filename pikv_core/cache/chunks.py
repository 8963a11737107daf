"""Attention over several stores, a chunk of queries at a time, with what evictors measure.

Shapes: B batch, H query heads, G key/value heads, R = H/G, T new tokens, S stored slots, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from pikv_core.cache.store import Store
from pikv_kernels.merge_partials import merge_partials

CHUNK_ELEMENTS = 2**22  # logits at a time
CHUNK_QUERIES = 128


def attend_in_chunks(
    query: torch.Tensor,
    stores: Sequence[Store],
    visible: Callable[[Store, slice], torch.Tensor],
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
    weigh: bool,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the output [B,H,T,D] and, with `weigh`, each store's attention mass [B,G,S]: mean over a group's heads.

    visible: given a store and a slice of the queries, bool [B,1|G,T,S'] of its first S' slots; later ones are ahead of
    those queries. sinks: logits [H] that take attention and give nothing.
    """
    B, H, T, D = query.shape
    G = stores[0].position.shape[1]
    R = H // G
    masses = [torch.zeros_like(store.position, dtype=torch.float32) for store in stores] if weigh else []
    num_slots = sum(store.num_slots for store in stores)
    chunk = max(1, min(CHUNK_QUERIES, CHUNK_ELEMENTS // (B * H * num_slots)))
    output = torch.empty_like(query)
    for start in range(0, T, chunk):
        new = slice(start, min(T, start + chunk))
        length = new.stop - start
        rows = query[:, :, new].reshape(B, G, R * length, D)
        parts = []
        for store in stores:
            seen = visible(store, new)
            by_row = seen[:, :, None].expand(-1, -1, R, -1, -1).flatten(2, 3)
            parts.append(store.attend(rows, by_row, scale, softcap, weigh))
        logits = None if sinks is None else sinks.view(G, R, 1).expand(G, R, length).reshape(G, -1)
        merged, shares = merge_partials(parts, logits)
        output[:, :, new] = merged.reshape(B, H, length, D)
        for mass, part, share in zip(masses, parts, shares):
            assert part.probs is not None
            mass[:, :, : part.probs.shape[-1]] += torch.matmul(share[:, :, None] / R, part.probs)[:, :, 0]
    return output, masses
