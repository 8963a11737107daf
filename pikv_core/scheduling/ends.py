"""Fixed shares of a context's beginning and end, as the origin's strategies have them, scaled to the budget.

They took 30, 50 and 80 % of the tokens; here the shares say how a budget is parted between both ends. What they took is
their `native_share`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pikv_core.scheduling import POLICIES
from pikv_core.scheduling.base import Evictor, Tokens

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Ends(Evictor):
    """Keep the first and the last tokens of a prompt, in the proportion of the percentages `first` and `last`."""

    decides_once: ClassVar[bool] = True
    heads_apart: ClassVar[bool] = True
    first: ClassVar[int]
    last: ClassVar[int]

    @property
    def native_share(self) -> float:
        return (self.first + self.last) / 100

    def score(self, tokens: Tokens) -> torch.Tensor:
        num_first = tokens.capacity * self.first // (self.first + self.last)
        is_first = tokens.position < num_first[..., None]
        return tokens.position.float().masked_fill(is_first, float("inf"))


@POLICIES.register("aggressive")
@dataclass(frozen=True)
class Aggressive(Ends):
    """Keep two tokens of the beginning for one of the end."""

    first: ClassVar[int] = 20
    last: ClassVar[int] = 10


@POLICIES.register("moderate")
@dataclass(frozen=True)
class Moderate(Ends):
    """Keep three tokens of the beginning for two of the end."""

    first: ClassVar[int] = 30
    last: ClassVar[int] = 20


@POLICIES.register("conservative")
@dataclass(frozen=True)
class Conservative(Ends):
    """Keep five tokens of the beginning for three of the end."""

    first: ClassVar[int] = 50
    last: ClassVar[int] = 30
