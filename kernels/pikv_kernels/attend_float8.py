"""Attention of one new token over keys and values in e4m3 with a scale a page, plainly, by numba or Triton.

Shapes: B batch, G key/value heads, R query rows of a head's group, U pages of T tokens, S = U·T, K pages that are read,
D head dim.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from pikv_kernels.attend_tokens import attend_pages
from pikv_kernels.backends import choose_for_newest
from pikv_kernels.decode_attention import what_hinders
from pikv_kernels.float8 import decode_e4m3
from pikv_kernels.partial_attention import Partial, partial_attention


def attend_float8(
    query: torch.Tensor,
    codes: Mapping[str, torch.Tensor],
    visible: torch.Tensor | None,
    scale: float,
    softcap: float | None = None,
    with_probs: bool = False,
    backend: str | None = None,
) -> Partial:
    """Attend query [B,G,R,D] over bytes of e4m3; `visible` bool [B,1|G,1,S], None for all.

    codes: key_codes and value_codes [B,G,U,T,D], NaN not among them, with key_scale and value_scale float32 [B,G,U].
    backend: "torch", "numba" or "triton".
    """
    chosen = choose_for_float8(query, codes, backend)
    if chosen == "torch":
        return partial_attention(query, *decode(codes, query.dtype), visible, scale, softcap, with_probs)
    return attend_float8_pages(query, codes, None, visible, scale, softcap, with_probs, chosen)


def choose_for_float8(query: torch.Tensor, codes: Mapping[str, torch.Tensor], backend: str | None = None) -> str:
    """Return what attends over bytes of e4m3; see `choose_for_newest`."""
    keys, values = codes["key_codes"], codes["value_codes"]
    return choose_for_newest("attend_float8", query, keys, backend, what_hinders(query, keys, values))


def attend_float8_pages(
    query: torch.Tensor,
    codes: Mapping[str, torch.Tensor],
    pages: torch.Tensor | None,
    visible: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    with_probs: bool = False,
    backend: str = "numba",
) -> Partial:
    """Attend by a kernel over the pages int64 [B,G,K] of T tokens, without probs, or over all; see `attend_float8`."""
    keys, values = (codes[f"{kind}_codes"].flatten(2, 3) for kind in ("key", "value"))
    if backend == "numba":
        keys, values = keys.view(torch.float8_e4m3fn), values.view(torch.float8_e4m3fn)
    scales = codes["key_scale"], codes["value_scale"]
    page_tokens = codes["key_codes"].shape[3]
    return attend_pages(query, keys, values, pages, page_tokens, visible, scale, softcap, with_probs, backend, scales)


def decode(codes: Mapping[str, torch.Tensor], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values [B,G,S,D] in `dtype`."""

    def decoded(kind: str) -> torch.Tensor:
        numbers = decode_e4m3(codes[f"{kind}_codes"])
        return numbers.mul_(codes[f"{kind}_scale"][..., None, None]).to(dtype).flatten(2, 3)

    return decoded("key"), decoded("value")
