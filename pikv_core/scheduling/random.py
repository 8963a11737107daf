"""Random tokens: the baseline that every other policy has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from pikv_core.scheduling import POLICIES
from pikv_core.scheduling.base import Evictor, Tokens

if TYPE_CHECKING:
    import torch


@POLICIES.register("random")
@dataclass(frozen=True)
class Random(Evictor):
    """Keep tokens by a hash of `seed`, layer, head and position, even over [0, 1): the same whenever it is asked."""

    is_static: ClassVar[bool] = True
    heads_apart: ClassVar[bool] = True
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    def score(self, tokens: Tokens) -> torch.Tensor:
        import torch

        state = torch.full_like(tokens.head, self.seed ^ 0x9E3779B9, dtype=torch.int64)
        state = _mix(_mix(_mix(state) ^ tokens.layer.index) ^ (tokens.layer.first_head + tokens.head))
        hashed = _mix(state[..., None] ^ tokens.position.clamp(min=0))
        return (hashed >> 8).float() / 2**24


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Mix the bits of int64 numbers below 2^32, one to one (the hash known as lowbias32)."""
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x735A2D97) & 0xFFFFFFFF
    return x ^ (x >> 15)
