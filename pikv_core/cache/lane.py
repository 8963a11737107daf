"""A lane: the (row, head) pairs of a layer that hold equally many tokens, in dense stores.

A layer starts as one lane of all its rows and heads, and splits when a budget makes its heads unequal: then each lane
is N pairs, stored as N rows of one head, and what the others drop is really freed.
Shapes: B rows of this lane, H query heads, G key/value heads of this lane, R = H/G, T new tokens, S slots, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from pikv_core.cache.chunks import attend_in_chunks
from pikv_core.cache.eviction import Room, evict
from pikv_core.cache.newest import Read, attend_newest
from pikv_core.cache.page_bounds import PageBounds
from pikv_core.cache.reach import Reach
from pikv_core.cache.recording import CHUNK_QUERIES, Recorded
from pikv_core.cache.shards.shards import OwnShards, Shards
from pikv_core.cache.store import Store
from pikv_core.cache.tiers.store import TieredStore
from pikv_core.cache.tiers.tiers import Tiers
from pikv_core.compression.base import Codec
from pikv_core.compression.none import Plain
from pikv_core.observation import LayerRun, Observer, Reads, Rows
from pikv_core.scheduling.base import Evictor, PageSelector, Selector, ShardSelector, Tokens
from pikv_kernels.partial_attention import causal_attention
from pikv_kernels.prefill_rows import prefill_rows

SCORE = "score"  # the column of a score that was taken once: ranks, which later tokens' positions exceed


@dataclass(frozen=True)
class LayerPlan:
    """What a layer does with tokens, whichever they are.

    window: tokens a query may look back, itself included, None for all. rerotate: keys are read at the positions
    0..S-1 of what is left instead of their own. own_shards: those that are stored here, None for all.
    """

    codec: Codec
    evictor: Evictor | None
    selector: Selector | None
    window: int | None
    rerotate: bool
    run: LayerRun
    tiers: Tiers | None = None
    own_shards: OwnShards | None = None

    @property
    def page(self) -> int:
        """Slots that stores grow by."""
        return math.lcm(self.selector.page_tokens, self.codec.unit_tokens) if self.selector else 8

    @property
    def decides_once(self) -> bool:
        return self.evictor is not None and self.evictor.decides_once

    def store(self, codec: Codec, columns: tuple[str, ...], grain_slots: int) -> Store:
        """Return an empty store for the tokens that stay; those of a sliding window are few, and stay on the device."""
        if self.tiers is None or self.window is not None:
            return Store(codec, columns, grain_slots)
        return TieredStore(codec, columns, grain_slots, self.tiers, self.run.index, self.selector is not None)

    def columns(self, scoring: bool) -> tuple[str, ...]:
        """Name the evictor's statistics of stored tokens; `scoring` while a score taken once is still to come."""
        own = self.evictor.columns if self.evictor and (scoring or not self.decides_once) else ()
        return (*own, *((SCORE,) if self.decides_once else ()))


