"""What policies, allocations and codecs see of attention while a model runs, and where they remember it.

Shapes: B batch, G key/value heads, R query heads of a group, N queries, S stored tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch

ALL = sys.maxsize  # every query of a step


@dataclass
class LayerRun:
    """One layer of one run: its place, what the model tells of it, and what members remember from step to step.

    own: memory of this layer, shared: of all layers of the cache (keys by member, such as "fastv"); both live as long
    as the cache's tokens. rotary: the model's rotary embedding, None before `cache.attach(model)` or where it has
    none. fitted: tensors of the policy's calibration, for all layers. events: what is worth a line in the report.
    """

    index: int
    num_layers: int
    num_kv_heads: int = 0
    rotary: Any = None
    fitted: Mapping[str, torch.Tensor] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Rows:
    """The attention of N consecutive queries of a step over the S tokens of one store.

    probs [B,G,R,N,S] float32: softmax over everything stored, 0 where a query does not see and for padding queries.
    query_position [B,N] and position [B,G,S]: true positions, -1 for padding and empty slots. num_visible [B,G,N]:
    stored tokens that the query sees in all stores. is_first, is_last: whether these are the first, the last observed
    queries of the step.
    """

    probs: torch.Tensor
    query_position: torch.Tensor
    position: torch.Tensor
    num_visible: torch.Tensor
    is_first: bool
    is_last: bool
    layer: LayerRun


class Observer:
    """Whoever wants to see attention rows: evictors, allocations, codecs.

    columns: names of the float32 statistics that the stores carry along with each token, starting at 0.
    observes: how many of the newest queries of each step `observe` is to be shown; ALL for every one, 0 for none.
    """

    columns: ClassVar[tuple[str, ...]] = ()

    @property
    def observes(self) -> int:
        return 0

    def observe(self, columns: Mapping[str, torch.Tensor], rows: Rows) -> None:
        """Update the columns [B,G,S] in place; called with a chunk of queries at a time, store by store."""
        raise NotImplementedError(f"{type(self).__name__} declares what it observes but does not observe it")
