"""How many strategies a router is worth having, and which: those that, taken together, lose least.

Shapes: L layers, N lessons, E strategies.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from pikv_core.scheduling.moe_router import MoERouter
from pikv_core.training.router_lessons import Lessons

LEAST = 2  # strategies: a router over one has nothing to choose
LEAST_GAIN = 0.02  # what one strategy more has to lower, as a share


def most_useful(cost: Tensor, num: int | Literal["auto"], first: int) -> list[int]:
    """Return which strategies to keep, in their order, given what each costs [L,N,E]: `first`, then greedily.

    The next one is that with which the least cost among those kept is lowest, in the mean over layers and lessons.
    "auto": until one more lowers that mean by no more than LEAST_GAIN of it, but LEAST at the least.
    """
    kept, least = [first], cost[..., first]
    while len(kept) < cost.shape[-1] and (num == "auto" or len(kept) < num):
        before = float(least.mean())
        together = cost.minimum(least[..., None]).mean(dim=(0, 1))
        together[kept] = torch.inf
        best = int(together.argmin())
        if num == "auto" and len(kept) >= LEAST and before - float(together[best]) <= LEAST_GAIN * abs(before):
            break
        kept.append(best)
        least = least.minimum(cost[..., best])
    return sorted(kept)


def of_strategies(lessons: Lessons, policy: MoERouter, kept: list[int]) -> tuple[Lessons, MoERouter]:
    """Return the lessons as if some of the policy's strategies alone had been measured, and a policy of these alone."""
    x = lessons.features
    if policy.cache_aware:
        rates = policy.measured(x)[1][..., kept]
        of_all = 2 * len(policy.strategies) + 1
        x = torch.cat([x[..., :-of_all], rates, torch.zeros_like(rates), x[..., -1:]], dim=-1)
    some = dataclasses.replace(policy, strategies=tuple(policy.strategies[strategy] for strategy in kept))
    cost, agree, share = (values[..., kept] for values in (lessons.cost, lessons.agree, lessons.kept))
    return dataclasses.replace(lessons, features=x, cost=cost, agree=agree, kept=share), some
