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
        owns = evictor is not None and type(evictor).capacity is not Evictor.capacity
        self._spreads = owns or allocation.parts_layers  # else every layer gets the mean
        self.head_share: torch.Tensor | None = None  # [B,G]: of the layer's tokens per head
        self.settled: torch.Tensor | None = None  # what `tokens` tells from now on, however many are seen

    def most(self, num_seen: torch.Tensor) -> torch.Tensor:
        """Return how many tokens [B,G] there are to hold after `num_seen` [B]."""
        return self._to_hold(num_seen)[:, None].expand(-1, self._run.num_kv_heads)

    def tokens(self, num_seen: torch.Tensor) -> torch.Tensor:
        """Return how many tokens [B,G] may stay, at least 1 where there are any; told as `settled` once that is it."""
        whole = self._to_hold(num_seen)
        counts = whole.tolist()
        if self._spreads or self.head_share is not None:
            told = self._spread(whole)
        else:  # plain numbers, since this is asked for every layer and token
            each = torch.tensor([min(self.budget.of(count), count) for count in counts], dtype=torch.int64)
            told = each[:, None].expand(-1, self._run.num_kv_heads)
        is_reached = isinstance(self.budget.value, int) and min(counts) >= self.budget.value
        if is_reached and not self._spreads and not self.may_part:
            self.settled = told
        return told

    def _spread(self, whole: torch.Tensor) -> torch.Tensor:
        mean = self.budget.tokens(whole)
        own = None if self._evictor is None else self._evictor.capacity(mean, whole, self._run)
        if own is None:
            mean = torch.minimum(mean, whole)
            by_layer = self._allocation.layers(mean, whole, self._run.num_layers, self._run.shared)
            own = by_layer[:, self._run.index, None]
        if self.head_share is not None:
            own = (own * self.head_share + 1e-6).long()
        return own.clamp(min=1).minimum(whole[:, None]).expand(-1, self._run.num_kv_heads)

    def mean(self, num_seen: torch.Tensor) -> torch.Tensor:
        """Return how many tokens [B,G] would stay after `num_seen` [B] if all layers and heads had as many."""
        whole = self._to_hold(num_seen)
        each = self.budget.tokens(whole).minimum(whole)
        return each[:, None].expand(-1, self._run.num_kv_heads)

    @property
    def may_part(self) -> bool:
        """Whether the allocation has yet to make heads unequal."""
        return self._allocation.splits_heads and self.head_share is None

    def _to_hold(self, num_seen: torch.Tensor) -> torch.Tensor:
        return num_seen if self._window is None else num_seen.clamp(max=max(1, self._window - 1))

    def part(self, score: torch.Tensor, capacity: torch.Tensor) -> torch.Tensor:
        """Return the budgets [B,G] after the allocation has had its one chance to make heads unequal.

        score: the evictor's [B,G,S]. capacity [B,G]: what `tokens` told.
        """
        if not self.may_part:
            return capacity
        heads = self._allocation.heads(score, capacity[:, 0].to(score.device)).cpu()
        self.head_share = (heads.double() / capacity[:, :1].double()).nan_to_num(1.0)  # a row may be padding alone
        return heads

    def forget(self) -> None:
        """Take it that less may have been seen than was before."""
        self.settled = None

    def select_rows(self, rows: torch.Tensor) -> None:
        """Reorder, repeat or drop rows of the batch."""
        self.settled = None
        if self.head_share is not None:
            self.head_share = self.head_share[rows]
