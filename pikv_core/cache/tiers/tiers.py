"""Tiers: a cache that outgrows the device keeps its older pages in host memory, on disk or in a simulated CXL memory.

Policy flexgen deals them by share (arXiv 2303.06865); otherwise each tier is filled before the next. Attention reads
them through staging buffers on the device, whole layers where these are large enough, else in pieces that are merged.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from pikv_core.cache.tiers.memory import Tier
from pikv_core.cache.tiers.transfers import Piece, Totals, Transfers
from pikv_core.errors import PiKVError, UsageError
from pikv_core.scheduling.base import Policy, Selector, ShardSelector
from pikv_core.scheduling.flexgen import FlexGen
from pikv_core.schema import CacheRecipe, TiersRecipe

if TYPE_CHECKING:
    from pikv_core.cache.tiers.store import TieredStore

NUM_BUFFERS = 4  # where a layer is read in pieces; two where it is read whole
SPARE = 16  # a sixteenth of the buffers, to grow


def check_tiers(recipe: CacheRecipe, policy: Policy) -> None:
    """Raise UsageError where what the recipe asks for does not go over tiers."""
    if isinstance(policy, FlexGen) and policy.cxl and (recipe.tiers is None or recipe.tiers.cxl is None):
        raise UsageError(
            "policy 'flexgen' has a share in cxl, and no such memory is given",
            hint="simulate one: --set cache.tiers.cxl.bandwidth_gb_s=20",
        )
    if recipe.rerotate:
        raise UsageError(
            "rerotate moves keys with every token, and those in tiers stay as they are", hint="leave it out"
        )
    if recipe.tiers is None:
        return
    name = recipe.policy.name
    if not isinstance(policy, FlexGen | Selector) and policy.takes_budget:
        raise UsageError(
            f"policy '{name}' drops tokens, and tiers hold what is kept whole: an evicted token moves pages",
            hint="choose full, flexgen or quest, or leave out cache.tiers",
        )
    if isinstance(policy, ShardSelector):
        raise UsageError(
            f"policy '{name}' adds tokens to pages of any age, and those in tiers are done",
            hint="choose full, flexgen or quest, or leave out cache.tiers",
        )
    if recipe.tiers.device is None and not isinstance(policy, FlexGen):
        raise UsageError(
            f"tiers without a limit of the device hold nothing under policy '{name}'",
            hint="give cache.tiers.device, such as 64MiB, or choose policy flexgen, which places by share",
        )


class Tiers:
    """Where a cache's layers keep their pages.

    windows: tokens that each layer looks back, None for all; those with a window stay on the device. shares: of the
    tokens, by tier behind the device; empty where each tier is filled before the next.
    """

    def __init__(self, recipe: CacheRecipe, policy: Policy, windows: Sequence[int | None]):
        check_tiers(recipe, policy)
        self._recipe, self._policy, self._windows = recipe, policy, windows
        self.limits = recipe.tiers or TiersRecipe()
        self.shares = policy.slow_shares if isinstance(policy, FlexGen) else {}
        self.reset()

    def reset(self) -> None:
        """Forget the layers' stores, the peaks and the transfers."""
        self.stores: dict[int, TieredStore] = {}
        self.slow: list[Tier] = []
        self.attending: int | None = None  # the layer that is at its step, whose pages may still change
        self.reads_whole = True  # a layer in one piece, its newest tokens too
        self.has_buffers = False  # of the right size
        self.is_decoding = False
        self.peak_bytes = self.peak_decoding_bytes = 0  # of the device
        self._device_bytes: dict[int, int] = {}
        self._transfers: Transfers | None = None
        self._head_bytes = 0

    def start(self, keys: torch.Tensor) -> None:
        """Be ready for keys [B,G,T,D] like these."""
        if self._transfers is None:
            self.slow = _behind(self.limits, self.shares, keys.device)
            self._head_bytes = 2 * keys.shape[3] * keys.element_size() + 4  # of a token as it arrives
            self._transfers = Transfers(keys.device, self._bring, self._following)

    @property
    def transfers(self) -> Transfers:
        assert self._transfers is not None
        return self._transfers

    @property
    def staging_bytes(self) -> int:
        return 0 if self._transfers is None else self._transfers.nbytes

    @property
    def num_layers(self) -> int:
        """How many layers keep pages here."""
        return sum(window is None for window in self._windows)

    @property
    def slow_share(self) -> float:
        """The share of the tokens that is not the device's, whatever room it has."""
        return 1 - self._policy.device if isinstance(self._policy, FlexGen) else 0.0

    def layer_bytes(self, num_heads: int) -> int | None:
        """Return what the device gives one layer, `num_heads` heads of all rows, beside staging; None for no limit."""
        if self.limits.device is None:
            return None
        tokens = sum(1.02 * (window + 16) for window in self._windows if window is not None)
        left = self.limits.device - (self.staging_limit or 0) - tokens * num_heads * self._head_bytes
        return int(left) // self.num_layers

    def note(self, layer: int, resident_bytes: int) -> None:
        """Take note of what a layer holds, to find the peak of what is on the device."""
        store = self.stores.get(layer)
        self._device_bytes[layer] = resident_bytes - (0 if store is None else store.slow.nbytes)
        self.note_device(0)

    def note_device(self, more_bytes: int) -> None:
        """Take note of the device's bytes, with `more_bytes` that a step holds for itself."""
        held = self.device_bytes + more_bytes
        self.peak_bytes = max(self.peak_bytes, held)
        if self.is_decoding:
            self.peak_decoding_bytes = max(self.peak_decoding_bytes, held)

    @property
    def device_bytes(self) -> int:
        """Bytes on the device: newest tokens, positions, bounds of pages, staging buffers."""
        return sum(self._device_bytes.values()) + self.staging_bytes

    def deal(self, store: TieredStore, num_pages: int) -> list[tuple[Tier, int]]:
        """Return how many of a store's next pages go to which tier; raise PiKVError where they are all full."""
        room = {tier: self.room_for(tier, store) for tier in self.slow}
        dealt = dict.fromkeys(self.slow, 0)
        whole = sum(self.shares.values())
        for total in range(store.slow.num_pages + 1, store.slow.num_pages + num_pages + 1):
            able = [tier for tier in self.slow if dealt[tier] < room[tier]]
            if not able:
                sizes = ", ".join(f"{tier.name} {tier.limit_bytes:,} bytes" for tier in self.slow)
                raise PiKVError(
                    f"the tiers behind the device are full: {sizes}",
                    hint="raise cache.tiers.host, disk_bytes or cxl.bytes, or add --set cache.tiers.disk=DIR",
                )
            behind = {
                tier: self.shares[tier.name] / whole * total - store.slow.num_pages_in(tier) - dealt[tier]
                for tier in able
                if whole
            }
            dealt[max(able, key=lambda tier: behind[tier]) if whole else able[0]] += 1
        return [(tier, count) for tier, count in dealt.items() if count]

    def room_for(self, tier: Tier, store: TieredStore) -> float:
        """Return how many more pages of a store a tier takes."""
        limit = self.limit_of(tier)
        return math.inf if limit is None else store.slow.room_in(tier, limit)

    def limit_of(self, tier: Tier) -> int | None:
        """Return the bytes of a tier that each layer may take, all the same; None for no limit."""
        return None if tier.limit_bytes is None else tier.limit_bytes // self.num_layers

    @property
    def staging_limit(self) -> int | None:
        """Bytes that staging may take, None for what two whole layers need; few where most layers read pages alone."""
        if self.limits.staging is not None or self.limits.device is None:
            return self.limits.staging
        if isinstance(self._policy, Selector):
            return self.limits.device // 4 if self._policy.dense_layers else 0
        return self.limits.device // 2

    def _make_buffers(self) -> None:
        """Have the buffers that the layers' sizes call for."""
        largest = max(store.whole_bytes for store in self._streaming())
        limit = self.staging_limit
        if limit is None:
            held = self.transfers.buffers[0].numel() if self.transfers.buffers else 0
            self.transfers.resize(2, held if largest <= held else largest + largest // SPARE)
        elif 2 * largest <= limit:
            self.transfers.resize(2, limit // 2)
        else:
            self.transfers.resize(NUM_BUFFERS, limit // NUM_BUFFERS)
        self.reads_whole, self.has_buffers = len(self.transfers.buffers) == 2, True

    def begin(self, layer: int) -> None:
        """Take note that a layer reads its pages."""
        self.attending = layer
        if not self.has_buffers:
            self._make_buffers()

    def settled(self, layer: int) -> None:
        """Take note that a layer's step is over, and fetch what the next ones read."""
        if self.attending == layer:
            self.attending = None
        if self._streaming():
            self._make_buffers()
            self.transfers.fetch_on()

    def report(self) -> dict[str, Any]:
        """Return bytes by tier, from live storage, and what was moved, in how long, and how much of it was hidden."""
        totals = Totals() if self._transfers is None else self._transfers.tell()
        stores = self.stores.values()
        tokens = max(1, sum(store.num_slots for store in stores))
        away = {tier.name: sum(x.slow.num_pages_in(tier) * x.page_tokens for x in stores) for tier in self.slow}
        return {
            "bytes": {
                "device": self.device_bytes,
                **{tier.name: sum(store.slow.nbytes_in(tier) for store in stores) for tier in self.slow},
            },
            "share_of_tokens": {
                "device": 1 - sum(away.values()) / tokens,
                **{name: count / tokens for name, count in away.items()},
            },
            "device_limit_bytes": self.limits.device,
            "device_peak_bytes": self.peak_bytes,
            "device_peak_decoding_bytes": self.peak_decoding_bytes,
            "staging_bytes": self.staging_bytes,
            "bytes_moved": sum(totals.bytes_read.values()),
            "bytes_read": totals.bytes_read,
            "bytes_written": totals.bytes_written,
            "bytes_unused": totals.bytes_unused,
            "transfer_s": totals.transfer_s,
            "hidden_s": totals.hidden_s,
            "waited_s": totals.waited_s,
            "share_hidden": totals.hidden_s / totals.transfer_s if totals.transfer_s else None,
            "write_s": totals.write_s,
            "memories": {tier.name: tier.about for tier in self.slow},
            "simulated": [tier.name for tier in self.slow if tier.is_simulated],
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> Tiers:
        """Return tiers of the same limits with copies of the stores, and transfers of their own."""
        made = Tiers(self._recipe, self._policy, self._windows)
        memo[id(self)] = made
        if self._transfers is not None:
            made.slow, made._head_bytes = self.slow, self._head_bytes  # extents know their tiers
            made._transfers = Transfers(self.transfers.device, made._bring, made._following)
        made.stores = copy.deepcopy(self.stores, memo)
        made._device_bytes = dict(self._device_bytes)
        made.peak_bytes, made.peak_decoding_bytes = self.peak_bytes, self.peak_decoding_bytes
        return made

    def _streaming(self) -> list[TieredStore]:
        """Return the stores whose pages are all read in every step, in the order of their layers."""
        return [store for _, store in sorted(self.stores.items()) if store.streams]

    def _bring(self, piece: Piece, buffer: torch.Tensor) -> dict[str, int]:
        return self.stores[piece.layer].bring(piece, buffer)

    def _following(self, last: Piece | None) -> Piece | None:
        """Return the piece that is read after `last`, None while it may still change or there is none."""
        stores = self._streaming()
        if not stores:
            return None
        if last is not None:
            same = next((store for store in stores if store.layer == last.layer), None)
            after = None if same is None else next((x for x in same.pieces() if x.first == last.end), None)
            if after is not None:
                return after
        later = [store for store in stores if last is not None and store.layer > last.layer]
        store = (later or stores)[0]
        return None if store.layer == self.attending else store.pieces()[0]


def _behind(limits: TiersRecipe, shares: Mapping[str, float], device: torch.device) -> list[Tier]:
    """Return the tiers behind a device, fastest first."""
    pinned = device.type == "cuda"  # which alone lets it copy while it computes
    tiers = [Tier("host", limits.host, pinned)]
    if limits.cxl is not None:
        speed = (limits.cxl.latency_us * 1e-6, 1 / (limits.cxl.bandwidth_gb_s * 1e9))
        tiers.append(Tier("cxl", limits.cxl.bytes, pinned, None, *speed))
    folder = limits.disk or (tempfile.gettempdir() if shares.get("disk") else None)
    if folder is not None:
        tiers.append(Tier("disk", limits.disk_bytes, folder=folder))
    return tiers
