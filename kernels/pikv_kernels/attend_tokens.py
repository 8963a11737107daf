"""Attention of one new token over keys and values as they are, by the definition or numba.

Shapes: B batch, G key/value heads, R query rows of a head's group, S stored tokens, K pages that are read, D channels
of a key, V of a value.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pikv_kernels.backends import choose_for_newest
from pikv_kernels.partial_attention import Partial, partial_attention

BLOCK_TOKENS = 64


def attend_tokens(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    visible: torch.Tensor | None,
    scale: float,
    softcap: float | None = None,
    with_probs: bool = False,
    backend: str | None = None,
) -> Partial:
    """Attend query [B,G,R,D] over keys [B,G,S,D] and values [B,G,S,V]; `visible` bool [B,1|G,1,S], None for all.

    backend: "torch" or "numba".
    """
    if choose_for_newest("attend_tokens", query, keys, backend) == "numba":
        return attend_pages(query, keys, values, None, BLOCK_TOKENS, visible, scale, softcap, with_probs)
    return partial_attention(query, keys, values, visible, scale, softcap, with_probs)


def attend_alone(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, visible: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Do as `attend_tokens` does where only the output is wanted, and every row sees a token; by torch, as SDPA."""
    if choose_for_newest("attend_tokens", query, keys) == "numba":
        return attend_pages(query, keys, values, None, BLOCK_TOKENS, visible, scale, None).output
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=visible, scale=scale)


def attend_pages(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    pages: torch.Tensor | None,
    page_tokens: int,
    visible: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    with_probs: bool = False,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Partial:
    """Attend by numba over the pages int64 [B,G,K], without probs, or over all tokens; see `attend_tokens`.

    scales: float32 [B,G,S/page_tokens] each, by which keys and values of a page are multiplied.
    """
    from pikv_kernels.cpu_attend_tokens import make_kernel
    from pikv_kernels.cpu_heads import NO_SCALES, attend_heads, by_head

    assert pages is None or not with_probs
    S, V = values.shape[2:]
    kernel = make_kernel(query.shape[2], query.shape[3], V, page_tokens)
    stored = [by_head(keys), by_head(values), *([NO_SCALES] * 2 if scales is None else map(by_head, scales))]
    return attend_heads(kernel, query, stored, pages, S, S, V, visible, scale, softcap, with_probs)
