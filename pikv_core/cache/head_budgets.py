"""How many tokens each head of a layer may hold: the budget, spread by the policy itself or by the allocation.

Shapes: B batch, G key/value heads, S stored slots. Everything but scores is on the CPU.
"""

from __future__ import annotations

import torch

from pikv_core.cache.budget import Budget
from pikv_core.observation import LayerRun
from pikv_core.scheduling.allocation.base import Allocation
from pikv_core.scheduling.base import Evictor


class HeadBudgets:
    """Tell a layer's budgets in tokens [B,G]; once its heads have been made unequal, they keep their shares.

    evictor: None for a policy that drops nothing. window: tokens that a query may look back, None for all.
    """

    def __init__(
        self, budget: Budget, allocation: Allocation, evictor: Evictor | None, window: int | None, run: LayerRun
    ):
        self.budget, self._allocation, self._evictor = budget, allocation, evictor
        self._window, self._run = window, run
        self.head_share: torch.Tensor | None = None  # [B,G]: of the layer's tokens per head

    def most(self, num_seen: torch.Tensor) -> torch.Tensor:
        """Return how many tokens [B,G] there are to hold after `num_seen` [B]."""
        held = num_seen if self._window is None else num_seen.clamp(max=max(1, self._window - 1))
        return held[:, None].expand(-1, self._run.num_kv_heads)

    def tokens(self, num_seen: torch.Tensor) -> torch.Tensor:
        """Return how many tokens [B,G] may stay, at least 1 where there are any."""
        whole = self.most(num_seen)
        mean = self.budget.tokens(whole[:, 0])
        own = None if self._evictor is None else self._evictor.capacity(mean, whole[:, 0], self._run)
        if own is None:
            mean = torch.minimum(mean, whole[:, 0])
            by_layer = self._allocation.layers(mean, whole[:, 0], self._run.num_layers, self._run.shared)
            own = by_layer[:, self._run.index, None].expand(-1, self._run.num_kv_heads)
        if self.head_share is not None:
            own = (own * self.head_share + 1e-6).long()
        return torch.minimum(own.clamp(min=1), whole)

    def part(self, score: torch.Tensor, capacity: torch.Tensor) -> torch.Tensor:
        """Return the budgets [B,G] after the allocation has had its one chance to make heads unequal.

        score: the evictor's [B,G,S]. capacity [B,G]: what `tokens` told.
        """
        if not self._allocation.splits_heads or self.head_share is not None:
            return capacity
        heads = self._allocation.heads(score, capacity[:, 0].to(score.device)).cpu()
        self.head_share = (heads.double() / capacity[:, :1].double()).nan_to_num(1.0)  # a row may be padding alone
        return heads

    def select_rows(self, rows: torch.Tensor) -> None:
        """Reorder, repeat or drop rows of the batch."""
        if self.head_share is not None:
            self.head_share = self.head_share[rows]
