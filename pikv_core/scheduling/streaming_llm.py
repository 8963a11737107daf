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
    sinks: Annotated[int, Field(ge=0)] = 4

    def score(self, tokens: Tokens) -> torch.Tensor:
        num_sinks = (tokens.capacity // 2).clamp(max=self.sinks)
        is_sink = tokens.position < num_sinks[..., None]
        return tokens.position.float().masked_fill(is_sink, float("inf"))
