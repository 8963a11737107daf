"""Combine attentions over disjoint sets of tokens by their log-sum-exp (split tokens, codecs, shards)."""

from __future__ import annotations

import torch

from pikv_kernels.partial_attention import Partial


def merge_partials(parts: list[Partial], sinks: torch.Tensor | None = None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the joint output [B,G,N,D] and each part's share [B,G,N] float32 of the softmax mass.

    sinks: logits [B|1,G,N] that take mass and give nothing (attention sinks of gpt-oss). Rows that see nothing get 0.
    """
    if len(parts) == 1 and sinks is None:
        return parts[0].output, [(parts[0].lse > -torch.inf).float()]
    lses = torch.stack([part.lse for part in parts])
    total = torch.logsumexp(lses, dim=0)
    if sinks is not None:
        total = torch.logaddexp(total, sinks.float())
    total = total.masked_fill(total == -torch.inf, 0.0)
    shares = list(torch.exp(lses - total))
    output = sum(part.output.float() * share[..., None] for part, share in zip(parts, shares, strict=True))
    assert isinstance(output, torch.Tensor)
    return output.to(parts[0].output.dtype), shares


def join_partials(parts: list[Partial]) -> Partial:
    """Return attentions over consecutive pieces of one run of tokens as if they had been one, `probs` too if given."""
    if len(parts) == 1:
        return parts[0]
    output, shares = merge_partials(parts)
    lse = torch.stack([part.lse for part in parts]).logsumexp(dim=0)
    probs = [part.probs * share[..., None] for part, share in zip(parts, shares) if part.probs is not None]
    return Partial(output, lse, torch.cat(probs, dim=-1) if probs else None)
