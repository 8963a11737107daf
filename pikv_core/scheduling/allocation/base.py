"""What an allocation is: the same total budget, spread over layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import torch


class Allocation(ABC):
    """Turn the mean budget of a layer into this layer's; it never scores tokens."""

    name: ClassVar[str]

    @abstractmethod
    def capacity(self, mean: torch.Tensor, layer: int, num_layers: int) -> torch.Tensor:
        """Return tokens per head [B] of `layer`, given the mean over all layers [B]; at least 1."""
