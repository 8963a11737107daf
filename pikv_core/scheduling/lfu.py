"""LFU: the tokens that the most queries attended to; the cache policy of operating systems, on tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from pikv_core.observation import ALL, Rows
from pikv_core.scheduling import POLICIES
from pikv_core.scheduling.base import Evictor, Tokens
from pikv_core.scheduling.ranks import rank

if TYPE_CHECKING:
    import torch


@POLICIES.register("lfu")
@dataclass(frozen=True)
class LFU(Evictor):
    """Keep the tokens used most: by queries that gave one more than `tau` times an even share of their attention.

    A token's attention is the mean over its group's heads, an even share 1/(tokens that the query sees). Every query
    is a use, those of prompts too. Ties go to the newer token.
    """

    is_static: ClassVar[bool] = True
    heads_apart: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = ("num_uses",)
    without_queries: ClassVar[bool] = True
    tau: Annotated[float, Field(gt=0)] = 1.0

    @property
    def observes(self) -> int:
        return ALL

    def observe(self, columns: Mapping[str, torch.Tensor], rows: Rows) -> None:
        used = rows.probs.mean(dim=2) > (self.tau / rows.num_visible)[..., None]
        columns["num_uses"].add_(used.sum(dim=2))

    def score(self, tokens: Tokens) -> torch.Tensor:
        return rank(tokens.columns["num_uses"], tokens.position)
