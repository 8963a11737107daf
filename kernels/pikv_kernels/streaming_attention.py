"""Causal attention over the first tokens and a window of the newest alone, a block of queries at a time (2309.17453).

Shapes: B batch, H query heads, G key/value heads, R = H/G, T tokens, N queries of a block, D head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pikv_kernels.partial_attention import causal_attention

BLOCK_QUERIES = 128


def streaming_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, sinks: int, recent: int
) -> torch.Tensor:
    """Return [B,H,T,D]; each query sees the first `sinks` tokens and the newest `recent`, itself among these.

    query: [B,H,T,D]; keys, values: [B,G,T,D] of the same tokens. Time grows with T·(sinks + recent), and nothing larger
    than a block's queries times what they see is made.
    """
    B, H, T, D = query.shape
    G = keys.shape[1]
    R = H // G
    near = min(T, sinks + recent)  # queries that see all that came before
    output = torch.empty_like(query)
    output[:, :, :near] = causal_attention(query[:, :, :near], keys[:, :, :near], values[:, :, :near], scale)
    first = torch.arange(BLOCK_QUERIES, device=query.device)[:, None]
    behind = torch.arange(recent - 1 + BLOCK_QUERIES, device=query.device) - first
    seen = F.pad((behind >= 0) & (behind < recent), (sinks, 0), value=True)
    for start in range(near, T, BLOCK_QUERIES):
        end = min(T, start + BLOCK_QUERIES)
        new = end - start
        window = slice(start - recent + 1, end)
        seen_keys, seen_values = (torch.cat([x[:, :, :sinks], x[:, :, window]], dim=2) for x in (keys, values))
        rows = query[:, :, start:end].reshape(B, G, R * new, D)
        mask = seen[:new, : sinks + recent - 1 + new].repeat(R, 1)
        attended = F.scaled_dot_product_attention(rows, seen_keys, seen_values, mask, scale=scale)
        output[:, :, start:end] = attended.reshape(B, H, new, D)
    return output
