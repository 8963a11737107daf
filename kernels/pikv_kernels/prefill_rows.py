"""Causal attention over a prompt that shows its rows as it goes, and never makes an S×S matrix (H2O, 2306.14048).

Shapes: B batch, H query heads, G key/value heads, R = H/G, T tokens, N queries of a chunk, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from pikv_kernels.partial_attention import causal_attention

CHUNK_ELEMENTS = 2**20  # logits at a time: they stay in the caches of a CPU core
LEAST_QUERIES = 16

Show = Callable[[slice, torch.Tensor], None]


def prefill_rows(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, num_shown: int, show: Show
) -> torch.Tensor:
    """Return the output [B,H,T,D], and show the attention of the newest `num_shown` queries, a chunk at a time.

    query: [B,H,T,D]; keys, values: [B,G,T,D] of the same tokens; each attends over itself and before. show: called
    with a slice of the queries and their softmax rows [B,G,R,N,S'] float32 over the first S' tokens, up to the last
    of these queries.
    """
    B, H, T, D = query.shape
    G = keys.shape[1]
    R = H // G
    first = max(0, T - num_shown)
    output = torch.empty_like(query) if first == 0 else causal_attention(query, keys, values, scale)
    chunk = min(T - first, max(LEAST_QUERIES, CHUNK_ELEMENTS // (B * H * T)))
    ahead = torch.full((chunk, chunk), -torch.inf, device=query.device).triu(1)
    keys = keys.float()
    for start in range(first, T, chunk):
        end = min(T, start + chunk)
        new = end - start
        rows = (query[:, :, start:end].float() * scale).reshape(B, G, R * new, D)
        logits = torch.matmul(rows, keys[:, :, :end].transpose(-1, -2))
        logits.view(B, G, R, new, end)[..., start:].add_(ahead[:new, :new])
        probs = torch.softmax(logits, dim=-1)
        if first == 0:
            output[:, :, start:end] = torch.matmul(probs.to(values.dtype), values[:, :, :end]).reshape(B, H, new, D)
        show(slice(start, end), probs.view(B, G, R, new, end))
    return output
