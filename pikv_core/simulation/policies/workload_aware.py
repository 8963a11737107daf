"""Evict what its workload makes least likely to be used again soon (KVCache Cache in the Wild, arXiv 2506.02634).

From the paper: a workload is a category of requests, first turns apart from later ones; the time until a block is used
again is taken to be exponential in each; what counts is the probability of a use within the coming `life_s`, given the
time since the last; of equals the block farther into its prompt goes. As that falls with age, the oldest block of each
workload is all there is to look at.

Ours: a block is of the workload that used it last. A workload's blocks are one LRU list; touched last to first, which
object hits are not, the older of two blocks of one request is the farther one. Rate and share used again are fitted
every `refit_s` to all uses before, of blocks held or not, beginning with one block used after life_s and one never.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from numba.extending import register_jitable
from numpy.typing import NDArray
from pydantic import Field

from pikv_core.simulation.linked_lists import make_lists, oldest, push_newest, unlink
from pikv_core.simulation.policies import REQUEST_POLICIES
from pikv_core.simulation.policies.base import RequestPolicy
from pikv_core.simulation.trace import Trace

MS_PER_S = 1000.0


@REQUEST_POLICIES.register("workload-aware")
@dataclass(frozen=True)
class WorkloadAware(RequestPolicy):
    refits: ClassVar[bool] = True
    life_s: Annotated[float, Field(gt=0)] = 300.0
    refit_s: Annotated[float, Field(gt=0)] = 60.0

    def state(self, trace: Trace, capacity_blocks: int) -> tuple[Any, ...]:
        """Return a list per workload, the last request of each block, time, workload and fit of each request, and fits.

        A fit [2, W] holds for each of W workloads the logarithm of the probability of a block just used, and what a
        millisecond takes from it: both compiled and not, the rest is a product and a difference, equal to the last bit.
        """
        workloads = 2 * trace.category.astype(np.int64) + (trace.turn > 0)
        num_workloads = 2 * len(trace.categories)
        period = np.floor_divide(trace.timestamps_ms, MS_PER_S * self.refit_s)
        fit_of_request = np.zeros(trace.num_requests, np.int64)
        np.cumsum(np.diff(period) > 0, out=fit_of_request[1:])
        fits = _fits(trace, workloads, num_workloads, fit_of_request, MS_PER_S * self.life_s)
        links = make_lists(trace.num_blocks, num_workloads)
        used = np.zeros(trace.num_blocks, np.int64)
        return links, used, trace.timestamps_ms, workloads, fit_of_request, fits

    @staticmethod
    @register_jitable
    def touch(state: Any, block: int, access: int, request: int) -> None:
        links, used, _times_ms, workloads, _fit_of_request, _fits = state
        unlink(links, block)
        push_newest(links, used.size + workloads[request], block)
        used[block] = request

    @staticmethod
    @register_jitable
    def admit(state: Any, block: int, access: int, request: int) -> None:
        links, used, _times_ms, workloads, _fit_of_request, _fits = state
        push_newest(links, used.size + workloads[request], block)
        used[block] = request

    @staticmethod
    @register_jitable
    def evict(state: Any, incoming: int, access: int, request: int) -> int:
        links, used, times_ms, _workloads, fit_of_request, fits = state
        fit = fit_of_request[request]
        victim = -1
        lowest = 0.0
        for workload in range(fits.shape[2]):
            block = oldest(links, used.size + workload)
            if block == used.size + workload:
                continue
            age_ms = times_ms[request] - times_ms[used[block]]
            likely = fits[fit, 0, workload] - fits[fit, 1, workload] * age_ms
            if victim < 0 or likely < lowest:
                victim, lowest = block, likely
        unlink(links, victim)
        return victim

    @staticmethod
    @register_jitable
    def forget(state: Any, block: int) -> None:
        links, _used, _times_ms, _workloads, _fit_of_request, _fits = state
        unlink(links, block)


def _fits(
    trace: Trace, workloads: NDArray[Any], num_workloads: int, fit_of_request: NDArray[Any], life_ms: float
) -> NDArray[np.float64]:
    """Return the fits [F, 2, W]; each knows the uses by requests before the first that it is for.

    A block that a request repeats is used once, at its last place.
    """
    request = np.repeat(np.arange(trace.num_requests, dtype=np.int32), trace.blocks_per_request)
    later = np.append(request, np.int32(-1))[trace.next_accesses]
    last_here = later != request
    earlier, later = request[last_here], later[last_here]
    num_uses = _so_far(fit_of_request[earlier], workloads[earlier], num_workloads, fit_of_request)
    again = later >= 0
    earlier, later = earlier[again], later[again]
    known = fit_of_request[later]
    num_again = _so_far(known, workloads[earlier], num_workloads, fit_of_request)
    waits_ms = trace.timestamps_ms[later] - trace.timestamps_ms[earlier]
    sum_ms = _so_far(known, workloads[earlier], num_workloads, fit_of_request, waits_ms)
    share = (num_again + 1) / (num_uses + 2)
    rate = (num_again + 1) / (sum_ms + life_ms)  # per millisecond
    return np.stack([np.log(share) + np.log(-np.expm1(-rate * life_ms)), rate], axis=1)


def _so_far(
    fit: NDArray[Any],
    workload: NDArray[Any],
    num_workloads: int,
    fit_of_request: NDArray[Any],
    weights: NDArray[Any] | None = None,
) -> NDArray[np.float64]:
    """Return by fit and workload how many there were, or the sum of their weights, before the fit's first request."""
    num_fits = int(fit_of_request[-1]) + 1
    flat = np.bincount(fit * num_workloads + workload, weights, num_fits * num_workloads)
    sums: NDArray[np.float64] = flat.reshape(num_fits, num_workloads).astype(np.float64)
    return np.cumsum(sums, axis=0) - sums