class Lane:
    """Dense stores of B rows and G heads: the newest tokens in full precision (`tail`), older under the codec (`body`).

    pairs: None for a whole layer, else row·heads + head of each of the B rows, G being 1. head [B,G]: the layer's head;
    row [B]: the batch's row.
    """

    def __init__(self, plan: LayerPlan, pairs: torch.Tensor | None, head: torch.Tensor):
        self.plan, self.pairs, self.head = plan, pairs, head
        self.row = self._rows_of_pairs()
        codec = plan.codec if pairs is None else plan.codec.for_heads(head)
        columns, page, selector = plan.columns(scoring=True), plan.page, plan.selector
        self.shards = None
        if isinstance(selector, ShardSelector):
            self.shards = Shards(selector, plan.run, page, plan.own_shards)
        is_whole = isinstance(codec, Plain) and self.shards is None
        waits = (*columns, *self._tail_columns())
        self.tail = plan.store(Plain(), waits, page) if is_whole else Store(Plain(), waits, 8)
        self.body = None if is_whole else plan.store(codec, columns, page)
        self.bounds = PageBounds(page) if isinstance(selector, PageSelector) else None
        self.has_empty = False
        self.in_order = True
        self._room: tuple[torch.Tensor, Room] | None = None
        self._beside: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def _tail_columns(self) -> tuple[str, ...]:
        """Name what is of use until tokens leave the tail: what a codec encodes by, or shards place by."""
        return (*self.plan.codec.columns, *(self.shards.columns if self.shards is not None else ()))

    @property
    def stores(self) -> list[Store]:
        """The stores that hold tokens, older ones first."""
        return [store for store in (self.body, self.tail) if store is not None and store.num_slots]

    @property
    def num_slots(self) -> int:
        """Slots per head, empty ones included."""
        return sum(store.num_slots for store in self.stores)

    @property
    def nbytes(self) -> int:
        """Bytes of live storage: codes, scales, positions, statistics, page bounds, spare room."""
        held = self.tail.nbytes + (self.body.nbytes if self.body is not None else 0)
        return held + (self.bounds.nbytes if self.bounds is not None else 0)

    def _rows_of_pairs(self) -> torch.Tensor:
        return torch.arange(len(self.head)) if self.pairs is None else self.pairs // self.plan.run.num_kv_heads

    def of_heads(self, x: torch.Tensor) -> torch.Tensor:
        """Return this lane's part [B,G·n,...] of a layer's tensor [rows, heads·n, ...], or of [rows, heads]."""
        if self.pairs is None:
            return x
        num_heads = self.plan.run.num_kv_heads
        by_pair = x.reshape(len(x) * num_heads, x.shape[1] // num_heads, *x.shape[2:])
        return by_pair.index_select(0, self.pairs if x.is_cpu else self.pairs_here())

    def pairs_here(self) -> torch.Tensor:
        """Return `pairs` beside the tokens."""
        assert self.pairs is not None
        return self._here("pairs", self.pairs)

    def of_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Return this lane's part [B,...] of a tensor with one entry per row of the batch."""
        if self.pairs is None:
            return x
        return x.index_select(0, self.row if x.is_cpu else self._here("row", self.row))

    def contents(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return keys, values [B,G,S,D], decoded, and positions [B,G,S]."""
        parts = [(*store.decoded(), store.position) for store in self.stores]
        keys, values, position = (torch.cat(tensors, dim=2) for tensors in zip(*parts))
        return keys, values, position

    def position(self) -> torch.Tensor:
        """Return true positions [B,G,S] of all stores, -1 for slots that hold nothing."""
        return torch.cat([store.position for store in self.stores], dim=2)

    def arrive(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        position: torch.Tensor,
        columns: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Append new tokens [B,G,T,D] at `position` [B,T] to the tail; columns [B,G,T]: what does not start at 0."""
        by_head = position[:, None].expand(*keys.shape[:3])
        own = {SCORE: by_head.float()} if self.plan.decides_once else {}
        self.tail.append(keys, values, by_head, {**own, **(columns or {})})
        if self.bounds is not None and self.body is None:
            self.bounds.append(keys, by_head >= 0 if self.has_empty else None)

    def attend(
        self,
        query: torch.Tensor,
        position: torch.Tensor,
        scale: float,
        softcap: float | None,
        sinks: torch.Tensor | None,
        watchers: Sequence[Observer],
        capacity: Callable[[], int],
        reach: Reach | None = None,
    ) -> torch.Tensor:
        """Attend query [B,H,T,D] at `position` [B,T] and show the watchers; return [B,H,T,D].

        sinks: logits [B|1,G,R]. capacity: tells the budget in tokens, which a selector reads under. reach: how far a
        prompt's queries see, None for all the way.
        """
        T = query.shape[2]
        num_shown = max((watcher.observes for watcher in watchers), default=0)
        if T == 1 and not self.plan.rerotate:
            shown = num_shown > 0
            newest = [self.read(store, query, position, scale, capacity, shown, reach) for store in self.stores]

            def show_newest(probs: list[torch.Tensor], num_visible: torch.Tensor) -> None:
                self._show(watchers, position, slice(0, 1), 1, probs, num_visible)

            return attend_newest(query, newest, scale, softcap, sinks, show_newest if shown else None)
        special = softcap is not None or sinks is not None
        is_prompt = T == self.num_slots and T > 1 and self.plan.window is None and not self.has_empty
        if is_prompt and not special and not (reach is not None and num_shown):
            keys, values = self.tail.decoded()
            if reach is not None:
                return reach.attend(query, keys, values, scale)
            if not num_shown:
                return causal_attention(query, keys, values, scale)
            return prefill_rows(
                query,
                keys,
                values,
                scale,
                num_shown,
                lambda new, probs: self._show(
                    watchers, position, new, T, [probs], (position[:, None, new] + 1).expand(*probs.shape[:2], -1)
                ),
            )
        if T == 1 and self.plan.run.reads is not None:
            for store in self.stores:
                self._count(self.plan.run.reads, store, None)
        if self.plan.rerotate:
            query, read = self._rerotated(query, position)
        else:
            read = [x.plain() for x in self.stores]
        only_new = self.in_order and T == self.num_slots

        def visible_until(store: Store, new: slice) -> torch.Tensor:
            seen = self._visible(store, position[:, new], reach)
            return seen[..., : new.stop] if only_new else seen

        def show(new: slice, probs: list[torch.Tensor], num_visible: torch.Tensor) -> None:
            self._show(watchers, position, new, T, probs, num_visible)

        return attend_in_chunks(query, read, visible_until, scale, softcap, sinks, num_shown, show)

    def replay(
        self,
        recorded: Recorded,
        query: torch.Tensor | None,
        position: torch.Tensor,
        watchers: Sequence[Observer],
        capacity: Callable[[], int],
    ) -> torch.Tensor:
        """Show the watchers recorded attention over what is stored; return the positions [B,G,S] that are read.

        query: [B,H,T,D], of which a single one lets a selector choose; position [B,T]. Nothing may be encoded.
        """
        assert self.body is None
        T, held = position.shape[1], self.tail.position
        first = max(0, T - max((watcher.observes for watcher in watchers), default=0))
        for start in range(first, T, CHUNK_QUERIES):
            new = slice(start, min(T, start + CHUNK_QUERIES))
            probs, sinks = (self.of_heads(x) for x in recorded(new))
            index = held.clamp(min=0, max=probs.shape[-1] - 1).long()
            by_head = probs.unflatten(1, (held.shape[1], -1))
            visible = self._visible(self.tail, position[:, new])
            mass = by_head.gather(-1, index[:, :, None, None].expand(*by_head.shape[:4], -1)) * visible[:, :, None]
            whole = mass.sum(-1) + sinks.unflatten(1, (held.shape[1], -1))
            shares = mass / whole.clamp(min=torch.finfo(mass.dtype).tiny)[..., None]
            self._show(watchers, position, new, T, [shares], visible.sum(-1).expand(*held.shape[:2], -1))
        pages = None if query is None or T > 1 else self._pages(self.tail, query, query.shape[-1] ** -0.5, capacity)
        read = self.tail if pages is None else self.tail.pages(pages, self.plan.page)
        return read.position.clone()  # evictions move slots in place

    def _show(
        self,
        watchers: Sequence[Observer],
        position: torch.Tensor,
        new: slice,
        num_new: int,
        probs: list[torch.Tensor],
        num_visible: torch.Tensor,
    ) -> None:
        """Show each watcher those queries of a chunk that are among the newest it observes."""
        for store, x in zip(self.stores, probs):
            S = x.shape[-1]
            held = {name: column[:, :, :S] for name, column in store.columns().items()}
            rows = Rows(
                x,
                position[:, new],
                store.position[:, :, :S],
                num_visible,
                is_first=new.start == 0,
                num_after=num_new - new.stop,
                layer=self.plan.run,
            )
            for watcher in watchers:
                seen = rows.newest(watcher.observes)
                if seen is not None and held.keys() >= {*watcher.columns}:
                    watcher.observe({name: held[name] for name in watcher.columns}, seen)

    def _visible(self, store: Store, position: torch.Tensor, reach: Reach | None = None) -> torch.Tensor:
        """Return bool [B,1|G,T,S]: which slots the queries at `position` [B,T] may see."""
        held = store.position
        if self.in_order:
            held = held[:, :1]  # the heads agree
        ahead = position[:, None, :, None] - held[:, :, None, :]
        visible = (held >= 0)[:, :, None] & (ahead >= 0)
        if reach is not None:
            visible = visible & reach.visible(position, held)
        return visible if self.plan.window is None else visible & (ahead < self.plan.window)

    def read(
        self,
        store: Store,
        query: torch.Tensor,
        position: torch.Tensor,
        scale: float,
        capacity: Callable[[], int],
        shown: bool,
        reach: Reach | None,
    ) -> Read:
        """Return what a single query reads of a store, and count it: the selector's pages of it, or all."""
        pages = self._pages(store, query, scale, capacity)
        if self.plan.run.reads is not None:
            self._count(self.plan.run.reads, store, pages)
        if pages is not None and shown:  # rows are of whole stores
            store, pages = store.pages(pages, self.plan.page), None
            return Read(store, (store.position >= 0)[:, :, None])
        if self.shards is not None and store is self.body:
            return Read(store, (store.position >= 0)[:, :, None], pages, self.plan.page)
        masked = self.has_empty or self.plan.window is not None or reach is not None
        return Read(store, self._visible(store, position, reach) if masked else None, pages, self.plan.page)

    def _count(self, reads: Reads, store: Store, pages: torch.Tensor | None) -> None:
        """Count what a single query reads of a store: all slots, or pages and what they were chosen by."""
        num_heads = self.head.numel()
        num_slots = store.num_slots * num_heads
        if pages is not None:
            is_last = pages == store.num_slots // self.plan.page  # a page that is not whole
            missing = self.plan.page - store.num_slots % self.plan.page
            num_slots = int((pages >= 0).sum()) * self.plan.page - int(is_last.sum()) * missing
            reads.num_bytes += self.bounds.read_bytes if self.bounds is not None else 0
        if self.shards is not None and store is self.body:
            reads.num_bytes += 0 if pages is None else self.shards.read_bytes
            reads.slow_bytes += self.shards.num_slow(pages) * self.plan.page * store.slot_bytes
        reads.num_bytes += num_slots * store.slot_bytes

    def _pages(
        self, store: Store, query: torch.Tensor, scale: float, capacity: Callable[[], int]
    ) -> torch.Tensor | None:
        """Return the pages [B,G,K] of a store that a single query reads (-1: none), None for all of it."""
        selector, bounds = self.plan.selector, self.bounds
        if selector is None or (self.body is not None and store is self.tail):
            return None
        others = self.num_slots - store.num_slots
        if self.shards is not None:
            rows = query.reshape(len(query), store.num_heads, -1, query.shape[-1])
            return self.shards.choose(rows, scale, capacity() - others)
        assert bounds is not None and isinstance(selector, PageSelector)
        page = bounds.page_tokens
        num_pages = max(1, selector.num_pages(capacity(), page) - -(-others // page))
        if num_pages >= bounds.num_pages:
            return None
        rows = query.reshape(len(query), store.position.shape[1], -1, query.shape[-1])
        score = selector.score(rows, bounds.lowest, bounds.highest)
        return score.topk(num_pages, dim=-1).indices

    def _rerotated(self, query: torch.Tensor, position: torch.Tensor) -> tuple[torch.Tensor, list[Store]]:
        """Return query and stores as if the stored tokens stood at the positions 0, 1, 2, ... of what is left."""
        held, run = self.position(), self.plan.run
        real = held >= 0
        before = (~real).sum(-1, keepdim=True)  # empty slots sort first
        rank = held.argsort(dim=-1, stable=True).argsort(dim=-1) - before
        offset = torch.where(real, rank - held, 0).split([store.num_slots for store in self.stores], dim=2)
        read = [store.shifted(run.rotary, part, run.index) for store, part in zip(self.stores, offset)]
        own = (real[:, :, None] & (held[:, :, None] <= position[:, None, :, None])).sum(-1) - 1 - position[:, None]
        own = own.masked_fill(position[:, None] < 0, 0).repeat_interleave(query.shape[1] // held.shape[1], dim=1)
        return run.rotary.shift(query, own, run.index), read

    def room(self, capacity: torch.Tensor) -> Room:
        """Return what a layer's `capacity` [rows,heads], on the CPU, leaves this lane; the last one is remembered."""
        if self._room is None or self._room[0] is not capacity:
            own = self.of_heads(capacity)
            counts = own.flatten().tolist()
            room = Room(own.to(self.tail.position.device), min(counts), max(counts))
            self._room = (capacity, room)
        return self._room[1]

    def _here(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the CPU's beside the tokens, copied there once."""
        known = self._beside.get(name)
        if known is None or known[0] is not x:
            known = self._beside[name] = (x, x.to(self.tail.position.device))
        return known[1]

    def tokens(self, evictor: Evictor, num_seen: torch.Tensor, room: Room) -> Tokens:
        """Return what an evictor sees of what is stored; num_seen: [B], beside the tokens."""
        return Tokens(
            _joined([store.position for store in self.stores]),
            {name: _joined([x.columns()[name] for x in self.stores]) for name in evictor.columns},
            num_seen,
            room.capacity,
            self._here("head", self.head),
            self._here("row", self.row),
            lambda: _joined([store.decoded()[0] for store in self.stores]),
            lambda: _joined([store.decoded()[1] for store in self.stores]),
            self.plan.run,
        )

    def score(self, num_seen: torch.Tensor, room: Room, decide: bool) -> torch.Tensor:
        """Return the evictor's scores [B,G,S], -inf for empty slots and what has left the window.

        num_seen: [B], beside the tokens. decide: take anew the score that is taken once.
        """
        position, evictor = _joined([store.position for store in self.stores]), self.plan.evictor
        if evictor is None:
            score = position.float()
        elif self.plan.decides_once and not decide:
            score = _joined([store.columns()[SCORE] for store in self.stores])
        else:
            score = evictor.score(self.tokens(evictor, num_seen, room))
        gone = position < 0
        if self.plan.window is not None:
            gone = gone | (position < (num_seen - self.plan.window + 1)[:, None, None])
        return score.masked_fill(gone, -torch.inf)

    def settle(self, score: torch.Tensor) -> None:
        """Keep a score [B,G,S] that is taken once as its rank, and free the statistics it came from."""
        position = self.position()
        order = position.argsort(dim=-1, stable=True)
        rank = order.gather(-1, score.gather(-1, order).argsort(dim=-1, stable=True)).argsort(dim=-1).float()
        rank -= (position < 0).sum(dim=-1, keepdim=True)  # of tokens alone, so that no rank reaches a later position
        for store, part in zip(self.stores, rank.split([store.num_slots for store in self.stores], dim=2)):
            store.columns()[SCORE].copy_(part)
        self.set_columns(scoring=False)

    def set_columns(self, scoring: bool) -> None:
        """Carry what `LayerPlan.columns` names, and nothing else of the evictor's."""
        columns = self.plan.columns(scoring)
        self.tail.set_columns((*columns, *self._tail_columns()))
        if self.body is not None:
            self.body.set_columns(columns)

    def needs_eviction(self, room: Room, by_unit: bool = False) -> bool:
        """Tell whether any head holds more than it has room for; `by_unit`: so many that a whole unit can go."""
        body = self.body if by_unit and not self.has_empty else None
        unit = body.unit if body is not None and body.num_slots else 1
        return self.num_slots - room.least >= unit

    def is_static(self, capacity: torch.Tensor) -> bool:
        """Tell whether the next token takes the place of another, in storage that is there, of plain tokens alone."""
        return self.body is None and self.room(capacity).most == self.num_slots and self.tail.has_room

    def evict(self, score: torch.Tensor, room: Room) -> None:
        """Drop what there is no room for."""
        dropped = evict(self.stores, score, room)
        self.in_order = self.in_order and not dropped.moved
        self.has_empty = self.has_empty or dropped.emptied

    def encode(self, num_waiting: int | None = None) -> None:
        """Move the oldest whole units of the tail, full precision until now, into the body.

        num_waiting: tokens that stay, None for what the codec says.
        """
        tail, body = self.tail, self.body
        if body is None:
            return
        if self.shards is not None:
            self.in_order = not self.shards.take_from(tail, body) and self.in_order
            return
        stay = body.codec.residual if num_waiting is None else num_waiting
        num_tokens = (tail.num_slots - stay) // body.unit * body.unit
        if num_tokens <= 0:
            return
        order = tail.position.argsort(dim=-1, stable=True)
        oldest, rest = order[:, :, :num_tokens], order[:, :, num_tokens:]
        if body.codec.sorted_by is not None:
            oldest = _deal(oldest, tail.columns()[body.codec.sorted_by], body.unit, body.codec.num_levels)
        keys, values = tail.decoded()
        take = oldest[..., None].expand(*oldest.shape, keys.shape[-1])
        keys, values = keys.gather(2, take), values.gather(2, take)
        position = tail.position.gather(2, oldest)
        columns = {name: column.gather(2, oldest) for name, column in tail.columns().items()}
        body.append(keys, values, position, columns)
        if body.codec.sorted_by is not None:
            self.in_order = False
        if self.bounds is not None:
            self.bounds.append(keys, position >= 0 if self.has_empty else None)
        tail.keep(rest)

    def rewind(self, num_tokens: int) -> None:
        """Forget the newest tokens of the tail."""
        self.tail.drop_newest_slots(num_tokens)
        if self.bounds is not None and self.body is None:
            whole = self.tail.num_slots // self.bounds.page_tokens * self.bounds.page_tokens
            keys = self.tail.decoded()[0][:, :, whole:]
            self.bounds.rewind(keys, self.tail.position[:, :, whole:] >= 0, self.tail.num_slots)

    def split(self, capacity: torch.Tensor) -> list[Lane]:
        """Return lanes of pairs whose `capacity` [B,G], of this lane's, is nearly equal (within 3 %, or one token)."""
        flat = capacity.flatten()
        order = flat.argsort(descending=True, stable=True)
        groups: list[list[int]] = []
        for pair in order.tolist():
            most = int(flat[groups[-1][0]]) if groups else 0
            if groups and most - int(flat[pair]) <= _slack(most):
                groups[-1].append(pair)
            else:
                groups.append([pair])
        return [self._part(torch.tensor(sorted(group))) for group in groups]

    def parted(self, capacity: torch.Tensor) -> list[Lane]:
        """Return this lane, or its parts where what a layer's `capacity` [rows,heads] leaves it is not nearly equal."""
        room = self.room(capacity)
        if room.most - room.least <= _slack(room.most) or not self.needs_eviction(room):
            return [self]
        return self.split(self.of_heads(capacity))

    def _part(self, pairs: torch.Tensor) -> Lane:
        """Return a lane of some of this lane's pairs, row·heads + head of its own rows and heads."""
        of_layer = pairs if self.pairs is None else self.pairs[pairs]
        lane = Lane(self.plan, of_layer, self.head.flatten()[pairs][:, None])
        on_device = pairs.to(self.tail.position.device)
        lane.tail = self.tail.part(on_device, self.tail.codec)
        if self.body is not None and lane.body is not None:
            lane.body = self.body.part(on_device, lane.body.codec)
        lane.has_empty, lane.in_order = self.has_empty, self.in_order
        assert self.bounds is None
        return lane

    def select_rows(self, rows: torch.Tensor) -> None:
        """Reorder, repeat or drop rows of the batch: `rows` on the CPU are the old ones, in their new order."""
        if self.pairs is None:
            picked = rows
            self.head = self.head[:1].expand(len(rows), -1)
        else:
            num_heads = self.plan.run.num_kv_heads
            old_row = self.pairs // num_heads
            found = [(new, entry) for new, old in enumerate(rows.tolist()) for entry in _where(old_row == old)]
            picked = torch.tensor([entry for _, entry in found], dtype=torch.long)
            self.head = self.head[picked]
            self.pairs = torch.tensor([new for new, _ in found], dtype=torch.long) * num_heads + self.head[:, 0]
        self.row, self._room = self._rows_of_pairs(), None
        on_device = picked.to(self.tail.position.device)
        self.tail.select_rows(on_device)
        if self.body is not None:
            self.body.select_rows(on_device)
            if self.pairs is not None:
                self.body.codec = self.plan.codec.for_heads(self.head)
        if self.bounds is not None:
            self.bounds.select_rows(on_device)


def _slack(most: int) -> int:
    """Return by how many tokens heads of one lane may differ, of which the largest has `most`."""
    return max(1, most // 32)


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """Put the stores' parts [B,G,S,...] behind each other; one alone stays the view that it is."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _where(mask: torch.Tensor) -> list[int]:
    return mask.nonzero()[:, 0].tolist()


def _deal(oldest: torch.Tensor, importance: torch.Tensor, unit: int, num_levels: int) -> torch.Tensor:
    """Rank slots `oldest` [B,G,N] by importance [B,G,S], and deal them so that each unit has some of every level."""
    ranked = oldest.gather(2, importance.gather(2, oldest).argsort(dim=-1, descending=True, stable=True))
    by_level = ranked.unflatten(2, (num_levels, ranked.shape[2] // unit, unit // num_levels))
    return by_level.transpose(2, 3).flatten(2)
