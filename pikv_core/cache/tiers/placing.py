"""Move a lane's oldest pages to their tiers, knowing what else the lane holds on the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from pikv_core.cache.tiers.store import TieredStore

if TYPE_CHECKING:
    from pikv_core.cache.lane import Lane


def place(lane: Lane, capacity: Callable[[], int]) -> None:
    """Move what shares and the device's limit ask for; capacity: tells the budget that a selector reads under."""
    store = lane.tail if lane.body is None else lane.body
    if not isinstance(store, TieredStore):
        return
    selector, bounds, beside, read_pages = lane.plan.selector, lane.bounds, 0.0, 0
    if selector is not None and bounds is not None:
        read_pages = selector.num_pages(capacity(), bounds.page_tokens)
        if bounds.num_slots:
            page_bytes = 2 * bounds.lowest[:, :, :1].numel() * bounds.lowest.element_size()
            beside += page_bytes * (1 + bounds.num_pages * 33 / 32)  # they grow by a thirty-second
    if lane.body is not None and lane.tail.has_arrived:
        slot_bytes = sum(x[:, :, :1].numel() * x.element_size() for x in lane.tail.slots().codes.values())
        waiting = lane.body.codec.residual + lane.body.unit + 8
        beside += 1.01 * waiting * (slot_bytes + 4 * lane.head.numel())
    store.place(int(beside), read_pages)
