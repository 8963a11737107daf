"""Sums over the processes that train together, what else they tell each other, and how a lost one is told.

Alone, and where a rank does what the others do not, each of the sums returns what it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pikv_core.errors import PiKVError

T = TypeVar("T")


_is_apart = ContextVar("is_apart", default=False)


def num_started() -> int:
    """Return how many processes were started together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return which of the processes that were started together this is; 0 alone."""
    return dist.get_rank() if num_started() > 1 else 0


def num_ranks() -> int:
    """Return how many processes train together: 1 inside `apart`."""
    return 1 if _is_apart.get() else num_started()


@contextmanager
def apart() -> Iterator[None]:
    """Have the sums inside be of this rank alone: it does what the others do not, and they are not asked."""
    token = _is_apart.set(True)
    try:
        yield
    finally:
        _is_apart.reset(token)


def total(values: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks; every rank has to ask. No gradient passes."""
    if num_ranks() == 1:
        return values
    values = values.detach().clone()
    dist.all_reduce(values)
    return values


def mean_count(count: int | Tensor) -> float | Tensor:
    """Return the mean of a count over the ranks, for what is divided by it to be averaged over them; at least 1 in all.

    With it in place of its own count, the mean of the ranks' losses, and of their gradients, is that of one process
    that has everything, however the count differs from rank to rank.
    """
    if num_ranks() == 1:
        return count.clamp(min=1) if isinstance(count, Tensor) else max(1, count)
    return total(torch.as_tensor(count)).clamp(min=1) / num_ranks()


def dealt(items: Sequence[T]) -> Sequence[T]:
    """Return those of the items that fall to this rank, dealt in turn."""
    return items[rank() :: num_started()]


def everyones(value: T) -> list[T]:
    """Return what each rank gives, in the order of ranks; every rank has to ask. Values are pickled."""
    if num_started() == 1:
        return [value]
    values: list[Any] = [None] * num_started()
    dist.all_gather_object(values, value)
    return values


def of_first(work: Callable[[], T]) -> T:
    """Return what rank 0 comes to, where alone the work is done; every rank has to ask. Its PiKVError ends all."""
    if num_started() == 1:
        return work()
    told: list[Any] = [None]
    if rank() == 0:
        try:
            with apart():
                told = [work()]
        except PiKVError as error:
            told = [error]
    dist.broadcast_object_list(told)
    if isinstance(told[0], PiKVError):
        end_all(told[0])
    return told[0]


def end_all(error: PiKVError) -> NoReturn:
    """Raise an error that every rank has come to, for rank 0 alone to tell; the others end in silence."""
    if rank() > 0:
        raise SystemExit(error.exit_code)
    raise error


def is_of_connection(error: RuntimeError) -> bool:
    """Return whether an error is of the traffic between ranks, which gloo tells as a plain RuntimeError."""
    told = str(error).lower()
    return isinstance(error, dist.DistError) or "gloo" in told or "connection" in told
