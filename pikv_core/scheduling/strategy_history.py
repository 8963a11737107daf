"""Which strategy did how well where: a running table that routers over strategies read.

A cell is of a layer, a prompt's length (its power of two), a strategy's hit rate (one of a few ranges) and that
strategy. It holds the mean of what the strategy cost there, relative to the mean over strategies, and the sum of the
weights: DECAY^age, age in observations of that cell. 0 is neutral, and what a cell reads of which nothing was seen.
Shapes: L layers, P lengths, H ranges of hit rates, E strategies, N lessons.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    Table = Mapping[str, torch.Tensor]  # COST and COUNT, [L,P,H,E] each

COST, COUNT = "history/cost", "history/count"
NUM_LENGTHS = 24  # the last is of all prompts from 2^23 tokens on
RATE_EDGES = (0.5, 0.8, 0.95)  # a hit rate at an edge is in the range above it
DECAY = 0.99
ROUNDING = 1e-5  # of a logarithm in float32, so that a power of two is in its own range


def empty(num_layers: int, num_strategies: int) -> dict[str, torch.Tensor]:
    """Return a table of which nothing was seen."""
    import torch

    shape = (num_layers, NUM_LENGTHS, len(RATE_EDGES) + 1, num_strategies)
    return {COST: torch.zeros(shape), COUNT: torch.zeros(shape)}


def relative(cost: torch.Tensor, least: float) -> torch.Tensor:
    """Return costs [...,E] over their mean, less 1; `least` keeps that finite where nothing is lost."""
    mean = cost.mean(dim=-1, keepdim=True)
    return (cost - mean) / (mean + least)


def read(cost: torch.Tensor, log_seen: torch.Tensor, rates: torch.Tensor) -> torch.Tensor:
    """Return what a layer's cells [P,H,E] say of prompts [N,E], given their log lengths [N] and hit rates [N,E]."""
    import torch

    length, rate = _cells(log_seen, rates)
    return cost.to(rates.device)[length, rate, torch.arange(rates.shape[-1], device=rates.device)]


def observe(
    table: Table, log_seen: torch.Tensor, rates: torch.Tensor, cost: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Take in lessons in their order; return what each could read before it was taken in, and the table after all.

    log_seen [L,N]: of the tokens of the prompts. rates, cost [L,N,E]: hit rates, and costs as `relative` gives them.
    """
    import torch

    mean, count = table[COST].clone(), table[COUNT].clone()
    L, N, E = rates.shape
    length, rate = _cells(log_seen, rates)
    before = torch.zeros(L, N, E)
    for n in range(N):
        cell = (torch.arange(L)[:, None], length[:, n], rate[:, n], torch.arange(E))
        before[:, n] = mean[cell]
        count[cell] = DECAY * count[cell] + 1
        mean[cell] += (cost[:, n] - mean[cell]) / count[cell]
    return before, {COST: mean, COUNT: count}


def of_strategies(table: Table, kept: list[int]) -> dict[str, torch.Tensor]:
    """Return the cells of some strategies alone."""
    return {name: x[..., kept] for name, x in table.items()}


def _cells(log_seen: torch.Tensor, rates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the index of the length [...,1] and that of the range of hit rates [...,E]."""
    import torch

    length = (log_seen / math.log(2) + ROUNDING).floor().long().clamp(min=0, max=NUM_LENGTHS - 1)
    edges = torch.tensor(RATE_EDGES, device=rates.device)
    return length[..., None], torch.bucketize(rates.contiguous(), edges, right=True)
