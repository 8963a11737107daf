"""What policies, allocations and codecs see of attention while a model runs, and where they remember it.

Shapes: B batch, G key/value heads, R query heads of a group, N queries, S stored tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from pikv_core.errors import PiKVError

if TYPE_CHECKING:
    import torch

ALL = sys.maxsize  # every query of a step
WHOLE = "whole:"  # begins the key of a tensor in `LayerRun.own` that is of a layer as a whole, the same on all ranks


@dataclass
class Reads:
    """What attention of single new tokens has read, over all rows and layers.

    num_bytes: of keys and values, or their codes, and of what a selector chose by. slow_bytes: those in slow shards.
    """

    num_bytes: int = 0
    slow_bytes: int = 0


def _all_here(x: torch.Tensor) -> torch.Tensor:
    return x


@dataclass
class LayerRun:
    """One layer of one run: its place, what the model tells of it, and what members remember from step to step.

    own: memory of this layer, shared: of all layers of the cache (keys by member, such as "fastv"); both live as long
    as the cache's tokens, and the first dimension of a tensor in them is the batch. rotary: the model's rotary
    embedding, None before `cache.attach(model)` or where it has none. fitted: tensors of the policy's calibration, for
    all layers. events: what is worth a line in the report. first_head: of a layer that is split over ranks by heads,
    which is the first one here. routing: who tells the experts of the model's tokens, None where nobody asked. reads:
    where to count what is read, None for nowhere. gather_heads: given a tensor [B,G,...] of the heads that are here,
    returns that of all of the layer's heads, in their order; every rank has to ask, with the same shape and dtype.
    """

    index: int
    num_layers: int
    num_kv_heads: int = 0
    rotary: Any = None
    fitted: Mapping[str, torch.Tensor] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    first_head: int = 0
    routing: Any = None
    reads: Reads | None = None
    gather_heads: Callable[[torch.Tensor], torch.Tensor] = _all_here

    def rotary_for(self, policy: str) -> Any:
        """Return the model's rotary embedding; raises PiKVError where there is none for the policy."""
        if self.rotary is None:
            raise PiKVError(
                f"policy '{policy}' needs the rotary embedding of the model, and was told of none",
                hint="call cache.attach(model); a model with learned positions needs another policy",
            )
        return self.rotary

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors in this layer's memory; what layers share counts for the first."""
        return _nbytes(self.own) + (_nbytes(self.shared) if self.index == 0 else 0)

    def select_rows(self, rows: torch.Tensor) -> None:
        """Reorder, repeat or drop rows of the batch in what is remembered."""
        self.own.update(_select(self.own, rows))
        if self.index == 0:
            self.shared.update(_select(self.shared, rows))


@dataclass(frozen=True)
class Rows:
    """The attention of N consecutive queries of a step over the S tokens of one store.

    probs [B,G,R,N,S] float32: softmax over everything stored, 0 where a query does not see and for padding queries.
    query_position [B,N] and position [B,G,S]: true positions, -1 for padding and empty slots. num_visible [B,G,N]:
    stored tokens that the query sees in all stores. is_first: whether these are the first observed queries of the
    step. num_after: queries of the step that come after these.
    """

    probs: torch.Tensor
    query_position: torch.Tensor
    position: torch.Tensor
    num_visible: torch.Tensor
    is_first: bool
    num_after: int
    layer: LayerRun

    @property
    def is_last(self) -> bool:
        return self.num_after == 0

    def column_sums(self) -> torch.Tensor:
        """Return [B,G,S]: what these queries give each token, summed over them and averaged over a group's heads."""
        by_row = self.probs.flatten(2, 3)
        share = by_row.new_full((1, 1, 1, by_row.shape[2]), 1 / self.probs.shape[2])
        return (share @ by_row)[:, :, 0]

    def newest(self, num_queries: int) -> Rows | None:
        """Return the part that is among the newest `num_queries` of the step, as if they alone were observed."""
        num_left = self.probs.shape[3] + self.num_after
        skip = num_left - num_queries
        if skip >= self.probs.shape[3]:
            return None
        if skip < 0:
            return self
        return Rows(
            self.probs[:, :, :, skip:],
            self.query_position[:, skip:],
            self.position,
            self.num_visible[:, :, skip:],
            is_first=True,
            num_after=self.num_after,
            layer=self.layer,
        )


class Observer:
    """Whoever wants to see attention rows: evictors, allocations, codecs.

    columns: names of the float32 statistics that the stores carry along with each token, starting at 0.
    observes: how many of the newest queries of each step `observe` is to be shown; ALL for every one, 0 for none.
    without_queries: whether tokens that came without queries are ones that nothing attended to, and no mistake.
    """

    name: ClassVar[str]
    without_queries: ClassVar[bool] = False
    columns: ClassVar[tuple[str, ...]] = ()

    @property
    def observes(self) -> int:
        return 0

    def observe(self, columns: Mapping[str, torch.Tensor], rows: Rows) -> None:
        """Update the columns [B,G,S] in place; called with a chunk of queries at a time, store by store."""
        raise NotImplementedError(f"{type(self).__name__} declares what it observes but does not observe it")


def _nbytes(memory: Any) -> int:
    if isinstance(memory, dict):
        return sum(_nbytes(value) for value in memory.values())
    return memory.untyped_storage().nbytes() if hasattr(memory, "untyped_storage") else 0


def _select(memory: Any, rows: torch.Tensor) -> Any:
    if isinstance(memory, dict):
        return {key: _select(value, rows) for key, value in memory.items()}
    return memory[rows.to(memory.device)] if hasattr(memory, "device") else memory
