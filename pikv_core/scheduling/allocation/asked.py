"""What each layer asks for: the budget in proportion to the shares that the policy's layers asked for at the prompt.

No recipe names it: a policy that asks (`Evictor.asks`) brings it along. Shapes: B batch, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pikv_core.scheduling.allocation.base import Allocation
from pikv_core.scheduling.allocation.shares import share_out

if TYPE_CHECKING:
    import torch

ASKED = "asked"  # in the layers' shared memory: the share [B] of the tokens seen that each layer asked for, by index


@dataclass(frozen=True)
class Asked(Allocation):
    """Scale what the layers ask for until they hold the budget together; until all have asked, give each the mean.

    A layer gets a token at least and all tokens at most; what it cannot hold goes to the others in proportion.
    """

    name: ClassVar[str] = "asked"
    compares_layers: ClassVar[bool] = True

    def layers(
        self, mean: torch.Tensor, num_seen: torch.Tensor, num_layers: int, shared: dict[str, Any]
    ) -> torch.Tensor:
        import torch

        mean = torch.minimum(mean, num_seen).clamp(min=1)
        asked = shared.get(ASKED, {})
        if len(asked) < num_layers:
            return mean[:, None].expand(-1, num_layers)
        share = torch.stack([asked[index] for index in range(num_layers)], dim=1).to(mean.device)
        wish = share.double() * num_seen[:, None]
        return share_out(wish, mean * num_layers, torch.ones(1, 1), num_seen.clamp(min=1)[:, None])
