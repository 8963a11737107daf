"""Upper bounds of the attention logits of whole pages of keys (Quest, arXiv 2406.10774).

Shapes: B batch, G key/value heads, R query heads of a group, P pages, D head dim.
"""

from __future__ import annotations

import torch


def page_scores(query: torch.Tensor, lowest: torch.Tensor, highest: torch.Tensor) -> torch.Tensor:
    """Return scores [B,G,P] of pages for one query per head [B,G,R,D], bounds [B,G,P,D].

    Per query head the bound is Σ_c max(q_c·highest_c, q_c·lowest_c); a group's score is the sum over its heads,
    which makes it one matrix-vector product each for the positive and the negative part of the query.
    """
    positive = query.clamp(min=0).sum(dim=2, keepdim=True)
    negative = query.clamp(max=0).sum(dim=2, keepdim=True)
    score = torch.matmul(positive, highest.transpose(-1, -2)) + torch.matmul(negative, lowest.transpose(-1, -2))
    return score[:, :, 0]
