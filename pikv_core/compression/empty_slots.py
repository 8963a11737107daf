"""What a codec puts in slots that hold no token, so that they change nothing of their neighbours' codes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def fill_empty(x: torch.Tensor, position: torch.Tensor, block_tokens: int) -> torch.Tensor:
    """Return x [B,G,N,D] with empty slots (position [B,G,N] of -1) within the range of their block's tokens.

    Each channel of an empty slot gets the lowest value that the block's tokens have there; 0 in a block without any.
    """
    import torch

    is_token = (position >= 0)[..., None]
    if is_token.all():
        return x
    blocks = x.masked_fill(~is_token, torch.inf).unflatten(2, (-1, block_tokens))
    lowest = blocks.amin(dim=3, keepdim=True)
    lowest = lowest.masked_fill(lowest == torch.inf, 0).expand_as(blocks).flatten(2, 3)
    return torch.where(is_token, x, lowest)
