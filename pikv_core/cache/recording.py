"""Recorded attention: a recorder watches a cache that keeps everything, and a layer can be replayed from a record.

Shapes: B batch, H query heads, G key/value heads, R = H/G, N queries, S slots, P positions, T new tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, Protocol

import torch

from pikv_core.errors import UsageError
from pikv_core.observation import ALL, Observer, Rows

CHUNK_QUERIES = 128  # that are replayed at a time

# Returns, of a slice of a step's queries, their attention [B,H,N,P] to the positions 0..P-1, 0 for those after a query,
# and the share [B,H,N] that no token got.
Recorded = Callable[[slice], tuple[torch.Tensor, torch.Tensor]]


class Writer(Protocol):
    """Whoever keeps what is recorded, as arrays of float32."""

    def add_rows(self, layer: int, probs: Any) -> None:
        """Take the attention [H,N,P] of the layer's next N queries."""

    def add_vectors(self, layer: int, kind: Literal["keys", "queries"], vectors: Any) -> None:
        """Take the keys [G,T,D] or queries [H,T,D] of the layer's next T tokens."""


class Recorder(Observer):
    """Hand what a run computes to a writer: the rows of each step's newest `num_queries`, keys and queries of all.

    vectors: whether keys and queries are recorded. num_tokens: how many the first layer has been fed.
    """

    name: ClassVar[str] = "recorder"

    def __init__(self, writer: Writer, num_queries: int = ALL, vectors: bool = True):
        self._writer, self._num_queries, self._vectors = writer, num_queries, vectors
        self.num_tokens = 0

    @property
    def observes(self) -> int:
        return self._num_queries

    def take(self, layer: int, keys: torch.Tensor, query: torch.Tensor) -> None:
        """Take keys [B,G,T,D] and queries [B,H,T,D] of new tokens; raises UsageError for more than one sequence."""
        if len(keys) != 1:
            raise UsageError(f"a record is of one sequence, and {len(keys)} were fed", hint="feed one at a time")
        self.num_tokens += keys.shape[2] if layer == 0 else 0
        if self._vectors:
            self._writer.add_vectors(layer, "keys", keys[0].detach().float().cpu().numpy())
            self._writer.add_vectors(layer, "queries", query[0].detach().float().cpu().numpy())

    def observe(self, columns: Mapping[str, torch.Tensor], rows: Rows) -> None:
        """Take rows, in the order of positions whatever the order of the slots; raises UsageError for padding."""
        if rows.query_position.min() < 0:
            raise UsageError("a record is of one sequence without padding", hint="feed its tokens alone")
        by_query_head = rows.probs[0].flatten(0, 1)  # [H,N,S]
        length = int(rows.query_position.max()) + 1
        slot_of = rows.position[0].repeat_interleave(rows.probs.shape[2], dim=0)[:, None].expand_as(by_query_head)
        by_position = by_query_head.new_zeros(*by_query_head.shape[:2], length + 1)  # the last: what sees nothing
        place = torch.where((slot_of < 0) | (slot_of >= length), length, slot_of).long()
        by_position.scatter_add_(2, place, by_query_head)
        self._writer.add_rows(rows.layer.index, by_position[:, :, :length].detach().cpu().numpy())
