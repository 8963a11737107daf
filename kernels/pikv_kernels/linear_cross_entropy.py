"""The cross-entropy of a linear head, in chunks of rows: the logits of all rows are never held.

The gradient is taken with the loss, while a chunk's logits are at hand. Shapes: N rows, D hidden, V words.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Logits at a time: those of a CPU are to stay in its caches, a GPU has room, and little patience for small products.
MOST_LOGITS = {"cpu": 2**21, "cuda": 2**25}
LEAST_ROWS = 128


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of x [N, D] @ weight [V, D]ᵀ with targets [N], summed over N, in float32 or wider."""
    learns = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(x, weight, targets, learns)


def linear_cross_entropy_reference(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return what `linear_cross_entropy` does: its definition."""
    logits = x @ weight.mT
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")


def _losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss of a chunk, summed, and the probabilities [N, V] that it comes from."""
    probs = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    # −ln p by way of the most probable word, whose probability is at least 1/V: that of the target may be 0.
    below = logits.amax(-1).to(probs.dtype) - logits.gather(1, targets[:, None])[:, 0].to(probs.dtype)
    return (below - probs.amax(-1).log()).sum(), probs


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, learns: bool) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        total = x.new_zeros((), dtype=wide)
        d_x, d_weight = (torch.empty_like(x), torch.zeros_like(weight, dtype=wide)) if learns else (x, None)
        num_rows = max(LEAST_ROWS, MOST_LOGITS[x.device.type] // len(weight))
        for rows, chosen, d_rows in zip(*(one.split(num_rows) for one in (x, targets, d_x)), strict=True):
            logits = rows @ weight.mT
            loss, probs = _losses(logits, chosen)
            total += loss
            if d_weight is not None:
                at = chosen[:, None]
                d_logits = logits.copy_(probs.scatter_add_(1, at, probs.new_full((1, 1), -1.0).expand_as(at)))
                torch.mm(d_logits, weight, out=d_rows)
                d_weight += d_logits.mT @ rows
        if d_weight is not None:
            ctx.save_for_backward(d_x, d_weight.to(weight.dtype))
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor, Tensor, None, None]:
        d_x, d_weight = ctx.saved_tensors
        return d_x * d_total, d_weight * d_total, None, None
