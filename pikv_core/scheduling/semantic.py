"""One representative of what is said often: tokens whose keys others already stand for go first.

Shapes: B batch, G key/value heads, S stored tokens, P representatives, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from pikv_core.scheduling import POLICIES
from pikv_core.scheduling.base import Evictor, Tokens

if TYPE_CHECKING:
    import torch


@POLICIES.register("semantic")
@dataclass(frozen=True)
class Semantic(Evictor):
    """Keep a representative of every cluster of keys, then the keys least like any of them.

    The representatives are `clusters` tokens, at most half of the budget, evenly spaced over the prompt; a cluster is
    those whose keys are nearest to one in direction.
    """

    decides_once: ClassVar[bool] = True
    heads_apart: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = ("keys",)
    clusters: Annotated[int, Field(ge=1)] = 32

    def score(self, tokens: Tokens) -> torch.Tensor:
        import torch
        from torch.nn import functional

        position = tokens.position
        direction = functional.normalize(tokens.keys().float(), dim=-1)
        num = (tokens.capacity // 2).clamp(min=1, max=self.clusters)
        step = (tokens.num_seen[:, None] / num)[..., None]
        place = torch.arange(int(num.max()), device=position.device)
        wanted = (place * step).long().masked_fill(place >= num[..., None], 0)
        in_order = position.argsort(dim=-1, stable=True)
        padding = (position < 0).sum(dim=-1, keepdim=True)
        slot = in_order.gather(-1, (wanted + padding).clamp(max=position.shape[-1] - 1))
        chosen = direction.gather(2, slot[..., None].expand(*slot.shape, direction.shape[-1]))
        likeness = (direction @ chosen.mT).amax(dim=-1)
        return (-likeness).scatter(-1, slot, torch.inf)
