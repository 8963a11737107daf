"""The same budget for every layer and head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pikv_core.scheduling.allocation import ALLOCATIONS
from pikv_core.scheduling.allocation.base import Allocation

if TYPE_CHECKING:
    import torch


@ALLOCATIONS.register("uniform")
@dataclass(frozen=True)
class Uniform(Allocation):
    """Give each layer the mean."""

    parts_layers: ClassVar[bool] = False

    def layers(
        self, mean: torch.Tensor, num_seen: torch.Tensor, num_layers: int, shared: dict[str, Any]
    ) -> torch.Tensor:
        return mean[:, None].expand(-1, num_layers)
