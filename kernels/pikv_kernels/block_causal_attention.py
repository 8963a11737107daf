"""Causal attention for training on a CPU: blocks of queries against all keys up to theirs, the probabilities kept.

The query heads of a key/value head are rows of one product, and a block is a view, so nothing is copied or repeated.
Kept are T²/2 probabilities of each head, for which the backward pass has no softmax to take again.
Shapes: M batch × key/value heads, T tokens, R query heads of a group, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BLOCK = 128  # queries


def block_causal_attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attend query [M, T·R, D], scaled, rows of one token together, over keys and values [M, T, D] up to each token."""
    return _BlockCausalAttention.apply(query, keys, values)


def causal_attention_reference(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Return what `block_causal_attention` does: its definition."""
    rows, num_tokens = query.shape[1], keys.shape[1]
    place = torch.arange(rows, device=query.device) // (rows // max(1, num_tokens))
    hidden = torch.arange(num_tokens, device=query.device)[None] > place[:, None]
    return (query @ keys.mT).masked_fill(hidden, -torch.inf).softmax(-1) @ values


class _BlockCausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        num_tokens = keys.shape[1]
        group = query.shape[1] // max(1, num_tokens)
        output = torch.empty_like(query)
        ahead = torch.full((BLOCK, BLOCK), -torch.inf, dtype=query.dtype, device=query.device).triu(1)
        ahead = ahead.repeat_interleave(group, 0)
        kept = []
        for start, end in _blocks(num_tokens):
            rows = slice(start * group, end * group)
            logits = torch.bmm(query[:, rows], keys[:, :end].mT)
            logits[:, :, start:].add_(ahead[: (end - start) * group, : end - start])
            probs = torch.softmax(logits, -1)
            torch.bmm(probs, values[:, :end], out=output[:, rows])
            kept.append(probs)
        ctx.save_for_backward(query, keys, values, *kept)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, keys, values, *kept = ctx.saved_tensors
        num_tokens = keys.shape[1]
        group = query.shape[1] // max(1, num_tokens)
        d_query, d_keys, d_values = (torch.empty_like(like) for like in (query, keys, values))
        # The last block reaches every key, so its gradients are the first and need no zeros before them.
        for (start, end), probs in zip(reversed(_blocks(num_tokens)), reversed(kept), strict=True):
            rows = slice(start * group, end * group)
            d_probs = torch.bmm(d_output[:, rows], values[:, :end].mT)
            d_logits = torch._softmax_backward_data(d_probs, probs, -1, probs.dtype)
            torch.bmm(d_logits, keys[:, :end], out=d_query[:, rows])
            if end == num_tokens:
                torch.bmm(d_logits.mT, query[:, rows], out=d_keys)
                torch.bmm(probs.mT, d_output[:, rows], out=d_values)
            else:
                d_keys[:, :end] += torch.bmm(d_logits.mT, query[:, rows])
                d_values[:, :end] += torch.bmm(probs.mT, d_output[:, rows])
        return d_query, d_keys, d_values


def _blocks(num_tokens: int) -> list[tuple[int, int]]:
    return [(start, min(num_tokens, start + BLOCK)) for start in range(0, num_tokens, BLOCK)]
