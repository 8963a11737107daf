"""Order tokens by two whole numbers at once, which one float32 has not the digits for.

Shapes: B batch, G key/value heads, S stored tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def rank(first: torch.Tensor, then: torch.Tensor) -> torch.Tensor:
    """Return float32 [B,G,S], comparable over the heads of a row: larger where `first` is, on ties where `then` is.

    Both hold whole numbers from -1 to 2^24; tokens that agree in both get the same rank.
    """
    import torch

    key = (first.long() * 2**25 + then.long()).flatten(1)
    ordered, order = key.sort(dim=1)
    steps = torch.zeros_like(ordered)
    steps[:, 1:] = ordered.diff(dim=1) != 0
    return torch.empty_like(key).scatter_(1, order, steps.cumsum(1)).view(then.shape).float()
