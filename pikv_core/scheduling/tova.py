"""TOVA: the tokens that the newest query attends to (arXiv 2401.06104)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pikv_core.observation import Rows
from pikv_core.scheduling import POLICIES
from pikv_core.scheduling.base import Evictor, Tokens

if TYPE_CHECKING:
    import torch


@POLICIES.register("tova")
@dataclass(frozen=True)
class TOVA(Evictor):
    """Keep the newest token and those with the largest attention of its query, mean over the layer's heads.

    Heads that hold different tokens are scored each by its own attention.
    """

    is_static: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = ("attention",)

    @property
    def observes(self) -> int:
        return 1

    def observe(self, columns: Mapping[str, torch.Tensor], rows: Rows) -> None:
        import torch

        newest = rows.probs[:, :, :, -1].mean(dim=2)
        agree = (rows.position == rows.position[:, :1]).all()
        newest = torch.where(agree, newest.mean(dim=1, keepdim=True), newest)
        is_token = rows.query_position[:, -1, None, None] >= 0
        columns["attention"].copy_(newest.where(is_token, columns["attention"]))

    def score(self, tokens: Tokens) -> torch.Tensor:
        import torch

        newest = tokens.is_recent(torch.ones_like(tokens.capacity))
        return tokens.columns["attention"].masked_fill(newest, float("inf"))
