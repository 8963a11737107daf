"""Ada-KV: a layer's heads share its budget by where the highest scores are (arXiv 2407.11550).

Shapes: B batch, L layers, G key/value heads, S stored tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from pikv_core.scheduling.allocation import ALLOCATIONS
from pikv_core.scheduling.allocation.base import Allocation
from pikv_core.scheduling.allocation.shares import share_out

if TYPE_CHECKING:
    import torch


@ALLOCATIONS.register("ada-kv")
@dataclass(frozen=True)
class AdaKV(Allocation):
    """Give a head (1 - alpha) times its number of tokens among the layer's highest scores, and alpha times the mean.

    As many highest scores count as the layer may keep tokens; ties are dealt out evenly. What a head has not the
    tokens for goes to the others in proportion.
    """

    parts_layers: ClassVar[bool] = False
    splits_heads: ClassVar[bool] = True
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.2

    def layers(
        self, mean: torch.Tensor, num_seen: torch.Tensor, num_layers: int, shared: dict[str, Any]
    ) -> torch.Tensor:
        return mean[:, None].expand(-1, num_layers)

    def heads(self, score: torch.Tensor, capacity: torch.Tensor) -> torch.Tensor:
        import torch

        num_heads = score.shape[1]
        mean = capacity.to(score.device)
        held = (score > -torch.inf).sum(dim=-1)
        # Best of each head, then second best of each, ...: a stable sort deals ties out evenly.
        by_rank = score.sort(dim=-1, descending=True).values.transpose(1, 2).flatten(1)
        highest, order = by_rank.sort(dim=-1, descending=True, stable=True)
        is_top = torch.arange(order.shape[1], device=score.device) < (mean * num_heads)[:, None]
        is_top &= highest > -torch.inf
        counts = torch.zeros_like(held).scatter_add_(1, order % num_heads, is_top.long())
        wish = (1 - self.alpha) * counts.double() + self.alpha * mean.double()[:, None]
        total = (mean * num_heads).minimum(held.sum(dim=1))
        given = share_out(wish, total, held.clamp(max=1), held)
        spare = mean * num_heads - total
        evenly = spare[:, None] // num_heads + (
            torch.arange(num_heads, device=score.device) < (spare % num_heads)[:, None]
        )
        return (given + evenly).to(capacity.device)
