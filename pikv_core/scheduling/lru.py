"""LRU: the tokens that a decode step last attended to; the cache policy of operating systems, on tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from pikv_core.observation import Rows
from pikv_core.scheduling import POLICIES
from pikv_core.scheduling.base import Evictor, Tokens
from pikv_core.scheduling.ranks import rank

if TYPE_CHECKING:
    import torch


@POLICIES.register("lru")
@dataclass(frozen=True)
class LRU(Evictor):
    """Keep the tokens used last, by a decode step that gave them more than `tau` times an even share of its attention.

    A token's attention is the mean over its group's heads, an even share 1/(tokens that the query sees). A step is the
    position of its query; only steps of a single query count. Until its first use a token counts as used at its own
    position. Ties go to the newer token.
    """

    is_static: ClassVar[bool] = True
    waits_for_steps: ClassVar[bool] = True
    heads_apart: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = ("last_used",)
    without_queries: ClassVar[bool] = True
    tau: Annotated[float, Field(gt=0)] = 1.0

    @property
    def observes(self) -> int:
        return 2  # with one, a prompt would look like a decode step

    def observe(self, columns: Mapping[str, torch.Tensor], rows: Rows) -> None:
        if rows.probs.shape[3] > 1 or not (rows.is_first and rows.is_last):
            return
        used = rows.probs.mean(dim=2)[:, :, 0] > self.tau / rows.num_visible
        last_used = columns["last_used"]
        step = rows.query_position[:, :, None].to(last_used.dtype)
        last_used.copy_(step.where(used, last_used))

    def score(self, tokens: Tokens) -> torch.Tensor:
        return rank(tokens.columns["last_used"].maximum(tokens.position.float()), tokens.position)
