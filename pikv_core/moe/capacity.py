"""Expert capacity after GShard (2006.16668): how many choices an expert takes, and which ones."""

from __future__ import annotations

import torch
from torch import Tensor


def slots(num_choices: int | Tensor, num_experts: int, capacity_factor: float) -> Tensor:
    """Return the choices an expert takes: capacity_factor times an even share, rounded up, at least 1."""
    return (capacity_factor * torch.as_tensor(num_choices, dtype=torch.float64) / num_experts).ceil().clamp(min=1)


def within_capacity(experts: Tensor, num_experts: int, capacity: Tensor, asked: Tensor | None = None) -> Tensor:
    """Return bool like experts [..., T, K]: choices that fit, all first ones in order of tokens before any second.

    Leading dimensions are groups of tokens, each with slots of its own. capacity: one number, or one a group [...].
    asked: bool that broadcasts to experts; the other choices take no slot and are never kept.
    """
    num_tokens, num_choices = experts.shape[-2:]
    asked_TK = torch.ones_like(experts, dtype=torch.bool) if asked is None else asked.expand_as(experts)
    ordered = experts.transpose(-1, -2).flatten(-2)
    chosen = torch.nn.functional.one_hot(ordered, num_experts) * asked_TK.transpose(-1, -2).flatten(-2)[..., None]
    place = (chosen.cumsum(-2) * chosen).sum(-1)  # from 1; 0 for what is not asked
    fits = (place > 0) & (place <= capacity[..., None])
    return fits.unflatten(-1, (num_choices, num_tokens)).transpose(-1, -2)
