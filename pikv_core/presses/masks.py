"""Attention masks around a press: which tokens of a prompt are none, and which slots a later query sees.

Shapes: B batch, T new tokens, S stored slots.
"""

from __future__ import annotations

from typing import Any

import torch

from pikv_core.cache.attention import DeferredMask
from pikv_core.errors import UsageError


def real_tokens(mask: Any, num_new: int) -> torch.Tensor | None:
    """Return bool [B,T], False for padding, read off what a prompt's attention is given; None where there is none."""
    if mask is None:
        return None
    if isinstance(mask, DeferredMask):
        return mask.is_token(num_new)
    if not isinstance(mask, torch.Tensor) or mask.dim() not in (2, 4):
        raise UsageError(
            f"a press reads padding off masks [B,T] and [B,1,T,T], not off {type(mask).__name__}",
            hint="call model.set_attn_implementation('sdpa')",
        )
    own = mask[:, :num_new] if mask.dim() == 2 else mask[:, 0, :num_new, :num_new].diagonal(dim1=-2, dim2=-1)
    is_token = own == 0 if own.is_floating_point() else own.bool()
    return None if bool(is_token.all()) else is_token


def later_mask(given: Any, is_kept: torch.Tensor, num_slots: int, num_new: int) -> torch.Tensor:
    """Return the mask [B,1,T,S] of new tokens over a pressed cache and themselves, in the form of the one given.

    transformers' own goes by places in the text, which a pressed cache's slots are not. is_kept: bool [B,S'] of the
    slots that the prompt left.
    """
    if isinstance(given, torch.Tensor) and given.dim() != 4:
        raise UsageError("a pressed batch with padding needs a mask of each query", hint="use attention 'sdpa'")
    B, num_kept = is_kept.shape
    causal = torch.ones(num_new, num_slots, dtype=torch.bool, device=is_kept.device).tril(num_slots - num_new)
    visible = causal.expand(B, 1, -1, -1).clone()
    visible[..., :num_kept] &= is_kept[:, None, None]
    if isinstance(given, torch.Tensor) and given.is_floating_point():
        hidden = torch.finfo(given.dtype).min
        return torch.zeros(visible.shape, dtype=given.dtype, device=given.device).masked_fill(~visible, hidden)
    return visible
