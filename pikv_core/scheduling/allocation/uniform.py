"""The same budget for every layer and head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pikv_core.scheduling.allocation import ALLOCATIONS
from pikv_core.scheduling.allocation.base import Allocation

if TYPE_CHECKING:
    import torch


@ALLOCATIONS.register("uniform")
@dataclass(frozen=True)
class Uniform(Allocation):
    """Give each layer the mean."""

    def capacity(self, mean: torch.Tensor, layer: int, num_layers: int) -> torch.Tensor:
        return mean
