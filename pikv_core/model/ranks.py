"""The processes that generate together, as torchrun starts them: each holds a part of the cache, rank 0 reports."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from transformers import StoppingCriteria

from pikv_core.cache import PiKVCache, stream
from pikv_core.cache.ranks.log import Follower, RankChanges
from pikv_core.cache.ranks.snapshot import part_of
from pikv_core.cache.ranks.split import Wire
from pikv_core.collectives import is_of_connection
from pikv_core.errors import PiKVError, UsageError

ENDED, MISTAKEN = "ended", "mistaken"  # in the ranks' store: whether a reason has been told, and of what kind
PATIENCE = timedelta(seconds=20)
_runs = itertools.count()  # the ranks take part in the same ones


@dataclass(frozen=True)
class Held:
    """Bytes that one rank holds, at the end and at its peak."""

    resident_bytes: int
    peak_bytes: int


class Ranks:
    """One rank of `wire.count`; alone, a cache is left whole, and nothing is sent."""

    def __init__(self, split: str | None = None, wire: Wire | None = None):
        self._split, self.wire = split, wire or Wire()

    @classmethod
    @contextmanager
    def of_torchrun(cls, split: str | None, device: torch.device, hint: str) -> Iterator[Ranks]:
        """Join the processes that torchrun started, each on a GPU of its own where there are any.

        An error is told by one of them, and that another rank is lost by the first that notices; hint: what to do then.
        """
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            yield cls()
            return
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        store, rank, count = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"generate/{next(_runs)}", store)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        with _told_once(rank, store, hint):
            if split is None:
                raise UsageError(
                    "the processes that torchrun started have to be told how they split the cache",
                    hint="give --split heads, tokens or shards, or start one process without torchrun",
                )
            dist.init_process_group(backend, store=store, rank=rank, world_size=count)
            with _told_to_end(rank, hint):
                yield cls(split, Wire(rank, count))
                dist.barrier()
            dist.destroy_process_group()

    @property
    def leads(self) -> bool:
        """Whether this is the rank that writes and reports."""
        return self.wire.rank == 0

    def tell(self, value: Any) -> Any:
        """Return what rank 0 gives."""
        told = [value]
        if self.wire.count > 1:
            dist.broadcast_object_list(told)
        return told[0]

    def share(self, cache: PiKVCache, model: Any) -> PiKVCache:
        """Return a cache of which this rank holds its part."""
        return cache if self.wire.count == 1 else cache.share(str(self._split), self.wire, model)

    def read(self, url: str, cache: PiKVCache) -> stream.Saved:
        """Return a state with this rank's part, as `cache` is split, of what its cache held; all ranks have read it."""
        saved = stream.read(url)
        split = cache.own_layers[0].split
        if split is None:
            return saved
        self.wire.numbers(0)  # from now on it may be written to
        return replace(saved, cache=part_of(saved.cache, split, self.wire.count))

    def writer(self, url: str, about: dict[str, Any], after: stream.Saved | None) -> stream.Writer | Follower:
        """Return who saves the states of all ranks, in one place."""
        if self.wire.count == 1:
            return stream.Writer(url, about, after)
        changes = RankChanges(self.wire, str(self._split))
        return stream.Writer(url, about, after, changes) if self.leads else Follower(changes)

    def held(self, cache: PiKVCache) -> list[Held]:
        """Return what each rank holds."""
        own = Held(cache.resident_bytes, cache.peak_bytes)
        if self.wire.count == 1:
            return [own]
        return [Held(*each) for each in zip(*map(self.wire.numbers, (own.resident_bytes, own.peak_bytes)))]


class Agreement(StoppingCriteria):
    """End a run whose ranks come to different tokens, before they wait for each other in vain; else never stop.

    received_bytes: what had come from the other ranks when each token was agreed on.
    """

    def __init__(self, wire: Wire):
        self._wire = wire
        self.received_bytes: list[int] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        newest = input_ids[:, -1]
        if self._wire.count > 1:
            told = torch.stack([tokens for (tokens,) in self._wire.gather(newest)])
            if bool((told != newest).any()):
                raise PiKVError(
                    f"the ranks part after {input_ids.shape[1]} tokens: they came to the tokens {told.tolist()}",
                    hint="the same numbers take the same machines and packages: start all ranks on one kind",
                )
        self.received_bytes.append(self._wire.received_bytes)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@contextmanager
def _told_once(rank: int, store: Any, hint: str) -> Iterator[None]:
    """Let one rank alone tell why all of them end."""
    try:
        yield
    except PiKVError as error:
        _end(store, error, rank if isinstance(error, UsageError) else None)
        raise
    except RuntimeError as error:
        if not is_of_connection(error):
            raise
        lost = PiKVError(f"rank {rank}: another rank is lost, and the run ends", hint=hint)
        _end(store, lost)
        raise lost from error


@contextmanager
def _told_to_end(rank: int, hint: str) -> Iterator[None]:
    """Make an error of torchrun's SIGTERM; it stays so after one."""

    def end(number: int, frame: Any) -> None:
        raise PiKVError(f"rank {rank}: torchrun ends the run: another rank is lost, or it was told to", hint=hint)

    before = signal.signal(signal.SIGTERM, end)
    yield
    signal.signal(signal.SIGTERM, before)


def _end(store: Any, error: PiKVError, rank: int | None = None) -> None:
    """Return where this rank is the one to tell an error, and end the process without a word elsewhere.

    rank: of a mistake in the call, which every rank makes and the first one tells; the others wait for it, since
    torchrun ends all when one has ended.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what is told is told to the end
    try:
        is_first = store.add(ENDED, 1) == 1
        if rank == 0:
            store.set(MISTAKEN, "")
        elif rank is not None:
            store.wait([MISTAKEN], PATIENCE)
    except RuntimeError:  # the store is gone with its rank, or the mistake is not one of the first rank's
        raise PiKVError(error.message, error.hint) from error
    if rank != 0 and not is_first:
        raise SystemExit(error.exit_code) from error
