"""A prompt under a policy: what it observes and scores in PiKVCache, given the tensors of a press.

Shapes: B batch, H query heads, G key/value heads, T tokens of the prompt, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from pikv_core.cache.lane import Lane, LayerPlan
from pikv_core.cache.store import EMPTY
from pikv_core.compression.none import Plain
from pikv_core.observation import LayerRun
from pikv_core.scheduling.base import Evictor


@dataclass(frozen=True)
class Prompt:
    """One layer's prompt: keys and values [B,G,T,D], as attention uses them; is_token [B,T], None for no padding.

    queries: return those of the newest tokens, as many as asked for, [B,H,N,D]. scale: of the logits.
    """

    keys: torch.Tensor
    values: torch.Tensor
    is_token: torch.Tensor | None
    queries: Callable[[int], torch.Tensor]
    scale: float

    @property
    def position(self) -> torch.Tensor:
        """Places [B,T] of the tokens in their sequences, EMPTY for padding."""
        B, _, T, _ = self.keys.shape
        if self.is_token is None:
            return torch.arange(T, device=self.keys.device).expand(B, T)
        return (self.is_token.cumsum(dim=1) - 1).masked_fill(~self.is_token, EMPTY)

    @property
    def num_tokens(self) -> torch.Tensor:
        """Tokens [B] of each row, padding apart; on the CPU."""
        return (self.position >= 0).sum(dim=1).cpu()

    def score(self, policy: Evictor, run: LayerRun, capacity: torch.Tensor) -> torch.Tensor:
        """Return float32 [B,G,T], higher = keep, -inf for padding; capacity [B,G], on the CPU: tokens that may stay."""
        B, G, T, _ = self.keys.shape
        position = self.position
        plan = LayerPlan(Plain(), policy, selector=None, window=None, rerotate=False, run=run)
        lane = Lane(plan, None, torch.arange(G).expand(B, G))
        lane.has_empty = self.is_token is not None
        lane.arrive(self.keys, self.values, position)
        if policy.sees_queries:
            policy.observe_queries(self.queries(T), position, run)
        if policy.observes:
            num_shown = min(max(2, policy.observes), T)  # a single one would be taken for a decode step
            query = self.queries(num_shown)
            lane.attend(query, position[:, T - num_shown :], self.scale, None, None, [policy], lambda: T)
        return lane.score(self.num_tokens.to(position.device), lane.room(capacity), decide=True)
