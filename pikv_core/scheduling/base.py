"""What a policy is: an evictor scores stored tokens, a selector chooses the pages a query reads.

Shapes: B batch, H query heads, G key/value heads, T new tokens, S stored tokens, D head dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pikv_core.observation import LayerRun, Observer

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Tokens:
    """What an evictor sees of a layer's stored tokens.

    position [B,G,S] int32: the token's true position in its sequence, -1 for an empty slot; columns: the evictor's own
    float32 [B,G,S]; num_seen [B]: tokens the sequence has had; capacity [B,G]: tokens that may stay; head [B,G]: which
    of the layer's key/value heads; row [B]: which of the batch's rows. keys, values: return what is stored [B,G,S,D],
    decoded, keys as attention uses them.
    """

    position: torch.Tensor
    columns: dict[str, torch.Tensor]
    num_seen: torch.Tensor
    capacity: torch.Tensor
    head: torch.Tensor
    row: torch.Tensor
    keys: Callable[[], torch.Tensor]
    values: Callable[[], torch.Tensor]
    layer: LayerRun

    def is_recent(self, num_recent: torch.Tensor) -> torch.Tensor:
        """Return bool [B,G,S]: among the newest `num_recent` [B,G] tokens of the sequence."""
        return self.position >= (self.num_seen[:, None] - num_recent)[..., None]


class Policy:
    """Base of all policies; on its own it keeps and reads every token.

    calibrated: whether it needs tensors that were fitted to the model (`LayerRun.fitted`), by the recipe `fitted_by`
    of recipes/train. reads: what else it asks of a run: the stored "keys" and "values", the model's "rotary" embedding.
    takes_budget: False where it keeps and reads everything, so that a budget means nothing. heads_apart: whether each
    key/value head is judged by its own tokens and attention alone, or by what `LayerRun.gather_heads` returns, so that
    heads may lie on ranks apart; what such a policy remembers of a layer are plain values, and tensors whose second
    dimension, if any, is the heads, unless their key begins with WHOLE. members: policies that it chooses among.
    """

    name: ClassVar[str]
    takes_budget: ClassVar[bool] = True
    calibrated: ClassVar[bool] = False
    heads_apart: ClassVar[bool] = False
    fitted_by: ClassVar[str] = ""
    reads: ClassVar[tuple[str, ...]] = ()
    members: ClassVar[Mapping[str, Policy]] = {}

    @property
    def needs(self) -> frozenset[str]:
        """Name all that the policy goes by, beside the tokens' positions."""
        return frozenset({*self.reads, *(("calibration",) if self.calibrated else ())})


