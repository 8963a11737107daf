"""Upper bounds of the attention logits of whole pages of keys (Quest, arXiv 2406.10774), by the definition or numba.

Shapes: B batch, G key/value heads, R query heads of a group, P pages, D head dim.
"""

from __future__ import annotations

import torch

from pikv_kernels.backends import choose_for_newest


def page_scores(
    query: torch.Tensor, lowest: torch.Tensor, highest: torch.Tensor, backend: str | None = None
) -> torch.Tensor:
    """Return scores [B,G,P] of pages for one query per head [B,G,R,D], bounds [B,G,P,D]; on a CPU in float32.

    Per query head the bound is Σ_c max(q_c·highest_c, q_c·lowest_c); a group's score is the sum over its heads,
    which makes it one matrix-vector product each for the positive and the negative part of the query. backend: "torch"
    or "numba".
    """
    positive = query.clamp(min=0).sum(dim=2, keepdim=True)
    negative = query.clamp(max=0).sum(dim=2, keepdim=True)
    if choose_for_newest("page_scores", query, lowest, backend) == "numba":
        return _by_numba(positive, negative, lowest, highest)
    score = torch.matmul(positive, highest.transpose(-1, -2)) + torch.matmul(negative, lowest.transpose(-1, -2))
    return score[:, :, 0]


def _by_numba(
    positive: torch.Tensor, negative: torch.Tensor, lowest: torch.Tensor, highest: torch.Tensor
) -> torch.Tensor:
    from pikv_kernels.cpu_heads import by_head, over_heads
    from pikv_kernels.cpu_page_scores import make_kernel

    B, G, P, D = lowest.shape
    kernel = make_kernel(D)
    scores = torch.empty(B, G, 1, P, dtype=torch.float32, device=lowest.device)
    arrays = [by_head(x) for x in (positive.float(), negative.float(), lowest, highest, scores)]
    over_heads(lambda first, end: kernel(*arrays[:4], P, arrays[4], first, end), B * G)
    return scores[:, :, 0]
