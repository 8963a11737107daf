"""What a policy is: an evictor scores stored tokens, a selector chooses the pages a query reads.

Shapes: B batch, G key/value heads, S stored tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Tokens:
    """What an evictor sees of a layer's stored tokens.

    position [B,G,S] int32: the token's true position in its sequence, -1 for an empty slot; columns: the evictor's own
    float32 [B,G,S]; num_seen [B]: tokens the sequence has had; capacity [B]: tokens that may stay, per head.
    """

    position: torch.Tensor
    columns: dict[str, torch.Tensor]
    num_seen: torch.Tensor
    capacity: torch.Tensor

    def is_recent(self, num_recent: torch.Tensor) -> torch.Tensor:
        """Return bool [B,G,S]: among the newest `num_recent` [B] tokens of the sequence."""
        return self.position >= (self.num_seen - num_recent)[:, None, None]


class Policy:
    """Base of all policies; on its own it keeps and reads every token."""

    name: ClassVar[str]


class Evictor(Policy, ABC):
    """Score stored tokens; the cache drops the lowest when it is over budget, and moves the memory.

    columns: names of the float32 statistics that the store carries along with each token, starting at 0.
    needs_mass: whether `observe` is to be called with the attention that each token received.
    """

    columns: ClassVar[tuple[str, ...]] = ()
    needs_mass: ClassVar[bool] = False

    @abstractmethod
    def score(self, tokens: Tokens) -> torch.Tensor:
        """Return float32 [B,G,S]; higher = keep."""

    def observe(self, columns: dict[str, torch.Tensor], mass: torch.Tensor) -> None:
        """Update the columns in place with attention mass [B,G,S]: summed over queries, mean over a group's heads."""
        raise NotImplementedError(f"{type(self).__name__} declares needs_mass but does not observe it")


class Selector(Policy, ABC):
    """Choose the pages a decode step reads; nothing is dropped, multi-token steps read everything.

    page_tokens: tokens of a page; over codes, the least multiple of it that is whole units.
    dense_layers: the first layers, which read everything.
    """

    page_tokens: int
    dense_layers: int

    @abstractmethod
    def num_pages(self, capacity: int, page_tokens: int) -> int:
        """Return how many pages of `page_tokens` tokens a query reads under a budget of `capacity` tokens."""

    @abstractmethod
    def score(self, query: torch.Tensor, lowest: torch.Tensor, highest: torch.Tensor) -> torch.Tensor:
        """Return page scores [B,G,P] for query [B,G,R,D] and channel bounds [B,G,P,D]; higher = read."""
