"""Sums over the processes that train together, and how a lost one is told.

Alone, each of the sums returns what it is given.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def num_ranks() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


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


def is_of_connection(error: RuntimeError) -> bool:
    """Return whether an error is of the traffic between ranks, which gloo tells as a plain RuntimeError."""
    told = str(error).lower()
    return isinstance(error, dist.DistError) or "gloo" in told or "connection" in told
