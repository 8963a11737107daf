"""The oracle: the tokens that the run itself will attend to; the bound for policies that decide once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pikv_core.observation import ALL, Rows
from pikv_core.scheduling import POLICIES
from pikv_core.scheduling.base import Evictor, Tokens

if TYPE_CHECKING:
    import torch


@POLICIES.register("oracle")
@dataclass(frozen=True)
class Oracle(Evictor):
    """Keep the tokens with the largest attention summed over the run's later queries, the mean over a group's heads.

    It is shown what the run will be fed, so it serves measurements alone.
    """

    decides_once: ClassVar[bool] = True
    looks: ClassVar[Literal["repeat", "future"] | None] = "future"
    columns: ClassVar[tuple[str, ...]] = ("future",)

    @property
    def observes(self) -> int:
        return ALL

    def observe(self, columns: Mapping[str, torch.Tensor], rows: Rows) -> None:
        columns["future"].add_(rows.column_sums())

    def score(self, tokens: Tokens) -> torch.Tensor:
        return tokens.columns["future"]
