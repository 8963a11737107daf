"""Shards of a lane's older tokens: pages of one store, each of which is of one shard, chosen shard by shard.

A token moves here from the newest ones. Where a router chooses, all heads of a token go to one shard; where keys are
clustered, each head has its own. Shapes: B batch, G key/value heads, R query heads of a group, N new tokens, S slots,
E shards, P pages, K pages that are read, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pikv_core.cache.shards.clusters import assign
from pikv_core.cache.store import EMPTY, Store
from pikv_core.observation import LayerRun
from pikv_core.scheduling.base import ShardKeys, ShardSelector

EXPERT = "expert"  # the column of the newest tokens' experts, counted from 1; 0: not told yet
NONE = -1  # a page that is not there
STATE = "shards"


@dataclass(frozen=True)
class OwnShards:
    """Which shards are stored here: every `count`-th one, from the `rank`-th on."""

    rank: int
    count: int

    def places(self, shard_of_page: torch.Tensor, num_shards: int) -> torch.Tensor:
        """Return where each page [B,G,P] lies here, NONE for those that lie elsewhere or nowhere."""
        is_own = (shard_of_page % self.count == self.rank) & (shard_of_page < num_shards)
        return (is_own.cumsum(-1) - 1).masked_fill(~is_own, NONE)


class Shards:
    """Place tokens in shards and choose what a query reads; what it knows lies in the layer's memory.

    That is, by name: count int64 and open_page int64 [B,G,E], the tokens of a shard and its last page; num_pages int64
    [B,G]; shard_of_page int64 [B,G,P], E for none; total float32 [B,G,E,D], the sum of a shard's keys, and their
    channel-wise extremes, lowest and highest.
    """

    def __init__(self, selector: ShardSelector, run: LayerRun, page_tokens: int, own: OwnShards | None = None):
        self.selector, self._run, self.page_tokens, self._own = selector, run, page_tokens, own

    @property
    def _state(self) -> dict[str, torch.Tensor] | None:
        return self._run.own.get(STATE)

    @property
    def columns(self) -> tuple[str, ...]:
        """Name what the newest tokens carry until they move."""
        return (EXPERT,) if self.selector.by == "router" else ()

    def take_from(self, tail: Store, body: Store) -> bool:
        """Move what is neither first nor newest from the tail to its shards in the body; tell whether anything moved.

        Tokens move some at a time, and those whose expert is not known yet wait.
        """
        num_moved = tail.num_slots - self.selector.sinks - self.selector.newest
        if num_moved < self.page_tokens:
            return False
        position = tail.position
        stays = (position >= 0) & (position < self.selector.sinks)
        order = position.masked_fill(stays, torch.iinfo(position.dtype).max).argsort(dim=-1, stable=True)
        moved, rest = order[:, :, :num_moved], order[:, :, num_moved:].sort(dim=-1).values
        position = position.gather(2, moved)
        is_token = position >= 0
        expert = None
        if self.selector.by == "router":
            expert = tail.columns()[EXPERT].gather(2, moved).long() - 1
            if bool(((expert < 0) & is_token).any()):
                return False
        take = moved[..., None]
        keys, values = (x.gather(2, take.expand(*moved.shape, x.shape[-1])) for x in tail.decoded())
        slot = self._place(keys, is_token, expert)
        if self._own is not None:
            at = self._places().gather(2, slot.clamp(min=0) // self.page_tokens)
            slot = (at * self.page_tokens + slot % self.page_tokens).masked_fill((at < 0) | (slot < 0), EMPTY)
        num_new = self._num_places() * self.page_tokens - body.num_slots
        if num_new:
            B, G = position.shape[:2]
            blank = position.new_full((B, G, num_new), EMPTY)
            body.append(
                keys.new_zeros(B, G, num_new, keys.shape[3]), values.new_zeros(B, G, num_new, values.shape[3]), blank
            )
        if body.num_slots:
            body.overwrite(slot, keys, values, position)
        tail.keep(rest)
        return True

    def choose(self, query: torch.Tensor, scale: float, room_tokens: int) -> torch.Tensor | None:
        """Return the pages [B,G,K] that query [B,G,R,D] reads, NONE where it reads fewer; None for all there are.

        room_tokens: what it may read of them.
        """
        state, selector = self._state, self.selector
        assert state is not None
        E, page_shard = selector.shards, state["shard_of_page"]
        P = page_shard.shape[2]
        most = selector.top_shards or E
        fit = selector.num_pages(room_tokens, self.page_tokens)
        if most >= E and fit >= P:
            return None
        rank = self.score(query, scale).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        rank = torch.nn.functional.pad(rank, (0, 1), value=E).gather(2, page_shard)
        is_wanted = rank < most
        longest = int(is_wanted.sum(-1).max())
        first = torch.arange(P, device=query.device) - rank * P  # higher: a better shard, then a later page
        pages = first.topk(max(1, min(fit, longest)), dim=-1).indices
        pages = pages.masked_fill(~is_wanted.gather(2, pages), NONE)
        if self._own is None:
            return pages
        here = self._places().gather(2, pages.clamp(min=0)).masked_fill(pages < 0, NONE)
        return here.sort(dim=-1, descending=True).values[..., : max(1, int((here >= 0).sum(-1).max()))]

    def score(self, query: torch.Tensor, scale: float) -> torch.Tensor:
        """Return the selector's scores [B,G,E] for query [B,G,R,D], -inf for empty shards."""
        state = self._state
        assert state is not None
        count = state["count"]
        mean = state["total"] / count.clamp(min=1)[..., None]
        keys = ShardKeys(count, mean, state["lowest"], state["highest"])
        return self.selector.score(query, keys, scale).masked_fill(count == 0, -torch.inf)

    @property
    def read_bytes(self) -> int:
        """Bytes of what a query is compared with, and of the pages' shards, of all rows and heads."""
        state = self._state
        assert state is not None
        told = ("lowest", "highest") if self.selector.promise == "bounds" else ("total",)
        return sum(state[name].nbytes for name in ("count", "shard_of_page", *told))

    def num_slow(self, pages: torch.Tensor | None) -> int:
        """Return how many of these pages [B,G,K] are of slow shards, of all rows and heads; None stands for all."""
        state, selector = self._state, self.selector
        assert state is not None
        shard = state["shard_of_page"]
        if self._own is not None:
            at = self._places()
            beyond = shard.shape[2]
            here = torch.nn.functional.pad(shard, (0, 1)).scatter(2, at.masked_fill(at < 0, beyond), shard)
            shard = here[..., : self._num_places()]
            ends = (at >= 0).sum(-1, keepdim=True)
            shard = shard.masked_fill(torch.arange(shard.shape[2], device=shard.device) >= ends, selector.shards)
        if pages is not None:
            shard = shard.gather(2, pages.clamp(min=0)).masked_fill(pages < 0, selector.shards)
        first = selector.shards - selector.slow_shards
        return int(((shard >= first) & (shard < selector.shards)).sum())

    def _places(self) -> torch.Tensor:
        """Return where each page [B,G,P] lies in the body here, NONE for those that do not."""
        state = self._state
        assert state is not None and self._own is not None
        return self._own.places(state["shard_of_page"], self.selector.shards)

    def _num_places(self) -> int:
        """Return how many pages the body has here, in the head that has the most."""
        state = self._state
        assert state is not None
        num_pages = state["shard_of_page"].shape[2]
        return num_pages if self._own is None or not num_pages else int(self._places().max()) + 1

    def _place(self, keys: torch.Tensor, is_token: torch.Tensor, expert: torch.Tensor | None) -> torch.Tensor:
        """Return the slots [B,G,N] of new tokens, EMPTY for padding, and count them in."""
        B, G = keys.shape[:2]
        E, page = self.selector.shards, self.page_tokens
        state = self._state or self._begin(keys)
        count = state["count"]
        shard = assign(keys, is_token, count, state["total"]) if expert is None else expert % E
        member = torch.nn.functional.one_hot(shard, E) * is_token[..., None]
        before = (member.cumsum(2) - member).gather(3, shard[..., None])[..., 0]  # new tokens of the shard before it
        after = count + member.sum(2)
        num_old, num_now = ((x + page - 1) // page for x in (count, after))
        first_new = state["num_pages"][..., None] + (num_now - num_old).cumsum(-1) - (num_now - num_old)
        index = count.gather(2, shard) + before
        nth = index // page
        is_open = nth < num_old.gather(2, shard)
        page_of = torch.where(
            is_open, state["open_page"].gather(2, shard), first_new.gather(2, shard) + nth - num_old.gather(2, shard)
        )
        state["open_page"] = torch.where(num_now > num_old, first_new + num_now - num_old - 1, state["open_page"])
        state["num_pages"] = state["num_pages"] + (num_now - num_old).sum(-1)
        state["count"] = after
        state["total"] = state["total"] + member.mT.float() @ keys.float()
        most = torch.finfo(keys.dtype).max
        for name, reduce, worst in (("lowest", "amin", most), ("highest", "amax", -most)):
            new = keys.masked_fill(~is_token[..., None], worst)
            state[name] = state[name].scatter_reduce(2, shard[..., None].expand_as(keys), new, reduce)
        known = state["shard_of_page"]
        more = int(state["num_pages"].max()) - known.shape[2]
        if more > 0:
            known = torch.nn.functional.pad(known, (0, more), value=E)
        known = known.clone()
        at = torch.arange(B * G, device=keys.device).view(B, G, 1) * known.shape[2] + page_of
        known.view(-1)[at[is_token]] = shard[is_token]
        state["shard_of_page"] = known
        return (page_of * page + index % page).masked_fill(~is_token, EMPTY)

    def _begin(self, keys: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return empty shards for keys [B,G,N,D]."""
        (B, G, _, D), E = keys.shape, self.selector.shards
        most = torch.finfo(keys.dtype).max  # finite, so that a query's zero does not turn it into NaN
        whole = torch.zeros(B, G, E, dtype=torch.int64, device=keys.device)
        self._run.own[STATE] = state = {
            "count": whole,
            "open_page": whole.clone(),
            "num_pages": whole[..., 0].clone(),
            "shard_of_page": whole[..., :0].clone(),
            "total": torch.zeros(B, G, E, D, device=keys.device),
            "lowest": keys.new_full((B, G, E, D), most),
            "highest": keys.new_full((B, G, E, D), -most),
        }
        return state
