"""One layer's cache: its stores, attended one by one and merged; what arrives, what is dropped, what is encoded.

Shapes: B batch, H query heads, G key/value heads, R = H/G, T new tokens, S stored slots, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from pikv_core.cache.budget import Budget, Shape
from pikv_core.cache.chunks import attend_in_chunks
from pikv_core.cache.eviction import evict
from pikv_core.cache.page_bounds import PageBounds
from pikv_core.cache.store import EMPTY, Store
from pikv_core.compression.base import Codec
from pikv_core.compression.none import Plain
from pikv_core.errors import PiKVError
from pikv_core.scheduling.allocation.base import Allocation
from pikv_core.scheduling.base import Evictor, Policy, Selector
from pikv_kernels.partial_attention import causal_attention
from pikv_kernels.prefill_mass import prefill_mass

# What attention code asks of keys and values, if it takes them for tensors.
TENSOR_ATTRIBUTES = {"shape", "size", "dim", "ndim", "to", "view", "reshape", "transpose", "permute", "contiguous"}
TENSOR_ATTRIBUTES |= {"chunk", "split", "unsqueeze", "repeat", "mT", "T"}


class NotThroughTheEntry(PiKVError, AttributeError):
    """Tell a model that bypasses our attention entry; an AttributeError, so that hasattr says no."""


class CacheLayer(CacheLayerMixin):
    """Hold a layer's tokens: the newest in full precision (`tail`), older ones under the codec (`body`).

    window: tokens a query may look back, itself included (sliding-window layers), None for all.
    on_change: called with the index whenever the stored bytes may have changed.
    """

    is_sliding = False
    is_compileable = False

    def __init__(
        self,
        index: int,
        num_layers: int,
        policy: Policy,
        codec: Codec,
        allocation: Allocation,
        budget: Budget,
        window: int | None,
        on_change: Callable[[int], None],
    ):
        super().__init__()
        self.index = index
        self.num_layers = num_layers
        self.policy = policy
        self.codec = codec
        self.allocation = allocation
        self.window = window
        self._asked_budget = budget
        self._on_change = on_change
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        evictor = self.policy if isinstance(self.policy, Evictor) and self._asked_budget.limits else None
        self._evictor = evictor
        self._weigher = evictor if evictor is not None and evictor.needs_mass else None
        # A sliding window is short and drops tokens by itself: pages would neither save reads nor stay in place.
        reads_all = not self._asked_budget.limits or self.window is not None
        selector = self.policy if isinstance(self.policy, Selector) and not reads_all else None
        self._selector = selector if selector is not None and self.index >= selector.dense_layers else None
        self._page = 8
        self._bounds: PageBounds | None = None
        if self._selector is not None:
            self._page = math.lcm(self._selector.page_tokens, self.codec.unit_tokens)
            self._bounds = PageBounds(self._page)
        columns = evictor.columns if evictor else ()
        self.tail = Store(Plain(), columns, self._page if isinstance(self.codec, Plain) else 8)
        self.body = None if isinstance(self.codec, Plain) else Store(self.codec, columns, self._page)
        self.budget = self._asked_budget
        self.seen_length = 0
        self.held = False
        self._num_slots_at_hold = 0
        self.num_seen = torch.zeros(0, dtype=torch.int64)
        self._has_empty = False
        self._in_order = True
        self.is_initialized = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        B, G, _, D = key_states.shape
        shape = Shape(self.num_layers, B, G, D, key_states.dtype)
        self.budget = self._asked_budget.resolve(shape, self.codec, len(self._evictor.columns if self._evictor else ()))
        self.num_seen = torch.zeros(B, dtype=torch.int64)
        self.dtype, self.device, self._shape = key_states.dtype, key_states.device, shape
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Take new keys and values [B,G,T,D]; the attention entry gets this layer in place of tensors."""
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
        self.num_seen = self.num_seen[rows]
        rows = rows.to(self.device)
        for store in self.stores:
            store.select_rows(rows)
        if self._bounds is not None:
            self._bounds.select_rows(rows)
        self._on_change(self.index)

    arrived: tuple[torch.Tensor, torch.Tensor]  # keys and values between `update` and `attend`

    @property
    def stores(self) -> list[Store]:
        """The stores that hold tokens, older ones first."""
        return [store for store in (self.body, self.tail) if store is not None and store.num_slots]

    @property
    def num_stored(self) -> int:
        """Slots per head, empty ones included."""
        return sum(store.num_slots for store in self.stores)

    @property
    def resident_bytes(self) -> int:
        """Bytes of live storage: codes, scales, positions, statistics, page bounds, spare room."""
        held = self.tail.nbytes + (self.body.nbytes if self.body is not None else 0)
        return held + (self._bounds.nbytes if self._bounds is not None else 0)

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

    def retrieve(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return keys, values [B,G,S,D] as the next query will see them, and positions [B,G,S] (-1: empty slot)."""
        if not self.stores:
            raise PiKVError(f"layer {self.index} holds no tokens yet", hint="feed the model through the cache first")
        parts = [(*store.decoded(), store.position) for store in self.stores]
        keys, values, position = (torch.cat(tensors, dim=2) for tensors in zip(*parts))
        return keys, values, position

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
        keys, values = self.arrived
        del self.arrived
        position = self._arrive(keys, values, is_token)
        special = softcap is not None or sinks is not None or is_token is not None
        T = query.shape[2]
        is_prompt = T == self.num_stored and T > 1 and self.window is None and not self._has_empty
        if is_prompt and not special:
            output = self._attend_prompt(query, scale)
        elif T == 1 and len(self.stores) == 1 and not special and self._weigher is None:
            output = self._attend_plainly(query, position, scale)
        else:
            output = self._attend_stores(query, position, scale, softcap, sinks)
        if not self.held:
            self.compress()
        return output

    def _arrive(self, keys: torch.Tensor, values: torch.Tensor, is_token: torch.Tensor | None) -> torch.Tensor:
        """Append new tokens to the tail; return their positions [B,T]."""
        B, G, T, _ = keys.shape
        start = self.num_seen.to(keys.device)[:, None]
        if is_token is None:
            position = start + torch.arange(T, device=keys.device)
            self.num_seen = self.num_seen + T
        else:
            position = (start + is_token.cumsum(1) - 1).masked_fill(~is_token, EMPTY)
            self.num_seen = self.num_seen + is_token.sum(1).cpu()
            self._has_empty = True
        self.tail.append(keys, values, position[:, None].expand(B, G, T))
        if self._bounds is not None and self.body is None:
            self._bounds.append(keys, None if is_token is None else is_token[:, None].expand(B, G, T))
        self.seen_length += T
        self._on_change(self.index)
        return position

    def _visible(self, store: Store, position: torch.Tensor) -> torch.Tensor:
        """Return bool [B,1|G,T,S]: which slots the queries at `position` [B,T] may see."""
        held = store.position
        if self._in_order and not store.is_selection:
            held = held[:, :1]  # the heads agree
        ahead = position[:, None, :, None] - held[:, :, None, :]
        visible = (held >= 0)[:, :, None] & (ahead >= 0)
        return visible if self.window is None else visible & (ahead < self.window)

    def _attend_prompt(self, query: torch.Tensor, scale: float) -> torch.Tensor:
        """Attend a whole prompt over itself."""
        keys, values = self.tail.decoded()
        if self._weigher is None:
            return causal_attention(query, keys, values, scale)
        output, mass = prefill_mass(query, keys, values, scale)
        self._weigher.observe(self.tail.columns(), mass)
        return output

    def _attend_stores(
        self,
        query: torch.Tensor,
        position: torch.Tensor,
        scale: float,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attend over all stores, whatever they hold, and let the evictor observe."""
        T = query.shape[2]
        stores = self.stores
        read = [self._read(store, query) if T == 1 else store.plain() for store in stores]
        only_new = self._in_order and T == self.num_stored

        def visible(store: Store, new: slice) -> torch.Tensor:
            seen = self._visible(store, position[:, new])
            return seen[..., : new.stop] if only_new else seen

        weigh = self._weigher is not None
        output, masses = attend_in_chunks(query, read, visible, scale, softcap, sinks, weigh)
        for store, mass in zip(stores, masses):
            assert self._weigher is not None
            self._weigher.observe(store.columns(), mass)
        return output

    def _attend_plainly(self, query: torch.Tensor, position: torch.Tensor, scale: float) -> torch.Tensor:
        """Attend one new token per row over the one store, with nothing to measure."""
        B, H, _, D = query.shape
        store = self._read(self.tail, query)
        rows = query.reshape(B, self._shape.num_kv_heads, -1, D)
        masked = self._has_empty or self.window is not None or store is not self.tail
        visible = self._visible(store, position) if masked else None
        return store.attend_plainly(rows, visible, scale).reshape(B, H, 1, D)

    def _read(self, store: Store, query: torch.Tensor) -> Store:
        """Return what a single query reads of a store: the selector's pages of it, or all."""
        selector, bounds = self._selector, self._bounds
        if not isinstance(selector, Selector) or bounds is None or (self.body is not None and store is self.tail):
            return store
        capacity = int(self._capacity().max())
        others = self.num_stored - store.num_slots
        num_pages = max(1, selector.num_pages(capacity, self._page) - -(-others // self._page))
        if num_pages >= bounds.num_pages:
            return store
        rows = query.reshape(len(query), self._shape.num_kv_heads, -1, query.shape[-1])
        score = selector.score(rows, bounds.lowest, bounds.highest)
        return store.pages(score.topk(num_pages, dim=-1).indices, self._page)

    def compress(self) -> None:
        """Drop what is over budget and encode what has left the newest tokens; ends a `hold`."""
        self.held = False
        if self.body is not None and self.body.num_slots:
            self._encode(self.body)  # new units compete with old ones; a first prompt is evicted token by token
        if self.stores and (self._evictor is not None or self.window is not None):
            dropped = evict(self.stores, self._evictor, self.num_seen, self._capacity(), self.window)
            self._in_order = self._in_order and not dropped.moved
            self._has_empty = self._has_empty or dropped.emptied
        if self.body is not None:
            self._encode(self.body)
        self._on_change(self.index)

    def _capacity(self) -> torch.Tensor:
        """Tokens per head [B] that may stay, on the CPU."""
        most = self.num_seen if self.window is None else self.num_seen.clamp(max=max(1, self.window - 1))
        if self._evictor is None and self._selector is None:
            return most
        capacity = self.allocation.capacity(self.budget.tokens(most), self.index, self.num_layers)
        return torch.minimum(capacity, most)

    def _encode(self, body: Store) -> None:
        """Move the oldest units of the tail into the body, in full precision until now."""
        tail = self.tail
        num_tokens = (tail.num_slots - self.codec.residual) // body.unit * body.unit
        if num_tokens <= 0:
            return
        order = tail.position.argsort(dim=-1, stable=True)
        oldest, rest = order[:, :, :num_tokens], order[:, :, num_tokens:]
        keys, values = tail.decoded()
        take = oldest[..., None].expand(*oldest.shape, keys.shape[-1])
        keys, values = keys.gather(2, take), values.gather(2, take)
        position = tail.position.gather(2, oldest)
        columns = {name: column.gather(2, oldest) for name, column in tail.columns().items()}
        body.append(keys, values, position, columns)
        if self._bounds is not None:
            self._bounds.append(keys, position >= 0 if self._has_empty else None)
        tail.keep(rest)

    def hold(self) -> None:
        """Drop and encode nothing until `compress`."""
        self.held = True
        self._num_slots_at_hold = self.tail.num_slots

    def rewind(self, num_tokens: int) -> None:
        """Forget the newest tokens, none of them padding, seen since `hold`; what evictors learnt from them stays."""
        assert self.held and num_tokens <= self.tail.num_slots - self._num_slots_at_hold
        self.tail.drop_newest_slots(num_tokens)
        self.seen_length -= num_tokens
        self.num_seen = self.num_seen - num_tokens
        if self._bounds is not None and self.body is None:
            whole = self.tail.num_slots // self._page * self._page
            keys = self.tail.decoded()[0][:, :, whole:]
            self._bounds.rewind(keys, self.tail.position[:, :, whole:] >= 0, self.tail.num_slots)
