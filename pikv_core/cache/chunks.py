"""Attention over several stores, a chunk of queries at a time, and the rows that observers see of it.

Shapes: B batch, H query heads, G key/value heads, R = H/G, T new tokens, N queries of a chunk, S stored slots, D head
dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from pikv_core.cache.store import Store
from pikv_core.compression.none import Plain
from pikv_kernels.merge_partials import merge_partials

CHUNK_ELEMENTS = 2**22  # logits at a time
CHUNK_QUERIES = 128

Show = Callable[[slice, list[torch.Tensor], torch.Tensor], None]


def attend_in_chunks(
    query: torch.Tensor,
    stores: Sequence[Store],
    visible: Callable[[Store, slice], torch.Tensor],
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
    num_shown: int,
    show: Show,
) -> torch.Tensor:
    """Return the output [B,H,T,D], and show the attention of the newest `num_shown` queries.

    visible: given a store and a slice of the queries, bool [B,1|G,N,S'] of its first S' slots; later ones are ahead of
    those queries. sinks: logits [B|1,G,R] that take attention and give nothing. show: called with a slice of the
    queries, each store's softmax rows [B,G,R,N,S'] over what all stores hold, and how many slots each query sees
    [B,G,N].
    """
    B, H, T, D = query.shape
    G = stores[0].position.shape[1]
    R = H // G
    first = max(0, T - num_shown)
    num_slots = sum(store.num_slots for store in stores)
    chunk = max(1, min(CHUNK_QUERIES, CHUNK_ELEMENTS // (B * H * num_slots)))
    bounds = sorted({*range(0, first, chunk), *range(first, T, chunk), T})
    output = torch.empty_like(query)
    is_plain = softcap is None and sinks is None and all(isinstance(store.codec, Plain) for store in stores)
    tokens = [_joined(parts) for parts in zip(*(store.decoded() for store in stores))] if is_plain and first else None
    for start, end in itertools.pairwise(bounds):
        new = slice(start, end)
        N = end - start
        shown = start >= first
        by_group = query[:, :, new].reshape(B, G, R * N, D)
        seen = [visible(store, new) for store in stores]
        if tokens is not None and not shown:
            keys, values = tokens
            output[:, :, new] = _masked(by_group, keys, values, _joined(seen, -1), scale).reshape(B, H, N, D)
            continue
        parts = []
        for store, mask in zip(stores, seen):
            by_row = mask[:, :, None].expand(-1, -1, R, -1, -1).flatten(2, 3)
            parts.append(store.attend(by_group, by_row, scale, softcap, shown))
        logits = None if sinks is None else sinks[..., None].expand(-1, G, R, N).flatten(2)
        merged, shares = merge_partials(parts, logits)
        output[:, :, new] = merged.reshape(B, H, N, D)
        if shown:
            alone = len(parts) == 1 and sinks is None
            rows = [part.probs for part in parts if part.probs is not None]
            probs = rows if alone else [x * share[..., None] for x, share in zip(rows, shares, strict=True)]
            count = torch.stack([mask.sum(-1) for mask in seen]).sum(0)
            show(new, [x.view(B, G, R, N, -1) for x in probs], count.expand(B, G, N))
    return output


def _masked(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, visible: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attend query [B,G,R·N,D] over the first S' tokens, which `visible` [B,1|G,N,S'] is of; 0 where it sees none."""
    S, R = visible.shape[-1], query.shape[2] // visible.shape[2]
    mask = visible.repeat(1, 1, R, 1)
    attended = F.scaled_dot_product_attention(query, keys[:, :, :S], values[:, :, :S], mask, scale=scale)
    return attended.masked_fill(~visible.any(dim=-1).repeat(1, 1, R)[..., None], 0.0)


def _joined(parts: Sequence[torch.Tensor], dim: int = 2) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat([*parts], dim=dim)
