"""A cache's layer without a model: it takes tensors, and drops and encodes after every step.

Shapes: B batch, G key/value heads, S tokens, D head dim.
"""

from __future__ import annotations

import torch

from pikv_core.cache.budget import Budget
from pikv_core.cache.layer import CacheLayer
from pikv_core.compression.base import Codec
from pikv_core.errors import UsageError
from pikv_core.observation import LayerRun
from pikv_core.scheduling.allocation.uniform import Uniform
from pikv_core.scheduling.base import Policy


def lone_layer(policy: Policy, budget: float | int, codec: Codec, index: int = 0) -> CacheLayer:
    """Return an empty layer; budget: a share of the tokens seen, or tokens per head."""
    limit = Budget(budget)
    layer = CacheLayer(
        LayerRun(index, index + 1),
        policy,
        Uniform(),
        limit,
        window=None,
        rerotate=False,
        bind=lambda index, shape: (codec, limit),
        after_step=lambda index, is_prompt: layer.compress(),
        on_change=lambda index: None,
    )
    return layer


def in_order(
    keys: torch.Tensor, values: torch.Tensor, position: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return keys and values [B,G,S,D] and positions [B,G,S], by position."""
    order = position.argsort(dim=-1)
    by_channel = order[..., None].expand_as(keys)
    return keys.gather(2, by_channel), values.gather(2, by_channel), position.gather(2, order)


def by_heads(x: torch.Tensor, hidden_size: int, what: str) -> torch.Tensor:
    """Return [B,S,hidden_size], which is one head, or [B,G,S,D] as [B,G,S,D]; raise UsageError for another shape."""
    heads = x[:, None] if x.dim() == 3 else x
    if heads.dim() != 4 or heads.shape[1] * heads.shape[3] != hidden_size:
        raise UsageError(
            f"{what} are {list(x.shape)}",
            hint=f"give [rows, tokens, {hidden_size}], or [rows, heads, tokens, channels] whose heads times channels "
            f"are the hidden_size of {hidden_size}",
        )
    return heads


def as_given(x: torch.Tensor, has_heads: bool) -> torch.Tensor:
    """Return x [B,G,S,D] as [B,S,hidden_size] where it was given without a dimension of heads."""
    return x if has_heads else x[:, 0]
