"""A cache that is split over ranks, by heads, tokens or shards: what a rank holds, and what ranks tell each other.

Every rank has the whole model and goes on with the same bits as the others. By heads it holds some of every layer's
key/value heads, attends by their queries alone, and the outputs are put together. By tokens it holds some of the
tokens, all queries attend over them, and the partial outputs are merged by their log-sum-exp, in the order of ranks. By
shards: see `pikv_core.cache.ranks.by_shards`.
Shapes: B batch, H query heads, G key/value heads, R = H/G, T new tokens, S stored slots, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from pikv_core.cache.ranks.all_heads import AllHeads
from pikv_core.cache.ranks.attend_part import attend_part
from pikv_core.cache.ranks.by_shards import ByShards, check_shards
from pikv_core.compression.base import Codec
from pikv_core.errors import UsageError
from pikv_core.scheduling import POLICIES
from pikv_core.scheduling.allocation import ALLOCATIONS
from pikv_core.scheduling.base import Evictor, Policy, Selector, ShardSelector
from pikv_core.scheduling.flexgen import FlexGen
from pikv_core.schema import CacheRecipe
from pikv_kernels.merge_partials import merge_partials
from pikv_kernels.partial_attention import Partial

if TYPE_CHECKING:
    from pikv_core.cache.layer import CacheLayer

BLOCK_TOKENS = 16  # consecutive tokens of one rank, or the least multiple that is whole units of the codec
TO_SHARDS = "give --split shards"


class Wire:
    """Gather tensors of all ranks; counts the bytes that came from the others."""

    def __init__(self, rank: int = 0, count: int = 1):
        self.rank, self.count = rank, count
        self.received_bytes = 0

    def gather(self, *tensors: torch.Tensor) -> list[list[torch.Tensor]]:
        """Return what every rank gives, in the order of ranks; shapes and dtypes are the same on all of them."""
        sizes = [x.nbytes for x in tensors]
        mine = torch.empty(sum(sizes), dtype=torch.uint8, device=tensors[0].device)
        for part, x in zip(mine.split(sizes), tensors, strict=True):
            part.view(x.dtype).view(x.shape).copy_(x)
        whole = self._exchange(mine).view(self.count, -1)
        self.received_bytes += (self.count - 1) * mine.nbytes
        return [
            [part.view(x.dtype).view(x.shape) for part, x in zip(row.split(sizes), tensors, strict=True)]
            for row in whole
        ]

    def numbers(self, value: int) -> list[int]:
        """Return a number of every rank; uncounted."""
        return self._exchange(torch.tensor([value]).view(torch.uint8)).view(torch.int64).tolist()

    def collect(self, data: bytes) -> list[bytes]:
        """Return on rank 0 what every rank gives, and nothing on the others; uncounted."""
        sizes = self.numbers(len(data))
        if self.rank:
            dist.send(torch.frombuffer(bytearray(data), dtype=torch.uint8), 0)
            return []
        arrived = [data]
        for rank in range(1, self.count):
            there = torch.empty(sizes[rank], dtype=torch.uint8)
            dist.recv(there, rank)
            arrived.append(there.numpy().tobytes())
        return arrived

    def _exchange(self, mine: torch.Tensor) -> torch.Tensor:
        """Return the bytes of all ranks, one after the other."""
        whole = mine.new_empty(self.count * len(mine))
        dist.all_gather([*whole.view(self.count, -1)], mine)
        return whole


class Heads:
    """Hold an equal share of every layer's key/value heads, and attend by the queries of their groups."""

    name = "heads"
    own_shards = None

    def __init__(self, wire: Wire):
        self._wire = wire
        self.parts_of_heads = wire.count

    def first_head(self, num_kv_heads: int) -> int:
        """Return which of a layer's heads is the first one here."""
        return self._wire.rank * num_kv_heads // self._wire.count

    def own_heads(self, x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """Return this rank's part of a tensor with a dimension of heads."""
        share = x.shape[dim] // self._wire.count
        return x.narrow(dim, self._wire.rank * share, share)

    def gather_heads(self, x: torch.Tensor) -> torch.Tensor:
        """Return [B,G,...] of all heads, given what each rank has of those that are there."""
        return torch.cat([part for (part,) in self._wire.gather(x)], dim=1)

    def codec(self, codec: Codec, num_kv_heads: int) -> Codec:
        """Return a layer's codec for the heads that are here."""
        return codec.for_heads(self.own_heads(torch.arange(num_kv_heads)[None]))

    def attend(
        self,
        layer: CacheLayer,
        query: torch.Tensor,
        scale: float,
        is_token: torch.Tensor | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attend as `CacheLayer.attend` does, over all ranks."""
        own = None if sinks is None else self.own_heads(sinks, dim=0)
        attended = layer.attend_here(self.own_heads(query), scale, is_token, softcap, own)
        return self.gather_heads(attended)

    def capacity(self, layer: CacheLayer, capacity: torch.Tensor) -> torch.Tensor:
        """Return how many of the `capacity` [B,G] tokens that may stay are held here."""
        return capacity

    def num_waiting(self, layer: CacheLayer) -> int | None:
        """Return how many tokens here are not to be encoded yet, None for what the codec says."""
        return None

    def end_step(self, layer: CacheLayer, is_first: bool) -> None:
        """Drop what is not this rank's of a step that every rank has taken in whole."""


@dataclass(frozen=True)
class Turns:
    """Who has which of a sequence's columns (tokens, padding too): blocks, dealt one after the other."""

    rank: int
    count: int
    block: int

    def before(self, column: int) -> int:
        """Return how many columns before this one are this rank's."""
        rounds, rest = divmod(column, self.block * self.count)
        return rounds * self.block + min(max(rest - self.rank * self.block, 0), self.block)

    def among(self, columns: torch.Tensor) -> torch.Tensor:
        """Return bool: which of these columns are this rank's."""
        return columns // self.block % self.count == self.rank


class TokenTurns(AllHeads):
    """Hold the tokens of this rank's turns, in all heads.

    A first prompt every rank attends whole, in full precision, and then keeps its part: nothing is sent, and for a
    moment one layer's whole prompt is held. Later tokens only their owner takes in.
    """

    name = "tokens"
    own_shards = None

    def __init__(self, wire: Wire, block: int):
        self._wire = wire
        self.turns = Turns(wire.rank, wire.count, block)

    def attend(
        self,
        layer: CacheLayer,
        query: torch.Tensor,
        scale: float,
        is_token: torch.Tensor | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attend as `CacheLayer.attend` does, over all ranks."""
        if layer.seen_length == 0:
            return layer.attend_here(query, scale, is_token, softcap, sinks)
        first, T = layer.seen_length, query.shape[2]
        keys, values, position, is_prompt = layer.take(is_token)
        lane = layer.lanes[0]
        lane.has_empty = lane.has_empty or is_token is not None
        is_mine = self.turns.among(torch.arange(first, first + T))
        if bool(is_mine.all()):
            lane.arrive(keys, values, position)
        elif bool(is_mine.any()):
            mine = is_mine.nonzero()[:, 0].to(keys.device)
            lane.arrive(keys[:, :, mine], values[:, :, mine], position[:, mine])
        G = keys.shape[1]
        part = attend_part(lane.stores, query, G, position, layer.window, lane.has_empty, scale, softcap)
        parts = [Partial(output, lse, None) for lse, output in self._wire.gather(part.lse, part.output)]
        logits = None if sinks is None else sinks.view(1, G, -1, 1).expand(-1, -1, -1, T).flatten(2)
        merged, _ = merge_partials(parts, logits)
        layer.end_step(T, is_prompt)
        return merged.reshape(query.shape)

    def capacity(self, layer: CacheLayer, capacity: torch.Tensor) -> torch.Tensor:
        """Return how many of the `capacity` [B,G] tokens that may stay, at the sequence's ends, are held here."""
        first = torch.zeros_like(capacity)
        newest = capacity
        if layer.evictor is not None:
            ends = layer.evictor.ends(capacity)
            assert ends is not None
            first, newest = ends
        counts = []
        for num_seen, num_first, num_newest in zip(
            layer.num_seen.tolist(), first[:, 0].tolist(), newest[:, 0].tolist()
        ):
            padding = layer.seen_length - num_seen
            bounds = (0, num_first, max(num_first, num_seen - num_newest), num_seen)
            start, end, later, last = (self.turns.before(padding + position) for position in bounds)
            counts.append(end - start + last - later)
        return torch.tensor(counts)[:, None].expand_as(capacity)

    def num_waiting(self, layer: CacheLayer) -> int | None:
        body = layer.lanes[0].body
        if body is None:
            return None
        encoded = max(0, layer.seen_length - body.codec.residual) // body.unit * body.unit
        return self.turns.before(layer.seen_length) - self.turns.before(encoded)

    def end_step(self, layer: CacheLayer, is_first: bool) -> None:
        if not is_first:
            return
        tail = layer.lanes[0].tail
        B, G, S = tail.position.shape
        mine = self.turns.among(torch.arange(S)).nonzero()[:, 0].to(tail.position.device)
        tail.keep(mine.expand(B, G, -1))
        layer.note_bytes()


Split = Heads | TokenTurns | ByShards


def make_split(
    name: str,
    wire: Wire,
    recipe: CacheRecipe,
    policy: Policy,
    codecs: Sequence[Codec],
    num_kv_heads: int,
    per_layer: Sequence[int | None],
) -> Split:
    """Return how each layer's part is split off; raise UsageError for what cannot be split so, with the reason.

    codecs, per_layer: each layer's codec and sliding window.
    """
    if recipe.tiers is not None or isinstance(policy, FlexGen):
        raise UsageError(
            "a cache over ranks does not go over tiers too: each rank's memories are its own",
            hint="leave out --split, or tiers and policy flexgen",
        )
    if isinstance(policy, Evictor) and policy.asks:
        raise UsageError(
            f"policy '{policy.name}' spreads one budget by what the layers ask for, which ranks do not tell each other",
            hint="leave out --split, or the policy's mode",
        )
    if name == Heads.name:
        _check_heads(wire.count, recipe, policy, num_kv_heads)
        return Heads(wire)
    if name == ByShards.name:
        check_shards(wire.count, recipe, policy, per_layer)
        return ByShards(wire)
    _check_tokens(recipe, policy, codecs, per_layer)
    return TokenTurns(wire, math.lcm(BLOCK_TOKENS, *(codec.unit_tokens for codec in codecs)))


def _check_heads(count: int, recipe: CacheRecipe, policy: Policy, num_kv_heads: int) -> None:
    allocation = ALLOCATIONS[recipe.allocation.name]
    apart = [name for name in POLICIES.names() if POLICIES[name].heads_apart]
    if num_kv_heads % count:
        raise UsageError(
            f"the model's {num_kv_heads} key/value heads do not divide evenly by {count} ranks",
            hint="start a number of ranks that divides them, or give --split tokens",
        )
    if not policy.heads_apart:
        raise UsageError(
            f"policy '{recipe.policy.name}' does not judge each head by itself, so its heads cannot lie on ranks apart",
            hint=TO_SHARDS if isinstance(policy, ShardSelector) else f"choose one of {', '.join(apart)}",
        )
    for name, member in policy.members.items():
        if not member.heads_apart:
            fit = [known for known in apart if issubclass(POLICIES[known], Evictor)]
            raise UsageError(
                f"policy '{name}', which '{recipe.policy.name}' chooses among, does not judge each head by itself, so "
                "its heads cannot lie on ranks apart",
                hint=f"let it choose among {', '.join(fit)}",
            )
    if allocation.splits_heads or allocation.compares_layers:
        raise UsageError(
            f"allocation '{recipe.allocation.name}' goes by the attention of all heads, which lie on ranks apart",
            hint="choose allocation uniform or pyramid",
        )


def _check_tokens(
    recipe: CacheRecipe, policy: Policy, codecs: Sequence[Codec], per_layer: Sequence[int | None]
) -> None:
    name, hint = recipe.policy.name, "choose policy full, window or streaming-llm, or give --split heads"
    evicts = isinstance(policy, Evictor) and recipe.budget != 1.0
    if isinstance(policy, Selector):
        raise UsageError(
            f"policy '{name}' chooses pages among all tokens, which lie on ranks apart",
            hint=TO_SHARDS if isinstance(policy, ShardSelector) else hint,
        )
    if isinstance(policy, Evictor) and policy.ends(torch.ones(1, 1, dtype=torch.int64)) is None:
        raise UsageError(
            f"policy '{name}' compares tokens by more than their positions, and they lie on ranks apart", hint=hint
        )
    if evicts and isinstance(recipe.budget, float):
        raise UsageError(
            f"a budget of {recipe.budget}, a share of the tokens seen, grows with them: which went before, a rank that "
            "holds some cannot tell",
            hint="give the budget in tokens per head, such as 512, or in bytes, such as 64MiB",
        )
    if recipe.allocation.name != "uniform":
        raise UsageError(
            f"allocation '{recipe.allocation.name}' does not go with tokens on ranks apart", hint="leave it out"
        )
    if recipe.rerotate:
        raise UsageError(
            "rerotate counts the tokens that are left, and they lie on ranks apart",
            hint="leave out rerotate, or give --split heads",
        )
    if any(codec.columns for codec in codecs):
        raise UsageError(
            f"codec '{recipe.codec.name}' sorts tokens by their attention, and they lie on ranks apart",
            hint="choose another codec, or give --split heads",
        )
    has_window = any(window is not None for window in per_layer)
    if any(codec.unit_tokens > 1 for codec in codecs) and (evicts or has_window):
        what = f"policy '{name}'" if evicts else "a sliding window"
        raise UsageError(
            f"codec '{recipe.codec.name}' drops whole units, and {what} on ranks apart drops single tokens",
            hint="choose codec none, or give --split heads",
        )
    if evicts and has_window:
        raise UsageError(
            f"policy '{name}' does not go with the model's sliding windows on ranks apart", hint="choose policy full"
        )
