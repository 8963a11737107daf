"""A cache that is split over ranks by the shards of its older tokens (policy `expert-shards`).

Every rank places every token in its shard and knows all shards' sums, bounds and pages, so that each query's choice is
that of one process; of the pages it stores its own shards' alone. First and newest tokens are on every rank, and rank 0
attends them. Shapes: B batch, H query heads, G key/value heads, R = H/G, T new tokens, P pages, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from pikv_core.cache.newest import attend_reads
from pikv_core.cache.ranks.all_heads import AllHeads
from pikv_core.cache.ranks.attend_part import attend_part
from pikv_core.cache.shards.shards import OwnShards
from pikv_core.errors import UsageError
from pikv_core.scheduling.base import Policy, ShardSelector
from pikv_core.schema import CacheRecipe
from pikv_kernels.merge_partials import join_partials, merge_partials
from pikv_kernels.partial_attention import Partial

if TYPE_CHECKING:
    from pikv_core.cache.layer import CacheLayer
    from pikv_core.cache.ranks.split import Wire


class ByShards(AllHeads):
    """Hold the shards of this rank, every N-th one, and what is in no shard.

    A first prompt every rank attends whole, as it does by tokens, and then keeps its shards.
    """

    name = "shards"

    def __init__(self, wire: Wire):
        self._wire = wire
        self.own_shards = OwnShards(wire.rank, wire.count)

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
        T = query.shape[2]
        keys, values, position, is_prompt = layer.take(is_token)
        (lane,) = layer.lanes
        lane.has_empty = lane.has_empty or is_token is not None
        lane.arrive(keys, values, position)
        G = keys.shape[1]
        stores = [store for store in lane.stores if store is lane.body or self._wire.rank == 0]
        if T == 1 and stores:
            rows = query.reshape(len(query), G, -1, query.shape[-1])
            reads = [lane.read(store, query, position, scale, layer.read_tokens, False, None) for store in stores]
            part = join_partials(attend_reads(rows, reads, scale, softcap, False))
        else:
            part = attend_part(stores, query, G, position, None, True, scale, softcap, alike=False)
        parts = [Partial(output, lse, None) for lse, output in self._wire.gather(part.lse, part.output)]
        logits = None if sinks is None else sinks.view(1, G, -1, 1).expand(-1, -1, -1, T).flatten(2)
        merged, _ = merge_partials(parts, logits)
        layer.end_step(T, is_prompt)
        layer.expect_experts()
        return merged.reshape(query.shape)

    def capacity(self, layer: CacheLayer, capacity: torch.Tensor) -> torch.Tensor:
        return capacity

    def num_waiting(self, layer: CacheLayer) -> int | None:
        return None

    def end_step(self, layer: CacheLayer, is_first: bool) -> None:
        """Leave it to the shards what they keep."""


def check_shards(count: int, recipe: CacheRecipe, policy: Policy, per_layer: Sequence[int | None]) -> None:
    """Raise UsageError where a cache cannot be split by shards, with the reason."""
    name = recipe.policy.name
    if not isinstance(policy, ShardSelector):
        raise UsageError(
            f"policy '{name}' puts no tokens in shards", hint="choose policy expert-shards, or give another --split"
        )
    if recipe.budget == 1.0 and not policy.limits_itself:
        raise UsageError(
            f"policy '{name}' reads everything under a budget of 1.0, and then makes no shards",
            hint="give top_shards, or a budget such as 0.25",
        )
    if policy.shards < count:
        raise UsageError(
            f"{count} ranks share {policy.shards} shards, and some would hold none",
            hint=f"start {policy.shards} ranks at most, or give more --shards",
        )
    if policy.dense_layers:
        raise UsageError(
            f"the first {policy.dense_layers} layers make no shards (dense_layers), and would lie whole on every rank",
            hint="set dense_layers to 0",
        )
    if any(window is not None for window in per_layer):
        raise UsageError(
            "layers with a sliding window make no shards, and would lie whole on every rank",
            hint="take a model without sliding windows",
        )
