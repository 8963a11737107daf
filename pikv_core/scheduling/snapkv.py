"""SnapKV: the tokens that the end of a prompt attends to, decided once (arXiv 2404.14469)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from pikv_core.observation import Rows
from pikv_core.scheduling import POLICIES
from pikv_core.scheduling.base import Evictor, Tokens

if TYPE_CHECKING:
    import torch


@POLICIES.register("snapkv")
@dataclass(frozen=True)
class SnapKV(Evictor):
    """Keep a prompt's last `window` tokens and those with the most votes: attention of these tokens' queries.

    Votes are summed over the queries, averaged over a group's heads and then pooled over `kernel` neighbours, of which
    those in the window have none. Under a budget below the window, the newest tokens of it stay.
    """

    decides_once: ClassVar[bool] = True
    heads_apart: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = ("votes",)
    window: Annotated[int, Field(ge=1)] = 64
    kernel: Annotated[int, Field(ge=1)] = 5
    pooling: Literal["avg", "max"] = "avg"

    @property
    def observes(self) -> int:
        return self.window

    def observe(self, columns: Mapping[str, torch.Tensor], rows: Rows) -> None:
        if rows.is_first:
            columns["votes"].zero_()
        columns["votes"].add_(rows.column_sums())

    def score(self, tokens: Tokens) -> torch.Tensor:
        import torch

        in_window = tokens.is_recent(torch.full_like(tokens.capacity, self.window))
        votes = tokens.columns["votes"].masked_fill(in_window | (tokens.position < 0), 0.0)
        in_order = tokens.position.argsort(dim=-1)
        pooled = self._pool(votes.gather(-1, in_order))
        kept = tokens.is_recent(tokens.capacity.clamp(max=self.window))
        return votes.scatter(-1, in_order, pooled).masked_fill(kept, float("inf"))

    def _pool(self, votes: torch.Tensor) -> torch.Tensor:
        """Pool [B,G,S] over neighbours, with zeros beyond the ends."""
        from torch.nn import functional

        padded = functional.pad(votes, (self.kernel // 2, (self.kernel - 1) // 2))
        pool = functional.avg_pool1d if self.pooling == "avg" else functional.max_pool1d
        return pool(padded, self.kernel, stride=1)
