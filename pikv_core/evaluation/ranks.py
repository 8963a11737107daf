"""The processes that share a sweep, as torchrun starts them: whoever is free takes the next cell, rank 0 leads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store

PATIENCE = timedelta(days=30)  # a rank may wait for the others as long as the longest sweep


class Ranks:
    """One of `count` processes; alone there is no store, and all cells are its own."""

    def __init__(self, rank: int = 0, count: int = 1, store: Store | None = None):
        self.rank = rank
        self.count = count
        self._store = store
        if store is not None:
            store.set_timeout(PATIENCE)

    @classmethod
    def of_torchrun(cls) -> Ranks:
        """Join the processes that torchrun started, each on a GPU of its own where there are any."""
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return cls()
        import torch
        from torch.distributed import PrefixStore, rendezvous

        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        store, rank, count = next(rendezvous("env://"))
        return cls(rank, count, PrefixStore("pikv", store))

    def take(self, num_cells: int) -> Iterator[int]:
        """Yield the cells that fall to this rank."""
        if self._store is None:
            yield from range(num_cells)
            return
        while (cell := self._store.add("next", 1) - 1) < num_cells:
            yield cell

    def tell(self, name: str, value: str) -> None:
        """Let the other ranks know."""
        if self._store is not None:
            self._store.set(name, value)

    def hear(self, name: str) -> str:
        """Wait until a rank tells."""
        assert self._store is not None
        return self._store.get(name).decode()

    def end(self) -> None:
        """Say that this rank has done its part; rank 0 waits for all the others."""
        if self._store is None:
            return
        self._store.set(f"end/{self.rank}", "")
        if self.rank == 0:
            self._store.wait([f"end/{rank}" for rank in range(self.count)], PATIENCE)
