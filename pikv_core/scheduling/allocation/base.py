"""What an allocation is: the same total budget, spread over layers and heads.

Shapes: B batch, L layers, G key/value heads, S stored tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from pikv_core.observation import Observer

if TYPE_CHECKING:
    import torch


class Allocation(Observer, ABC):
    """Turn the mean budget into each layer's, and a layer's into each head's; it never drops tokens.

    compares_layers: `layers` needs what was observed in all layers (in `LayerRun.shared`), so that nothing of a prompt
    is dropped before the last layer has seen it. parts_layers: `layers` gives unequal layers. splits_heads: `heads`
    gives unequal heads.
    """

    name: ClassVar[str]
    compares_layers: ClassVar[bool] = False
    parts_layers: ClassVar[bool] = True
    splits_heads: ClassVar[bool] = False

    @abstractmethod
    def layers(
        self, mean: torch.Tensor, num_seen: torch.Tensor, num_layers: int, shared: dict[str, Any]
    ) -> torch.Tensor:
        """Return tokens per head [B,L], at least 1, whose mean over the layers is `mean` [B]; all on the CPU.

        num_seen [B]: tokens a head could hold at most. shared: what `observe` left in `rows.layer.shared`.
        """

    def heads(self, score: torch.Tensor, capacity: torch.Tensor) -> torch.Tensor:
        """Return tokens of each head [B,G], at least 1, whose mean over the heads is `capacity` [B].

        score: the evictor's [B,G,S], -inf for empty slots, inf for tokens that stay in any case.
        """
        return capacity[:, None].expand(score.shape[:2])
