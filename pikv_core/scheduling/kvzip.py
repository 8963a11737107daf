"""KVzip: the tokens that a model needs to repeat its context (arXiv 2505.23416)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pikv_core.observation import ALL, Rows
from pikv_core.scheduling import POLICIES
from pikv_core.scheduling.base import Evictor, Tokens

if TYPE_CHECKING:
    import torch


@POLICIES.register("kvzip")
@dataclass(frozen=True)
class KVzip(Evictor):
    """Keep the tokens with the largest attention that any query of the repetition gives them, by any of its heads.

    It asks for a second pass over the prompt, and knows nothing of the question that comes after.
    """

    decides_once: ClassVar[bool] = True
    heads_apart: ClassVar[bool] = True
    looks: ClassVar[Literal["repeat", "future"] | None] = "repeat"
    columns: ClassVar[tuple[str, ...]] = ("peak",)

    @property
    def observes(self) -> int:
        return ALL

    def observe(self, columns: Mapping[str, torch.Tensor], rows: Rows) -> None:
        import torch

        torch.maximum(columns["peak"], rows.probs.flatten(2, 3).amax(dim=2), out=columns["peak"])

    def score(self, tokens: Tokens) -> torch.Tensor:
        return tokens.columns["peak"]
