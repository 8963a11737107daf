"""How much of what the newest queries attend to would still be there: the hit rate of an eviction, before it is done.

Shapes: B batch, G key/value heads, S stored tokens, E ways to score them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def hit_rates(
    mass: torch.Tensor, scores: Iterable[torch.Tensor], position: torch.Tensor, capacity: torch.Tensor
) -> torch.Tensor:
    """Return, for each head, the share [B,G,E] of the attention `mass` [B,G,S] on tokens that a score would keep.

    Kept are the `capacity` [B,G] tokens of the highest score [B,G,S], newer ones on ties; of empty slots, where
    `position` is -1, neither score nor mass counts. 0 where there is no mass.
    """
    import torch

    by_age = position.argsort(dim=-1, stable=True)
    is_empty = position < 0
    mass = mass.masked_fill(is_empty, 0.0).gather(-1, by_age)
    total = mass.sum(dim=-1)
    capacity = capacity.clamp(max=position.shape[-1])[..., None]
    most = max(1, int(capacity.max()))
    score = torch.stack(list(scores)).masked_fill(is_empty, -torch.inf)  # [E,B,G,S]
    score = score.gather(-1, by_age.expand_as(score))
    threshold = score.topk(most, dim=-1).values.gather(-1, (capacity - 1).clamp(min=0).expand_as(score[..., :1]))
    is_above, is_tie = score > threshold, score == threshold
    newer_ties = is_tie.flip(-1).cumsum(dim=-1).flip(-1)  # and the token itself
    is_kept = is_above | (is_tie & (newer_ties <= capacity - is_above.sum(dim=-1, keepdim=True)))
    hits = mass.masked_fill(~is_kept, 0.0).sum(dim=-1)
    return torch.where(total > 0, hits / total, 0.0).movedim(0, -1)
