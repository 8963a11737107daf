"""Key norm: tokens whose keys are short draw the most attention (arXiv 2406.11430)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pikv_core.scheduling import POLICIES
from pikv_core.scheduling.base import Evictor, Tokens

if TYPE_CHECKING:
    import torch


@POLICIES.register("knorm")
@dataclass(frozen=True)
class KNorm(Evictor):
    """Keep the tokens with the shortest keys (Euclidean norm)."""

    is_static: ClassVar[bool] = True
    heads_apart: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = ("keys",)

    def score(self, tokens: Tokens) -> torch.Tensor:
        return -tokens.keys().float().norm(dim=-1)
