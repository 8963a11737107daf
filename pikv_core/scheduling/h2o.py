"""H2O: heavy hitters by accumulated attention, and the newest tokens (arXiv 2306.14048)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from pikv_core.observation import ALL, Rows
from pikv_core.scheduling import POLICIES
from pikv_core.scheduling.base import Evictor, Tokens

if TYPE_CHECKING:
    import torch


@POLICIES.register("h2o")
@dataclass(frozen=True)
class H2O(Evictor):
    """Keep the newest tokens and those with the largest attention column sums over all queries, prompt included.

    heavy_share: part of the budget for heavy hitters; the rest is for the newest tokens.
    """

    is_static: ClassVar[bool] = True
    heads_apart: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = ("mass",)
    heavy_share: Annotated[float, Field(ge=0, le=1)] = 0.5

    @property
    def observes(self) -> int:
        return ALL

    def observe(self, columns: Mapping[str, torch.Tensor], rows: Rows) -> None:
        columns["mass"].add_(rows.column_sums())

    def score(self, tokens: Tokens) -> torch.Tensor:
        num_recent = tokens.capacity - (tokens.capacity * self.heavy_share).long()
        return tokens.columns["mass"].masked_fill(tokens.is_recent(num_recent), float("inf"))
