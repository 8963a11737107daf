"""Causal attention over a prompt that shows its rows as it goes, and never makes an S×S matrix (H2O, 2306.14048).

Shapes: B batch, H query heads, G key/value heads, R = H/G, T tokens, N queries of a chunk, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from pikv_kernels.partial_attention import causal_attention

CHUNK_ELEMENTS, LEAST_QUERIES = 2**26, 16  # logits at a time
HEAD_ELEMENTS, HEAD_ROWS = 2**19, 128  # on a CPU, of a head at a time: they are in the core's caches when they are used

Show = Callable[[slice, torch.Tensor], None]


def prefill_rows(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, num_shown: int, show: Show
) -> torch.Tensor:
    """Return the output [B,H,T,D], and show the attention of the newest `num_shown` queries, a chunk at a time.

    query: [B,H,T,D]; keys, values: [B,G,T,D] of the same tokens; each attends over itself and before. show: called
    with a slice of the queries and their softmax rows [B,G,R,N,S'] float32 over the first S' tokens, up to the last
    of these queries, without gradients; the next chunk's overwrite them.
    """
    first = max(0, query.shape[2] - num_shown)
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (query, keys, values))
    output = causal_attention(query, keys, values, scale) if first or learns else torch.empty_like(query)
    _show_rows(query, keys, values, scale, first, None if first or learns else output, show)
    return output


@torch.no_grad()
def _show_rows(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    first: int,
    output: torch.Tensor | None,
    show: Show,
) -> None:
    """Show the rows of all queries from the first on, and write what they attend to, if there is where to."""
    B, H, T, D = query.shape
    G = keys.shape[1]
    R = H // G
    chunk = min(T - first, max(LEAST_QUERIES, CHUNK_ELEMENTS // (B * H * T)))
    parts = [slice(None)]
    if query.device.type == "cpu":
        chunk = min(chunk, max(1, HEAD_ROWS // R, HEAD_ELEMENTS // (R * T)))
        parts = [slice(head, head + 1) for head in range(B * G)]
    ahead = torch.full((chunk, chunk), -torch.inf, device=query.device).triu(1)
    keys, values = keys.float().flatten(0, 1), values.flatten(0, 1)
    room = query.new_empty(B * H * chunk * T, dtype=torch.float32)
    for start in range(first, T, chunk):
        end = min(T, start + chunk)
        new = end - start
        rows = (query[:, :, start:end].float() * scale).reshape(B * G, R * new, D)
        probs = room[: B * H * new * end].view(B * G, R * new, end)
        attended = torch.empty_like(rows, dtype=values.dtype)
        for part in parts:
            logits = probs[part]
            torch.matmul(rows[part], keys[part, :end].transpose(-1, -2), out=logits)
            logits.view(-1, R, new, end)[..., start:].add_(ahead[:new, :new])
            torch.softmax(logits, dim=-1, out=logits)
            if output is not None:
                torch.matmul(logits.to(values.dtype), values[part, :end], out=attended[part])
        if output is not None:
            output[:, :, start:end] = attended.view(B, H, new, D)
        show(slice(start, end), probs.view(B, G, R, new, end))
