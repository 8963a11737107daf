"""Choose one candidate for each of several places under a total cost: exactly, by dynamic programming."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def choose(errors: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], budget: int) -> list[int] | None:
    """Return the candidate of each place with the least sum of errors whose costs together are within the budget.

    errors, costs: by place, then by candidate; finite, costs >= 0. None where even the cheapest are over the budget.
    """
    # Only what is above each place's cheapest candidate is worth a cell of the table.
    base = [min(place) for place in costs]
    above = [[cost - least for cost in place] for place, least in zip(costs, base)]
    room = min(budget - sum(base), sum(max(place) for place in above))
    if room < 0:
        return None
    grain = math.gcd(*(cost for place in above for cost in place)) or 1
    cells = room // grain + 1
    best = np.zeros(cells)  # the least error with at most so much room used by the places so far
    picks = np.empty((len(costs), cells), dtype=np.int16)
    for place, (place_errors, place_costs) in enumerate(zip(errors, above)):
        table = np.full((len(place_costs), cells), np.inf)
        for candidate, (error, cost) in enumerate(zip(place_errors, place_costs)):
            step = cost // grain
            if step < cells:
                table[candidate, step:] = best[: cells - step] + error
        picks[place] = table.argmin(axis=0)
        best = table.min(axis=0)
    cell, chosen = cells - 1, []
    for place in reversed(range(len(costs))):
        candidate = int(picks[place, cell])
        chosen.append(candidate)
        cell -= above[place][candidate] // grain
    return chosen[::-1]
