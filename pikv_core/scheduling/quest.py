"""Quest: read only the pages whose bounds promise large attention logits (arXiv 2406.10774)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from pikv_core.scheduling import POLICIES
from pikv_core.scheduling.base import PageSelector

if TYPE_CHECKING:
    import torch


@POLICIES.register("quest")
@dataclass(frozen=True)
class Quest(PageSelector):
    """Score pages by channel-wise bounds of their keys, summed over a head's query group; at least 3 are read."""

    heads_apart: ClassVar[bool] = True
    page_tokens: Annotated[int, Field(ge=8, multiple_of=8)] = 16
    dense_layers: Annotated[int, Field(ge=0)] = 2

    def num_pages(self, capacity: int, page_tokens: int) -> int:
        return max(3, capacity // page_tokens)

    def score(self, query: torch.Tensor, lowest: torch.Tensor, highest: torch.Tensor) -> torch.Tensor:
        from pikv_kernels.page_scores import page_scores

        return page_scores(query, lowest, highest)
