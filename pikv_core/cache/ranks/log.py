"""States of a cache that is split over ranks, in one log: rank 0 writes what changed on all of them at one moment.

What is read back is the cache of one process (`snapshot.join`), so that any number of ranks goes on from it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from safetensors import torch as safetensors

from pikv_core.cache.changes import Change, Changes, Replay
from pikv_core.cache.ranks.snapshot import join
from pikv_core.cache.ranks.split import Wire
from pikv_core.cache.snapshot import Snapshot, take

if TYPE_CHECKING:
    from pikv_core.cache.cache import PiKVCache


class RankChanges(Changes):
    """Tell what has changed on all ranks from call to call, to rank 0; every rank has to ask."""

    def __init__(self, wire: Wire, split: str):
        super().__init__()
        self._wire, self._split = wire, split

    def since(self, now: Snapshot, anew: bool = False) -> Change:
        """Return the change of all ranks since the last call, on rank 0, and this rank's own on others.

        anew: tell all that there is; rank 0 says.
        """
        own = super().since(now, bool(self._wire.numbers(int(anew))[0]))
        about = {"facts": own.facts, "only_adds": own.only_adds}
        sent = b"" if self._wire.rank == 0 else safetensors.save(own.tensors, metadata={"about": json.dumps(about)})
        arrived = self._wire.collect(sent)
        if self._wire.rank:
            return own
        tensors = {f"0/{name}": x for name, x in own.tensors.items()}
        found = [about]
        for rank, data in enumerate(arrived[1:], 1):
            size = int.from_bytes(data[:8], "little")
            found.append(json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["about"]))
            tensors |= {f"{rank}/{name}": x for name, x in safetensors.load(data).items()}
        facts = {"split": self._split, "ranks": [one["facts"] for one in found]}
        return Change(facts, tensors, own.whole, all(one["only_adds"] for one in found))


class Follower:
    """Stand on ranks but the first for the writer of a log: take part in every state that it takes."""

    bytes_written = 0

    def __init__(self, changes: RankChanges):
        self._changes = changes

    def save(
        self, cache: PiKVCache, tokens: torch.Tensor, values: dict[str, Any], tensors: dict[str, torch.Tensor]
    ) -> None:
        """Hand rank 0 what has changed here."""
        self._changes.since(take(cache))

    def __enter__(self) -> Follower:
        return self

    def __exit__(self, *error: Any) -> None:
        pass


class RankReplay:
    """Go from change to change of a log, of one process or of ranks; `snapshot` is one process's."""

    def __init__(self) -> None:
        self._ranks: list[Replay] = []
        self._split = ""

    def apply(self, facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Take in the next change."""
        changes = facts.get("ranks", [facts])
        self._split = facts.get("split", "")
        self._ranks = self._ranks or [Replay() for _ in changes]
        for rank, (replay, change) in enumerate(zip(self._ranks, changes, strict=True)):
            prefix = f"{rank}/" if self._split else ""
            own = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
            replay.apply(change, own)

    def snapshot(self) -> Snapshot:
        """Return what the cache held."""
        parts = [replay.snapshot() for replay in self._ranks]
        return join(parts, self._split) if self._split else parts[0]
