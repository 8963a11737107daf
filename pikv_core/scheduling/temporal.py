"""Segments of the text, whole: the recent ones, and those that the end of the context comes back to.

Shapes: B batch, G key/value heads, S stored tokens, N segments, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from pikv_core.scheduling import POLICIES
from pikv_core.scheduling.base import Evictor, Tokens

if TYPE_CHECKING:
    import torch

LEAST = 1e-3  # what orders tokens within a segment, and no segments


@POLICIES.register("temporal")
@dataclass(frozen=True)
class Temporal(Evictor):
    """Keep segments of `segment` tokens by recency and repetition, parted evenly.

    Recency falls from 1 to 0 over the prompt; repetition is the cosine of a segment's mean key to the newest segment's.
    Within a segment newer tokens stay longer.
    """

    decides_once: ClassVar[bool] = True
    heads_apart: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = ("keys",)
    segment: Annotated[int, Field(ge=1)] = 32

    def score(self, tokens: Tokens) -> torch.Tensor:
        from torch.nn import functional

        position, seen = tokens.position, tokens.num_seen[:, None, None]
        keys = functional.normalize(tokens.keys().float(), dim=-1)
        age = (seen - 1 - position).clamp(min=0).where(position >= 0, 0)
        segment = (age // self.segment).long()
        num_segments = int(segment.max()) + 1
        B, G, _, D = keys.shape
        index = segment[..., None].expand(-1, -1, -1, D)
        real = keys.masked_fill((position < 0)[..., None], 0.0)
        means = functional.normalize(keys.new_zeros(B, G, num_segments, D).scatter_add_(2, index, real), dim=-1)
        repetition = (means @ means[:, :, :1].mT)[..., 0].gather(-1, segment)
        recency = 1 - (segment * self.segment) / seen
        within = 1 - (age % self.segment) / self.segment
        return recency + repetition + LEAST * within
