"""One layer's cache: what arrives, who observes, how much may stay, and the lanes that hold it.

Shapes: B batch, H query heads, G key/value heads, R = H/G, T new tokens, S stored slots, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import CacheLayerMixin

from pikv_core.cache.budget import Budget, Shape
from pikv_core.cache.head_budgets import HeadBudgets
from pikv_core.cache.lane import Lane, LayerPlan
from pikv_core.cache.reach import Reach
from pikv_core.cache.recording import Recorded, Recorder
from pikv_core.cache.seen import Seen
from pikv_core.cache.shards.shards import EXPERT
from pikv_core.cache.store import EMPTY
from pikv_core.cache.support import check_selector
from pikv_core.cache.tiers.placing import place
from pikv_core.cache.tiers.tiers import Tiers
from pikv_core.compression.base import Codec
from pikv_core.errors import PiKVError, UsageError
from pikv_core.observation import ALL, LayerRun, Observer
from pikv_core.scheduling.allocation.asked import ASKED
from pikv_core.scheduling.allocation.base import Allocation
from pikv_core.scheduling.base import Evictor, Policy, Selector, ShardSelector

if TYPE_CHECKING:
    from pikv_core.cache.ranks.split import Split

# What attention code asks of keys and values, if it takes them for tensors.
TENSOR_ATTRIBUTES = {"shape", "size", "dim", "ndim", "to", "view", "reshape", "transpose", "permute", "contiguous"}
TENSOR_ATTRIBUTES |= {"chunk", "split", "unsqueeze", "repeat", "mT", "T"}
NOT_HELD = "only tokens that were fed while the cache was held can be forgotten"
KINDS: dict[type, str] = {Evictor: "policy", Allocation: "allocation", Codec: "codec"}


class NotThroughTheEntry(PiKVError, AttributeError):
    """Tell a model that bypasses our attention entry; an AttributeError, so that hasattr says no."""


class CacheLayer(CacheLayerMixin):
    """Hold a layer's tokens as policy, allocation and codec say.

    bind: returns the layer's codec and the budget in tokens, called when the shape of keys is first known. after_step:
    called with the index and whether the step was a prompt, when tokens may be dropped. on_change: called with the
    index whenever the stored bytes may have changed.
    """

    is_sliding = False
    is_compileable = False
    recorder: Recorder | None = None  # is told of every step
    tiers: Tiers | None = None  # where pages go that the device has no room for
    is_recorded = False  # to be replayed: nothing may be asked of the device
    split: Split | None = None  # over ranks, of which this one holds a part

    def __init__(
        self,
        run: LayerRun,
        policy: Policy,
        allocation: Allocation,
        budget: Budget,
        window: int | None,
        rerotate: bool,
        bind: Callable[[int, Shape], tuple[Codec, Budget]],
        after_step: Callable[[int, bool], None],
        on_change: Callable[[int], None],
    ):
        super().__init__()
        self.run, self.index = run, run.index
        self.policy = policy
        self.allocation = allocation
        self.window = window
        self._asked_budget, self._rerotate = budget, rerotate
        self._bind, self._after_step, self._on_change = bind, after_step, on_change
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        limits = self._asked_budget.limits
        self.evictor = self.policy if isinstance(self.policy, Evictor) and limits else None
        # A sliding window is short and drops tokens by itself: pages would neither save reads nor stay in place.
        selector = self.policy if isinstance(self.policy, Selector) and self.window is None else None
        selects = selector is not None and (limits or selector.limits_itself) and self.index >= selector.dense_layers
        self._selector = selector if selects else None
        for memory in (self.run.own, self.run.shared, self.run.events):
            memory.clear()
        self.lanes: list[Lane] = []
        self.seen_length = 0
        self.held = self.looking = False
        self._held_length = 0  # tokens seen when `hold` was called
        self._seen_since_hold: dict[int, torch.Tensor] = {}  # tokens of each row's sequence, by length seen
        self.scoring = True  # a score that is taken once is still to come
        self.seen = Seen(0, torch.device("cpu"))
        self.is_initialized = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        B, G, _, D = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        num_heads = G if self.split is None else G * self.split.parts_of_heads
        self._shape = Shape(self.run.num_layers, B, num_heads, D, key_states.dtype)  # of all ranks together
        self.run.num_kv_heads = G
        codec, budget = self._bind(self.index, self._shape)
        if self.split is not None:
            codec, self.run.first_head = self.split.codec(codec, num_heads), self.split.first_head(num_heads)
            self.run.gather_heads = self.split.gather_heads
        self.budgets = HeadBudgets(budget, self.allocation, self.evictor, self.window, self.run)
        if self._selector is not None:
            check_selector(self._selector, codec, self.run)
        if self.tiers is not None:
            self.tiers.start(key_states)
        shards = None if self.split is None else self.split.own_shards
        members = (codec, self.evictor, self._selector)
        self.plan = LayerPlan(*members, self.window, self._rerotate, self.run, self.tiers, shards)
        self.lanes = [Lane(self.plan, None, torch.arange(G).expand(B, G))]
        self.seen = Seen(B, key_states.device)
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Take new keys and values [B,G,T,D]; the attention entry gets this layer in place of tensors."""
        if self.split is not None:
            key_states, value_states = self.split.own_heads(key_states), self.split.own_heads(value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.arrived = (key_states, value_states)
        return self, self

    def get_seq_length(self, *args: Any) -> int:
        """Tokens seen, padding included: what positions and masks are built from."""
        return self.seen_length

    def get_mask_sizes(self, query_length: Any, *args: Any) -> tuple[int, int]:
        new = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.seen_length + new, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def crop(self, *args: Any) -> None:
        """Refuse: what was evicted or encoded for the tokens to be forgotten cannot be undone."""
        raise PiKVError(
            "a PiKV cache cannot take tokens back, which assisted generation and prompt lookup need",
            hint="generate without an assistant, or use transformers' own cache",
        )

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(len(self.num_seen)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Reorder, repeat or drop rows of the batch."""
        if not self.is_initialized:
            return
        rows = torch.arange(len(self.num_seen))[indices.cpu()]
        self.run.select_rows(rows)
        self.seen.set(self.num_seen[rows])
        self._seen_since_hold = {length: x[rows] for length, x in self._seen_since_hold.items() if length}
        self.budgets.select_rows(rows)
        for lane in self.lanes:
            lane.select_rows(rows)
        self.lanes = [lane for lane in self.lanes if lane.head.numel()]
        self._on_change(self.index)

    arrived: tuple[torch.Tensor, torch.Tensor]  # keys and values between `update` and `attend`

    @property
    def num_seen(self) -> torch.Tensor:
        """Tokens [B] that each row's sequence has had, padding apart; on the CPU."""
        return self.seen.host

    @property
    def dimensions(self) -> tuple[int, int, int]:
        """Rows of the batch, key/value heads held here, channels of a head, once there are tokens."""
        return len(self.num_seen), self.run.num_kv_heads, self._shape.head_dim

    @property
    def num_stored(self) -> int:
        """Slots per head, empty ones included; the mean where heads are unequal, rounded up."""
        pairs = sum(lane.head.numel() for lane in self.lanes)
        return -(-sum(lane.num_slots * lane.head.numel() for lane in self.lanes) // max(1, pairs))

    @property
    def resident_bytes(self) -> int:
        """Bytes of live storage, and of what policies remember of this layer."""
        return sum(lane.nbytes for lane in self.lanes) + self.run.nbytes

    def note_bytes(self) -> None:
        """Tell that the stored bytes may have changed."""
        self._on_change(self.index)

    @property
    def full_bytes(self) -> int:
        """Bytes that transformers' own cache would hold for the same tokens and dtype."""
        if not self.is_initialized:
            return 0
        length = self.seen_length if self.window is None else min(self.seen_length, self.window - 1)
        s = self._shape
        return 2 * len(self.num_seen) * s.num_kv_heads * length * s.head_dim * s.dtype.itemsize

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in TENSOR_ATTRIBUTES:
            raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")
        raise NotThroughTheEntry(
            "the model took the cache's layer for a tensor: it does not attend through the attention entry 'pikv'",
            hint="call cache.attach(model); if it is attached, the architecture has an attention of its own",
        )

    def positions(self) -> torch.Tensor:
        """Return the true positions [B,G,S] of what is stored, -1 for empty slots and where heads hold fewer."""
        return self._gathered([lane.position() for lane in self._filled()], EMPTY)

    def retrieve(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return keys, values [B,G,S,D] as the next query will see them, and positions [B,G,S] (-1: empty slot)."""
        keys, values, _ = zip(*(lane.contents() for lane in self._filled()))
        return self._gathered(list(keys), 0), self._gathered(list(values), 0), self.positions()

    def _filled(self) -> list[Lane]:
        lanes = [lane for lane in self.lanes if lane.stores]
        if not lanes:
            raise PiKVError(f"layer {self.index} holds no tokens yet", hint="feed the model through the cache first")
        return lanes

    def _gathered(self, parts: list[torch.Tensor], fill: int) -> torch.Tensor:
        """Put the lanes' tensors [N,1,S,...] together as [B,G,S,...], filled up to the longest."""
        if self.lanes[0].pairs is None:
            return parts[0]
        B, G = len(self.num_seen), self.run.num_kv_heads
        longest = max(part.shape[2] for part in parts)
        whole = parts[0].new_full((B * G, longest, *parts[0].shape[3:]), fill)
        for lane, part in zip(self._filled(), parts):
            assert lane.pairs is not None
            whole[lane.pairs.to(whole.device), : part.shape[2]] = part[:, 0]
        return whole.unflatten(0, (B, G))

    def attend(
        self,
        query: torch.Tensor,
        scale: float,
        is_token: torch.Tensor | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Append the tokens given to `update`, attend, then drop and encode; return [B,H,T,D].

        query: [B,H,T,D]. is_token: bool [B,T], False for padding among the new tokens; None where there is none.
        sinks: logits [H] that take attention and give nothing.
        """
        if self.split is not None:
            return self.split.attend(self, query, scale, is_token, softcap, sinks)
        return self.attend_here(query, scale, is_token, softcap, sinks)

    def attend_here(
        self,
        query: torch.Tensor,
        scale: float,
        is_token: torch.Tensor | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Do as `attend` does with the heads that are held here."""
        keys, values, position, is_prompt = self.take(is_token)
        if self.evictor is not None and self.evictor.sees_queries and is_prompt:
            self.evictor.observe_queries(query, position, self.run)
        watchers, reach = self._watchers(is_prompt), self._reach(is_prompt)
        by_group = None if sinks is None else sinks.view(1, self.run.num_kv_heads, -1)
        output = (
            query if self.lanes[0].pairs is None else torch.empty_like(query, memory_format=torch.contiguous_format)
        )
        for lane in self.lanes:
            lane.has_empty = lane.has_empty or is_token is not None
            rows = lane.of_rows(position)
            lane.arrive(lane.of_heads(keys), lane.of_heads(values), rows)
            own = by_group
            if by_group is not None and lane.pairs is not None:
                own = by_group[0, lane.head[:, 0].to(by_group.device)][:, None]
            far = None if reach is None else reach.of(lane.of_heads)
            attended = lane.attend(lane.of_heads(query), rows, scale, softcap, own, watchers, self.read_tokens, far)
            if self.recorder is not None:  # apart from the output, which stays the same to the bit
                self.recorder.take(self.index, keys, query)
                lane.attend(query, rows, scale, softcap, own, [self.recorder], self.read_tokens, far)
            if lane.pairs is None:
                output = attended
            else:
                by_pair = output.view(len(query) * self.run.num_kv_heads, -1, *query.shape[2:])
                by_pair[lane.pairs_here()] = attended
        self.end_step(query.shape[2], is_prompt)
        self.expect_experts()
        return output

    def expect_experts(self) -> None:
        """Ask to be told the experts of the newest tokens, where shards go by them."""
        if isinstance(self._selector, ShardSelector) and self._selector.by == "router":
            self.run.routing.expect(self)

    def take_experts(self, expert: torch.Tensor) -> None:
        """Note the experts [B·T] of the newest tokens, for shards; those that are known may move there."""
        (lane,) = self.lanes
        by_row = expert.view(len(self.num_seen), 1, -1)
        lane.tail.columns()[EXPERT][:, :, -by_row.shape[2] :] = by_row + 1
        if not self.held:
            self.compress()

    def append(
        self, keys: torch.Tensor, values: torch.Tensor, columns: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        """Take new tokens [B,G,T,D] that nothing attends from, then drop and encode.

        columns: statistics [B,T] of these tokens, by name, in place of what attention would have told. Raises
        UsageError where policy, allocation or codec goes by attention and is not told so.
        """
        given = columns or {}
        if self.split is not None:
            raise UsageError(
                "a cache that is split over ranks takes tokens with their queries", hint="give the queries too"
            )
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        self._refuse_without_queries(keys.shape[2] > 1 or self.held or self.scoring, given)
        self.update(keys, values)
        keys, values, position, is_prompt = self.take(None)
        for lane in self.lanes:
            own = {name: lane.of_rows(x)[:, None].expand(lane.of_heads(keys).shape[:3]) for name, x in given.items()}
            lane.arrive(lane.of_heads(keys), lane.of_heads(values), lane.of_rows(position), own)
        self.end_step(keys.shape[2], is_prompt)

    def replay(self, recorded: Recorded, query: torch.Tensor | None = None) -> torch.Tensor:
        """Take the tokens given to `update` with recorded attention in place of the model's, then drop.

        What is shown of it is its rows over what is stored, each brought back to a sum of 1. query: [B,H,T,D], for
        policies that go by queries. Returns the true positions [B,G,S] of what the newest query reads, -1 for none.
        """
        keys, values, position, is_prompt = self.take(None)
        if query is not None and self.evictor is not None and self.evictor.sees_queries and is_prompt:
            self.evictor.observe_queries(query, position, self.run)
        watchers = self._watchers(is_prompt)
        read = []
        for lane in self.lanes:
            rows = lane.of_rows(position)
            lane.arrive(lane.of_heads(keys), lane.of_heads(values), rows)
            own = None if query is None else lane.of_heads(query)
            read.append(lane.replay(recorded, own, rows, watchers, self.read_tokens))
        read_position = self._gathered(read, EMPTY)
        self.end_step(keys.shape[2], is_prompt)
        return read_position

    def _refuse_without_queries(self, is_prompt: bool, given: Mapping[str, torch.Tensor]) -> None:
        """Raise UsageError where somebody waits for attention, and is not given all of his columns."""
        waiting = [x for x in self._watchers(is_prompt) if not x.columns or not given.keys() >= {*x.columns}]
        if self.evictor is not None and self.evictor.sees_queries and is_prompt:
            waiting.append(self.evictor)
        for watcher in waiting:
            if not watcher.without_queries:
                kind = next(kind for base, kind in KINDS.items() if isinstance(watcher, base))
                raise UsageError(
                    f"{kind} '{watcher.name}' goes by attention, and the tokens came without queries",
                    hint="give the queries too, or choose what needs none, such as the policies lru and streaming-llm",
                )

    def take(self, is_token: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool]:
        """Return the new keys and values, their positions [B,T], and whether they are of a prompt."""
        keys, values = self.arrived
        del self.arrived
        is_prompt = keys.shape[2] > 1 or self.held
        self._check_finite(keys, values)
        if is_prompt and not self.scoring and self.evictor is not None and self.evictor.looks is None:
            self.set_scoring(True)
        return keys, values, self.seen.advance(keys.shape[2], is_token), is_prompt

    def end_step(self, num_new: int, is_prompt: bool) -> None:
        """Count new tokens that have been attended from, and drop and encode unless that is held."""
        self.seen_length += num_new
        if self.tiers is not None:
            self.tiers.is_decoding = num_new == 1
        self._on_change(self.index)
        if self.split is not None:
            self.split.end_step(self, self.seen_length == num_new)
        if self.held:
            self._seen_since_hold[self.seen_length] = self.num_seen
        else:
            self._after_step(self.index, is_prompt)

    def _check_finite(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Refuse NaN and infinity; of single tokens on the CPU alone, where asking costs little, and unrecorded."""
        if keys.shape[2] == 1 and (keys.is_cuda or self.is_recorded):
            return
        # A sum takes on what any of them is not, and a number of Python's is looked at for a third of what a tensor is.
        total = keys.sum(dtype=torch.float32).item() + values.sum(dtype=torch.float32).item()
        if not math.isfinite(total):
            raise PiKVError(
                f"layer {self.index}: the model's keys or values are not finite after {self.seen_length} tokens",
                hint="run in --dtype float32 or bfloat16, and check the model's weights",
            )

    def _watchers(self, is_prompt: bool) -> list[Observer]:
        """Return who observes the attention of this step."""
        watchers: list[Observer] = []
        evictor = self.evictor
        if evictor is not None:
            waits = self.looking if evictor.looks else is_prompt or not evictor.decides_once
            watchers += [evictor] if waits else []
            watchers += [self.allocation] if is_prompt and not self.looking else []
        watchers += [] if self.looking else [self.plan.codec]
        return [watcher for watcher in watchers if watcher.observes]

    def _reach(self, is_prompt: bool) -> Reach | None:
        """Return how far this step's queries see, None for as far as there are tokens."""
        if self.evictor is None or not is_prompt:
            return None
        limits = self.evictor.prompt_reach(self.budgets.tokens(self.num_seen), self.run)
        return None if limits is None else Reach(*limits)

    def compress(self) -> None:
        """Drop what is over budget and encode what has left the newest tokens; ends a `hold`."""
        self.held = False
        if not self.lanes or not self.lanes[0].stores:
            return
        if self.evictor is None and self.window is None and self.lanes[0].body is None:
            self.looking = False
            self.place_pages()
            return
        waiting = None if self.split is None else self.split.num_waiting(self)
        for lane in self.lanes:
            if lane.body is not None and lane.body.num_slots:
                lane.encode(waiting)  # new units compete with old ones; a first prompt is evicted token by token
        if self.evictor is not None or self.window is not None:
            self._evict()
        for lane in self.lanes:
            lane.encode(waiting)
        self.looking = False
        self._on_change(self.index)
        self.place_pages()

    def ask(self) -> None:
        """Let the policy ask for this layer's part of the budget, as long as the layer has dropped nothing."""
        if self.evictor is None or not self.lanes or not self.lanes[0].stores:
            return
        lane = self.lanes[0]
        if not self.scoring or lane.pairs is not None or lane.num_slots < self.seen_length:
            return
        room = lane.room(self.budgets.mean(self.num_seen))
        asked = self.evictor.ask(lane.tokens(self.evictor, self.seen.here, room))
        self.run.shared.setdefault(ASKED, {})[self.index] = asked.cpu()

    def place_pages(self) -> None:
        """Move to tiers what the device has no room for."""
        if self.tiers is not None:
            place(self.lanes[0], self.read_tokens)
            self._on_change(self.index)

    def _evict(self) -> None:
        drops = self.evictor is not None
        capacity = self._allowed() if drops else self.budgets.most(self.num_seen)
        decide = self.scoring and self.plan.decides_once
        if decide and self.plan.evictor is not None and self.plan.evictor.looks is not None and not self.looking:
            raise PiKVError(
                f"policy '{self.policy.name}' has not been shown what it scores by",
                hint="feed the prompt by pikv_core.model.steps.prefill(model, cache, ids)",
            )
        by_unit = not self.budgets.may_part
        whole, capacity = capacity, capacity if self.split is None else self.split.capacity(self, capacity)
        rooms = [lane.room(capacity) for lane in self.lanes]
        if not decide and not any(lane.needs_eviction(room, by_unit) for lane, room in zip(self.lanes, rooms)):
            return
        scores = [lane.score(lane.of_rows(self.seen.here), lane.room(whole), decide) for lane in self.lanes]
        if decide:
            for lane, score in zip(self.lanes, scores):
                lane.settle(score)
            self.scoring = False
        if drops and self.lanes[0].pairs is None and self.lanes[0].needs_eviction(rooms[0]):
            capacity = self.budgets.part(scores[0], capacity)
            rooms = [self.lanes[0].room(capacity)]
            if rooms[0].is_uneven and bool((capacity != capacity[:, :1]).any()):
                self.lanes = self.lanes[0].split(capacity)
                scores = [lane.of_heads(scores[0]) for lane in self.lanes]
                rooms = [lane.room(capacity) for lane in self.lanes]
        if self.evictor is not None and self.evictor.asks:
            capacity = capacity.clamp(min=1)  # of a row without tokens too, so that no lane is left without a slot
            lanes = [part for lane in self.lanes for part in lane.parted(capacity)]
            if len(lanes) > len(self.lanes):  # rows for which unlike layers asked for more
                self.lanes = lanes
                rooms = [lane.room(capacity) for lane in lanes]
                scores = [lane.score(lane.of_rows(self.seen.here), room, False) for lane, room in zip(lanes, rooms)]
        for lane, score, room in zip(self.lanes, scores, rooms):
            if lane.needs_eviction(room):
                lane.evict(score, room)

    @property
    def is_static(self) -> bool:
        """Whether the next token does what the one before it did, in the same places (see `pikv_core.cache.static`)."""
        capacity = self.budgets.settled if self.is_initialized and self.evictor is not None else None
        if capacity is None or self.held or self.recorder is not None or (self.scoring and self.plan.decides_once):
            return False
        return all(lane.is_static(capacity) for lane in self.lanes)

    def count_replayed(self) -> None:
        """Count a token that a replayed step has taken in, behind the back of this object."""
        self.seen.skip(1)
        self.seen_length += 1

    def read_tokens(self) -> int:
        """Return the tokens per head that a selector may read, in the row that has the most."""
        return int(self._allowed().max()) if self._asked_budget.limits else ALL

    def _allowed(self) -> torch.Tensor:
        """Return how many tokens [B,G] may stay of those seen; the very same tensor once that does not change."""
        settled = self.budgets.settled
        return self.budgets.tokens(self.num_seen) if settled is None else settled

    def hold(self) -> None:
        """Drop and encode nothing until `compress`."""
        self.held, self._held_length = True, self.seen_length
        self._seen_since_hold = {self.seen_length: self.num_seen}

    def look(self) -> None:
        """Let the attention of what is fed until `compress` be what a policy that looks observes; it has to be held."""
        if not self.held:
            raise UsageError(NOT_HELD, hint="call cache.hold() before what is to be forgotten is fed")
        self.looking = True
        if not self.scoring:
            self.set_scoring(True)

    def set_scoring(self, scoring: bool) -> None:
        """Let tokens carry the statistics of a score that is taken once while it is still to come."""
        self.scoring = scoring
        for lane in self.lanes:
            lane.set_columns(scoring)

    def rewind(self, num_tokens: int) -> None:
        """Forget the newest tokens since `hold`; what evictors learnt from them stays.

        What is left of a step that is forgotten in part must be without padding. Raises UsageError where they are not
        held.
        """
        left = self.seen_length - num_tokens
        if not self.held or left < self._held_length:
            raise UsageError(NOT_HELD, hint="call cache.hold() before what is to be forgotten is fed")
        self._seen_since_hold = {length: x for length, x in self._seen_since_hold.items() if length <= left}
        known = max(self._seen_since_hold, default=0)
        before = self._seen_since_hold[known] if known else torch.zeros_like(self.num_seen)
        self.seen_length = left
        self.seen.set(before + left - known)
        self.budgets.forget()
        for lane in self.lanes:
            lane.rewind(num_tokens)
