"""Attention of some queries over some stored tokens, with what is needed to merge it with other parts.

Shapes: B batch, G key/value heads, N query rows of a head's group (group × T new tokens), S stored tokens, D head dim.
The plain PyTorch definition, float32 inside; any device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F


class Partial(NamedTuple):
    """A part of an attention: `output` [B,G,N,D], `lse` [B,G,N] float32, `probs` [B,G,N,S] float32 or None.

    Rows that see no token have output 0 and lse -inf. `probs` sum to 1 over this part's tokens.
    """

    output: torch.Tensor
    lse: torch.Tensor
    probs: torch.Tensor | None


def partial_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    visible: torch.Tensor | None,
    scale: float,
    softcap: float | None = None,
    with_probs: bool = False,
) -> Partial:
    """Attend query [B,G,N,D] over keys and values [B,G,S,D]; `visible` bool [B,1|G,1|N,S], None for all."""
    logits = torch.matmul(query.float() * scale, keys.float().transpose(-1, -2))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if visible is not None:
        logits.masked_fill_(~visible, -torch.inf)
    lowest = torch.finfo(torch.float32).min
    if logits.shape[-1]:
        highest = logits.amax(dim=-1, keepdim=True).clamp_(min=lowest)
    else:
        highest = logits.new_full((*logits.shape[:-1], 1), lowest)
    probs = logits.sub_(highest).exp_()
    total = probs.sum(dim=-1, keepdim=True)
    lse = (highest + total.log())[..., 0]
    probs.div_(total.clamp(min=torch.finfo(torch.float32).tiny))
    return Partial(torch.matmul(probs.to(values.dtype), values), lse, probs if with_probs else None)


def causal_attention(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """Attend query [B,H,T,D] over the same T tokens' keys and values [B,G,T,D], each over itself and before."""
    groups = query.shape[1] // keys.shape[1]
    by_group = groups > 1 and query.device.type == "cpu"  # elsewhere only some of SDPA's kernels know of groups
    if groups > 1 and not by_group:
        keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(query, keys, values, is_causal=True, scale=scale, enable_gqa=by_group)
