"""Attention of one new token over keys and values as they are, by the definition, numba or Triton.

Shapes: B batch, G key/value heads, R query rows of a head's group, S stored tokens, K pages that are read, D channels
of a key, V of a value.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pikv_kernels.backends import choose_for_newest
from pikv_kernels.decode_attention import Float8KV, FullKV, attend_on_gpu, what_hinders
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

    backend: "torch", "numba" or "triton".
    """
    chosen = choose_for_tokens("attend_tokens", query, keys, values, backend)
    if chosen == "torch":
        return partial_attention(query, keys, values, visible, scale, softcap, with_probs)
    return attend_pages(query, keys, values, None, BLOCK_TOKENS, visible, scale, softcap, with_probs, chosen)


def attend_alone(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, visible: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Do as `attend_tokens` does where only the output is wanted, and every row sees a token; by torch, as SDPA."""
    chosen = choose_for_tokens("attend_tokens", query, keys, values)
    if chosen == "torch":
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=visible, scale=scale)
    return attend_pages(query, keys, values, None, BLOCK_TOKENS, visible, scale, None, False, chosen).output


def choose_for_tokens(
    op: str, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, backend: str | None = None
) -> str:
    """Return what attends over keys and values; see `choose_for_newest`."""
    return choose_for_newest(op, query, keys, backend, what_hinders(query, keys, values))


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
    backend: str = "numba",
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Partial:
    """Attend by numba or Triton over the pages int64 [B,G,K], without probs, or all tokens; see `attend_tokens`.

    A page of -1 is none. scales: float32 [B,G,U] each, by which keys and values of S/U tokens are multiplied; for numba
    U pages.
    """
    if backend == "triton":
        store = FullKV(keys, values) if scales is None else Float8KV(keys, scales[0], values, scales[1])
        page_tokens = 0 if pages is None else page_tokens
        return attend_on_gpu(query, store, visible, scale, softcap, with_probs, None, pages, page_tokens)
    from pikv_kernels.cpu_attend_tokens import make_kernel
    from pikv_kernels.cpu_heads import NO_SCALES, attend_heads, by_head

    assert pages is None or not with_probs
    S, V = values.shape[2:]
    kernel = make_kernel(query.shape[2], query.shape[3], V, page_tokens)
    stored = [by_head(keys), by_head(values), *([NO_SCALES] * 2 if scales is None else map(by_head, scales))]
    return attend_heads(kernel, query, stored, pages, S, S, V, visible, scale, softcap, with_probs)
