"""Attention of one new token over a lane's stores, and the rows that observers see of it.

Shapes: B batch, H query heads, G key/value heads, R = H/G, S stored slots, K pages, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from pikv_core.cache.store import Store
from pikv_kernels.merge_partials import merge_partials
from pikv_kernels.partial_attention import Partial

Show = Callable[[list[torch.Tensor], torch.Tensor], None]


class Read(NamedTuple):
    """What is read of a store: all of it, or pages [B,G,K] of `page_tokens` slots.

    visible: bool [B,1|G,1,S] of all its slots, None where what is read is seen.
    """

    store: Store
    visible: torch.Tensor | None
    pages: torch.Tensor | None = None
    page_tokens: int = 0


def attend_newest(
    query: torch.Tensor,
    read: Sequence[Read],
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
    show: Show | None,
) -> torch.Tensor:
    """Return the output [B,H,1,D] of query [B,H,1,D], and show its attention if asked to; not of pages.

    sinks: logits [B|1,G,R] that take attention and give nothing. show: called with each store's softmax rows
    [B,G,R,1,S] over what all stores hold, and how many slots the query sees [B,G,1].
    """
    B, G = len(query), read[0].store.num_heads
    rows = query.reshape(B, G, -1, query.shape[-1])
    if len(read) == 1 and softcap is None and sinks is None and show is None:
        return read[0].store.attend_alone(rows, *read[0][1:], scale).reshape(query.shape)
    parts = attend_reads(rows, read, scale, softcap, show is not None)
    probs = [part.probs for part in parts if part.probs is not None]
    if len(parts) > 1 or sinks is not None:
        merged, shares = merge_partials(parts, sinks)
        probs = [x * share[..., None] for x, share in zip(probs, shares)]
    else:
        merged = parts[0].output
    if show is not None:
        whole = sum(x.shape[-1] for x, r in zip(probs, read) if r.visible is None)
        counts = query.new_full((1, 1, 1), whole, dtype=torch.int64)
        for part in read:
            counts = counts if part.visible is None else counts + part.visible.sum(-1)
        show([x[:, :, :, None] for x in probs], counts.expand(B, G, 1))
    return merged.reshape(query.shape)


def attend_reads(
    rows: torch.Tensor, read: Sequence[Read], scale: float, softcap: float | None, with_probs: bool
) -> list[Partial]:
    """Attend rows [B,G,R,D] over each of what is read; without `probs` where that is pages."""
    parts = []
    for store, visible, pages, page_tokens in read:
        if pages is None:
            parts.append(store.attend(rows, visible, scale, softcap, with_probs))
        else:
            parts.append(store.attend_pages(rows, visible, pages, page_tokens, scale, softcap))
    return parts
