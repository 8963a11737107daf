"""Sliding window: the newest tokens and nothing else; what StreamingLLM (arXiv 2309.17453) is without its sinks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pikv_core.scheduling import POLICIES
from pikv_core.scheduling.base import Evictor, Tokens

if TYPE_CHECKING:
    import torch


@POLICIES.register("window")
@dataclass(frozen=True)
class Window(Evictor):
    """Keep the newest tokens."""

    is_static: ClassVar[bool] = True
    heads_apart: ClassVar[bool] = True

    def score(self, tokens: Tokens) -> torch.Tensor:
        return tokens.position.float()

    def ends(self, capacity: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        return capacity - capacity, capacity
