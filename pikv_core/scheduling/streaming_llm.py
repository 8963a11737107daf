"""StreamingLLM: the first tokens (attention sinks) and the newest ones (arXiv 2309.17453)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from pikv_core.scheduling import POLICIES
from pikv_core.scheduling.base import Evictor, Tokens

if TYPE_CHECKING:
    import torch


@POLICIES.register("streaming-llm")
@dataclass(frozen=True)
class StreamingLLM(Evictor):
    """Keep the first `sinks` tokens, at most half of the budget, and fill the rest with the newest."""

    is_static: ClassVar[bool] = True
    heads_apart: ClassVar[bool] = True
    sinks: Annotated[int, Field(ge=0)] = 4

    def score(self, tokens: Tokens) -> torch.Tensor:
        is_sink = tokens.position < self._num_sinks(tokens.capacity)[..., None]
        return tokens.position.float().masked_fill(is_sink, float("inf"))

    def ends(self, capacity: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        num_sinks = self._num_sinks(capacity)
        return num_sinks, capacity - num_sinks

    def _num_sinks(self, capacity: torch.Tensor) -> torch.Tensor:
        return (capacity // 2).clamp(max=self.sinks)