class Evictor(Policy, Observer, ABC):
    """Score stored tokens; the cache drops the lowest when it is over budget, and moves the memory.

    decides_once: the score is taken once, after a prompt, and stays with each token; `columns` last until then. Tokens
    that come later go only when no scored one is left. looks: what the model has to be shown after the prompt, its
    attention alone being observed, before the score is taken: the prompt again ("repeat"), or what the run will
    feed it later ("future"); None for nothing. sees_queries: whether `observe_queries` is called. is_static: whether
    `observe` and `score` ask the device for no value and do the same in every step of one token, so that a step can be
    recorded and replayed; of a policy that decides once nothing runs in such a step. waits_for_steps: whether it has
    nothing to decide by before steps of one token have come.
    """

    decides_once: ClassVar[bool] = False
    looks: ClassVar[Literal["repeat", "future"] | None] = None
    sees_queries: ClassVar[bool] = False
    is_static: ClassVar[bool] = False
    waits_for_steps: ClassVar[bool] = False

    @property
    def needs(self) -> frozenset[str]:
        asked = {"attention": self.observes > 0, "queries": self.sees_queries, "repetition": self.looks == "repeat"}
        return super().needs | {name for name, is_asked in asked.items() if is_asked}

    @abstractmethod
    def score(self, tokens: Tokens) -> torch.Tensor:
        """Return float32 [B,G,S]; higher = keep."""

    def capacity(self, mean: torch.Tensor, num_seen: torch.Tensor, layer: LayerRun) -> torch.Tensor | None:
        """Return tokens per head [B,G] of this layer where the policy has its own idea, given the mean over all [B].

        None leaves it to the allocation.
        """
        return None

    @property
    def asks(self) -> bool:
        """Whether every layer asks for its part of one budget (`ask`), so that none drops before all have asked."""
        return False

    def ask(self, tokens: Tokens) -> torch.Tensor:
        """Return the share [B] of the tokens seen that a layer asks for, in proportion to which the budget is spread.

        Called at the end of a prompt while nothing is gone; `tokens.capacity` is the mean over the layers, and the
        layer's heads are all there.
        """
        raise NotImplementedError(f"{type(self).__name__} declares that its layers ask but does not ask")

    @property
    def native_share(self) -> float | None:
        """The share of the tokens seen that the policy stands for, whatever the budget; None where it has none."""
        return None

    def ends(self, capacity: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return how many first and newest tokens [B,G] of a sequence stay, where positions alone say it; None else.

        capacity [B,G]: tokens that may stay, the same in every step.
        """
        return None

    def prompt_reach(self, capacity: torch.Tensor, layer: LayerRun) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return how far a prompt's queries see, where the policy limits it and not only what stays of the prompt.

        That is how many first tokens of the sequence, and how many newest, the query's own included, [B,G] each, given
        the tokens [B,G] that may stay after the prompt. None for all tokens.
        """
        return None

    def observe_queries(self, query: torch.Tensor, position: torch.Tensor, layer: LayerRun) -> None:
        """Learn from the queries [B,H,T,D] of a prompt at `position` [B,T] (-1: padding), rotated as attention does."""
        raise NotImplementedError(f"{type(self).__name__} declares sees_queries but does not observe them")


class Selector(Policy, ABC):
    """Choose the pages a decode step reads; nothing is dropped, multi-token steps read everything.

    page_tokens: tokens of a page; over codes, the least multiple of it that is whole units.
    dense_layers: the first layers, which read everything. limits_itself: whether it leaves something out even under a
    budget of all tokens.
    """

    reads: ClassVar[tuple[str, ...]] = ("keys", "queries")
    page_tokens: int
    dense_layers: int

    @property
    def limits_itself(self) -> bool:
        return False

    @abstractmethod
    def num_pages(self, capacity: int, page_tokens: int) -> int:
        """Return how many pages of `page_tokens` tokens a query reads under a budget of `capacity` tokens."""


class PageSelector(Selector):
    """Choose among pages of consecutive tokens, by the bounds of their keys."""

    @abstractmethod
    def score(self, query: torch.Tensor, lowest: torch.Tensor, highest: torch.Tensor) -> torch.Tensor:
        """Return page scores [B,G,P] for query [B,G,R,D] and channel bounds [B,G,P,D]; higher = read."""


@dataclass(frozen=True)
class ShardKeys:
    """What is known of the keys of E shards: tokens [B,G,E], their mean, float32, and channel bounds [B,G,E,D]."""

    count: torch.Tensor
    mean: torch.Tensor
    lowest: torch.Tensor
    highest: torch.Tensor


class ShardSelector(Selector):
    """Choose among E shards of older tokens, each of which has pages of its own; the newest page of a shard first.

    sinks, newest: first and newest tokens, which are in no shard and always read. by: what sends a token to its shard,
    "keys" or the layer's "router". promise: what it scores by, "bounds" or "centroid". slow_shards: how many of the
    last shards are slow to read.
    """

    reads: ClassVar[tuple[str, ...]] = ("keys", "queries", "shards")
    shards: int
    top_shards: int | None
    by: Literal["keys", "router"]
    promise: Literal["bounds", "centroid"]
    sinks: int
    newest: int
    slow_shards: int

    @abstractmethod
    def score(self, query: torch.Tensor, shards: ShardKeys, scale: float) -> torch.Tensor:
        """Return shard scores [B,G,E] for query [B,G,R,D]; higher = read. Shards without tokens may get anything.

        scale: of the attention logits.
        """
