"""Upper bounds of the attention logits of whole pages of keys (Quest, arXiv 2406.10774), and the pages of the highest.

Shapes: B batch, G key/value heads, R query heads of a group, P pages, D head dim, K pages that are read.
"""

from __future__ import annotations

import torch

from pikv_kernels.backends import choose_for_newest, jit, tl, triton
from pikv_kernels.split_tokens import next_power

PAGES_PER_PROGRAM = 32


def page_scores(
    query: torch.Tensor, lowest: torch.Tensor, highest: torch.Tensor, backend: str | None = None
) -> torch.Tensor:
    """Return scores [B,G,P] of pages for one query per head [B,G,R,D], bounds [B,G,P,D].

    Per query head the bound is Σ_c max(q_c·highest_c, q_c·lowest_c); a group's score is the sum over its heads,
    which makes it one matrix-vector product each for the positive and the negative part of the query. The definition
    computes in the inputs' dtype and returns it, the kernels in float32. backend: "torch", "numba" or "triton".
    """
    chosen = choose_for_newest("page_scores", query, lowest, backend, hindrance=None)
    if chosen == "triton":
        return _score_on_gpu(query, lowest, highest)
    positive = query.clamp(min=0).sum(dim=2, keepdim=True)
    negative = query.clamp(max=0).sum(dim=2, keepdim=True)
    if chosen == "numba":
        return _score_on_cpu(positive, negative, lowest, highest)
    score = torch.matmul(positive, highest.transpose(-1, -2)) + torch.matmul(negative, lowest.transpose(-1, -2))
    return score[:, :, 0]


def page_topk(scores: torch.Tensor, num_pages: int) -> torch.Tensor:
    """Return the pages [B,G,K] of the highest scores [B,G,P], in no order; all of them where there are fewer."""
    return scores.topk(min(num_pages, scores.shape[-1]), dim=-1, sorted=False).indices


@jit(do_not_specialize=["num_pages"])
def _score(
    query, lowest, highest, scores, num_pages, G, stride_lb, stride_lg, stride_lp, stride_hb, stride_hg, stride_hp,
    R: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # One program a key/value head and block of pages.
    head = tl.program_id(0).to(tl.int64)
    page, column, row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, COLUMNS), tl.arange(0, ROWS)
    inside = column < D
    there = (page < num_pages)[:, None] & inside[None, :]
    rows = query + (head * R + row[:, None]) * D + column[None, :]
    q = tl.load(rows, mask=(row < R)[:, None] & inside[None, :], other=0.0).to(tl.float32)
    positive, negative = tl.sum(tl.maximum(q, 0.0), 0), tl.sum(tl.minimum(q, 0.0), 0)
    lowest += head // G * stride_lb + head % G * stride_lg
    highest += head // G * stride_hb + head % G * stride_hg
    low = tl.load(lowest + page[:, None] * stride_lp + column[None, :], mask=there, other=0.0).to(tl.float32)
    high = tl.load(highest + page[:, None] * stride_hp + column[None, :], mask=there, other=0.0).to(tl.float32)
    score = tl.sum(high * positive[None, :] + low * negative[None, :], 1)
    tl.store(scores + head * num_pages + page, score, mask=page < num_pages)


def _score_on_gpu(query: torch.Tensor, lowest: torch.Tensor, highest: torch.Tensor) -> torch.Tensor:
    B, G, R, D = query.shape
    P = lowest.shape[2]
    query, lowest, highest = (x if x.stride(-1) == 1 else x.contiguous() for x in (query.contiguous(), lowest, highest))
    scores = torch.empty(B, G, P, dtype=torch.float32, device=query.device)
    if P:
        _score[(B * G, triton.cdiv(P, PAGES_PER_PROGRAM))](
            query, lowest, highest, scores, P, G, *lowest.stride()[:3], *highest.stride()[:3],
            R=R, ROWS=next_power(R), D=D, COLUMNS=next_power(D), BLOCK=PAGES_PER_PROGRAM, num_warps=4,
        )  # fmt: skip
    return scores


def _score_on_cpu(
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
