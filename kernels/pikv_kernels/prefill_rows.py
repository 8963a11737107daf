"""Causal attention over a prompt, with the attention each token receives, and never an S×S matrix (H2O, 2306.14048).

Shapes: B batch, H query heads, G key/value heads, R = H/G, T tokens, D head dim.
"""

from __future__ import annotations

import torch

CHUNK_ELEMENTS = 2**20  # logits at a time: they stay in the caches of a CPU core
LEAST_QUERIES = 16


def prefill_mass(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output [B,H,T,D] and the mass [B,G,T] float32: summed over queries, mean over a group's heads.

    query: [B,H,T,D]; keys, values: [B,G,T,D] of the same tokens; each attends over itself and before.
    """
    B, H, T, D = query.shape
    G = keys.shape[1]
    R = H // G
    chunk = min(T, max(LEAST_QUERIES, CHUNK_ELEMENTS // (B * H * T)))
    ahead = torch.full((chunk, chunk), -torch.inf, device=query.device).triu(1)
    keys = keys.float()
    output = torch.empty_like(query)
    mass = torch.zeros(B, G, T, dtype=torch.float32, device=query.device)
    for start in range(0, T, chunk):
        end = min(T, start + chunk)
        new = end - start
        rows = (query[:, :, start:end].float() * scale).reshape(B, G, R * new, D)
        logits = torch.matmul(rows, keys[:, :, :end].transpose(-1, -2))
        logits.view(B, G, R, new, end)[..., start:].add_(ahead[:new, :new])
        probs = torch.softmax(logits, dim=-1)
        output[:, :, start:end] = torch.matmul(probs.to(values.dtype), values[:, :, :end]).reshape(B, H, new, D)
        mass[:, :, :end] += probs.sum(dim=2) / R
    return output, mass
