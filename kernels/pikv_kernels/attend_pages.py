"""Attention of one new token over some pages of its keys and values (Quest, arXiv 2406.10774).

The kernel is `decode_attention`'s, which walks listed pages instead of all tokens. Shapes: B batch, G key/value heads,
H query heads, S stored tokens, P listed pages, D head dim.
"""

from __future__ import annotations

import torch

from pikv_kernels.backends import choose
from pikv_kernels.decode_attention import Decoded, FullKV, as_decoded, attend_on_gpu
from pikv_kernels.partial_attention import partial_attention
from pikv_kernels.split_tokens import see_nothing


def attend_pages(
    query: torch.Tensor,
    store: FullKV,
    pages: torch.Tensor,
    page_tokens: int,
    scale: float,
    lengths: torch.Tensor | None = None,
    backend: str | None = None,
) -> Decoded:
    """Attend query [B,H,D] over the tokens of pages [B,G,P], each of the `page_tokens` tokens from page · page_tokens.

    pages: in any order, each once; -1 is none. lengths: tokens [B,G] that a head sees of the first ones. Tokens beyond
    S are not seen, and what is stored of tokens not seen may be NaN. The mass is None.
    """
    if choose("attend_pages", store.keys, backend) == "torch":
        return define_attend_pages(query, store, pages, page_tokens, scale, lengths)
    rows = query.unflatten(1, (store.keys.shape[1], -1))
    return as_decoded(attend_on_gpu(rows, store, None, scale, None, False, lengths, pages, page_tokens))


def define_attend_pages(
    query: torch.Tensor,
    store: FullKV,
    pages: torch.Tensor,
    page_tokens: int,
    scale: float,
    lengths: torch.Tensor | None = None,
) -> Decoded:
    """Do as `attend_pages` does, plainly: gather the tokens and attend over them in float32."""
    (B, H, D), (G, S) = query.shape, store.keys.shape[1:3]
    if pages.numel() * S == 0:
        return as_decoded(see_nothing(query.unflatten(1, (G, -1)), store.values.shape[3], S, with_probs=False))
    token = (pages[..., None] * page_tokens + torch.arange(page_tokens, device=pages.device)).flatten(2)
    end = torch.full((B, G), S, device=pages.device) if lengths is None else lengths.clamp(max=S)
    visible = (token >= 0) & (token < end[:, :, None])
    rows = token.clamp(0, S - 1)[..., None]
    picked = (x.gather(2, rows.expand(-1, -1, -1, x.shape[3])).float() for x in store)
    keys, values = (x.masked_fill(~visible[..., None], 0.0) for x in picked)
    rows_of_query = query.float().view(B, G, H // G, D)
    part = partial_attention(rows_of_query, keys, values, visible[:, :, None], scale)
    return Decoded(part.output.view(B, H, -1).to(query.dtype), part.lse.view(B, H), None)
