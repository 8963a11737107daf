"""Entropy: more tokens for layers whose attention is flat, fewer where it is peaked.

Shapes: B batch, L layers, G key/value heads, R query heads of a group, N queries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from pikv_core.observation import Rows
from pikv_core.scheduling.allocation import ALLOCATIONS
from pikv_core.scheduling.allocation.base import Allocation
from pikv_core.scheduling.allocation.shares import share_out

if TYPE_CHECKING:
    import torch


@ALLOCATIONS.register("entropy")
@dataclass(frozen=True)
class Entropy(Allocation):
    """Spread the budget in proportion to the entropy of the layers' attention in the first step, the prompt.

    Per layer it is the mean, in nats, over the heads and the prompt's last `queries` queries; it is taken once, since
    dropped tokens cannot come back. A layer gets at least `least` times the mean budget; until all is seen, the same.
    """

    compares_layers: ClassVar[bool] = True
    queries: Annotated[int, Field(ge=1)] = 32
    least: Annotated[float, Field(ge=0, le=1)] = 0.2

    @property
    def observes(self) -> int:
        return self.queries

    def observe(self, columns: Mapping[str, torch.Tensor], rows: Rows) -> None:
        import torch

        own, seen = rows.layer.own, rows.layer.shared.setdefault("entropy", {})
        if rows.layer.index in seen:
            return
        if rows.is_first:
            own["entropy"] = own["entropy_queries"] = 0
        own["entropy"] = own["entropy"] + torch.special.entr(rows.probs).sum(dim=-1).mean(dim=(1, 2)).sum(dim=-1)
        own["entropy_queries"] = own["entropy_queries"] + (rows.query_position >= 0).sum(dim=-1)
        if rows.is_last:
            mean = own.pop("entropy") / own.pop("entropy_queries").clamp(min=1)
            seen[rows.layer.index] = mean.double()

    def layers(
        self, mean: torch.Tensor, num_seen: torch.Tensor, num_layers: int, shared: dict[str, Any]
    ) -> torch.Tensor:
        import torch

        mean = torch.minimum(mean, num_seen).clamp(min=1)
        seen = shared.get("entropy", {})
        if len(seen) < num_layers:
            return mean[:, None].expand(-1, num_layers)
        entropy = torch.stack([seen[index] for index in range(num_layers)], dim=1).to(mean.device)
        wish = entropy / entropy.sum(dim=1, keepdim=True).clamp(min=1e-9) * (mean * num_layers)[:, None]
        least = (mean * self.least).long().clamp(min=1)[:, None]
        return share_out(wish, mean * num_layers, least, num_seen.clamp(min=1)[:, None])
