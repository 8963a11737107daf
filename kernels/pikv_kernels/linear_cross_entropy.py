"""The cross-entropy of a linear head, in chunks of rows: the logits of all rows are never held.

The gradient is taken with the loss, while a chunk's logits are at hand. Shapes: N rows, D hidden, V words.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK = 512  # rows


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of x [N, D] @ weight [V, D]ᵀ with targets [N], summed over N, in float32 or wider."""
    return _LinearCrossEntropy.apply(x, weight, targets)


def linear_cross_entropy_reference(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return what `linear_cross_entropy` does: its definition."""
    logits = x @ weight.mT
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")


def _loss_and_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss of a chunk, summed, and its gradient by the logits [N, V] in their type."""
    at = targets[:, None]
    probs = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    # −ln p by way of the most probable word, whose probability is at least 1/V: that of the target may be 0.
    below = logits.amax(-1).to(probs.dtype) - logits.gather(1, at)[:, 0].to(probs.dtype)
    loss = (below - probs.amax(-1).log()).sum()
    probs.scatter_add_(1, at, probs.new_full((1, 1), -1.0).expand_as(at))
    return loss, probs.to(logits.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        total = x.new_zeros((), dtype=wide)
        d_x, d_weight = torch.empty_like(x), torch.zeros_like(weight, dtype=wide)
        for rows, chosen, d_rows in zip(x.split(CHUNK), targets.split(CHUNK), d_x.split(CHUNK), strict=True):
            loss, d_logits = _loss_and_gradient(rows @ weight.mT, chosen)
            total += loss
            torch.mm(d_logits, weight, out=d_rows)
            d_weight += d_logits.mT @ rows
        ctx.save_for_backward(d_x, d_weight.to(weight.dtype))
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor, Tensor, None]:
        d_x, d_weight = ctx.saved_tensors
        return d_x * d_total, d_weight * d_total, None
