"""Pyramid: more tokens for the lower layers, fewer for the higher (PyramidKV, arXiv 2406.02069).

Shapes: B batch, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from pikv_core.scheduling.allocation import ALLOCATIONS
from pikv_core.scheduling.allocation.base import Allocation
from pikv_core.scheduling.allocation.shares import share_out

if TYPE_CHECKING:
    import torch


@ALLOCATIONS.register("pyramid")
@dataclass(frozen=True)
class Pyramid(Allocation):
    """Let the layers' budgets fall in equal steps.

    form: "pyramidkv" gives every layer `window` tokens and spreads the b others of the mean budget: b/beta for the last
    layer, 2b - b/beta for the first; if the sequence has fewer, the first layer keeps all and the steps get smaller.
    Uniform below 2b tokens and where the window takes the whole budget. "kvpress" is the variant of the library of
    that name: it spreads the whole budget, keeps at most all but the window, and is uniform where the last layer
    would get less than the window. "linear" falls from (1 + slope) to (1 - slope) times the mean.
    """

    form: Literal["pyramidkv", "kvpress", "linear"] = "pyramidkv"
    window: Annotated[int, Field(ge=0)] = 64
    beta: Annotated[float, Field(ge=1)] = 20
    slope: Annotated[float, Field(ge=0, lt=1)] = 0.5

    def layers(
        self, mean: torch.Tensor, num_seen: torch.Tensor, num_layers: int, shared: dict[str, Any]
    ) -> torch.Tensor:
        import torch

        mean = torch.minimum(mean, num_seen).clamp(min=1)
        first, last = self._ends(mean.double(), num_seen.double())
        step = (first - last) / max(1, num_layers - 1)
        wish = first[:, None] - torch.arange(num_layers) * step[:, None]
        return share_out(wish, mean * num_layers, torch.ones(1, 1), num_seen.clamp(min=1)[:, None])

    def _ends(self, mean: torch.Tensor, num_seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the budgets [B] of the first and the last layer."""
        if self.form == "linear":
            return mean * (1 + self.slope), mean * (1 - self.slope)
        others = num_seen - self.window
        spread = mean if self.form == "kvpress" else mean - self.window
        first = (2 * spread - spread / self.beta).minimum(others)
        last = 2 * spread - first
        if self.form == "kvpress":
            slopes = (first >= last) & (last >= self.window)
            return first.where(slopes, mean), last.where(slopes, mean)
        slopes = (spread > 0) & (num_seen >= 2 * spread)
        return (self.window + first).where(slopes, mean), (self.window + last).where(slopes, mean)
