"""Expert capacity after GShard (2006.16668): how many choices an expert takes, and which ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def slots(experts_TK: Tensor, num_experts: int, capacity_factor: float) -> int:
    """Return the choices an expert takes: capacity_factor times an even share, at least 1."""
    return max(1, math.ceil(capacity_factor * experts_TK.numel() / num_experts))


def within_capacity(experts_TK: Tensor, num_experts: int, capacity: int, mask_T: Tensor | None = None) -> Tensor:
    """Return bool [T, K]: the choices that fit, all first choices in order of tokens before any second.

    mask_T: True for real tokens; the others take no slot and are never kept.
    """
    num_tokens, num_choices = experts_TK.shape
    experts_N = experts_TK.T.reshape(-1)
    chosen_NE = torch.nn.functional.one_hot(experts_N, num_experts)
    if mask_T is not None:
        chosen_NE = chosen_NE * mask_T.repeat(num_choices)[:, None]
    place_N = (chosen_NE.cumsum(0) * chosen_NE).sum(-1)  # from 1; 0 for padding
    return ((place_N > 0) & (place_N <= capacity)).view(num_choices, num_tokens).T
