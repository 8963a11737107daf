"""The cells of a sweep: every method at every budget and allocation, each with a key that names its measurement."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from pikv_core.components import Component
from pikv_core.evaluation.methods import label
from pikv_core.scheduling import POLICIES
from pikv_core.schema import CacheRecipe, CompressRecipe, MethodRecipe

# What can change between the runs of a sweep without changing what a cell measures.
BESIDE = {"name", "out", "plugins", "methods", "budgets", "allocations", "calibration", "target", "threads"}


@dataclass(frozen=True)
class Cell:
    """One configuration to measure; `key` is the same for the same configuration under the same conditions."""

    cache: CacheRecipe
    key: str

    @property
    def label(self) -> str:
        """Name the method: policy, codec, and the allocation where it is not uniform."""
        return label(self.cache.policy, self.cache.codec, self.cache.allocation, self.cache.rerotate)

    @property
    def is_full(self) -> bool:
        """Whether this is the full cache, which everything else is measured against."""
        return self.cache.policy.name == "full" and self.cache.codec.name == "none"

    def __str__(self) -> str:
        return f"{self.label} at {self.cache.budget}"


def expand(recipe: CompressRecipe) -> list[Cell]:
    """Return a cell for each method, allocation and budget, the full cache first.

    A policy that takes no budget drops nothing: it has one cell, as a codec alone has.
    """
    conditions = recipe.model_dump(exclude=BESIDE)
    cells: dict[str, Cell] = {}
    for method in [MethodRecipe(), *recipe.methods]:
        for cache in _caches(method, recipe):
            text = json.dumps({"cache": cache.model_dump(), "conditions": conditions}, sort_keys=True)
            key = hashlib.sha256(text.encode()).hexdigest()[:16]
            cells.setdefault(key, Cell(cache, key))
    return list(cells.values())


def _caches(method: MethodRecipe, recipe: CompressRecipe) -> list[CacheRecipe]:
    drops = POLICIES[method.policy.name].takes_budget
    allocations: Sequence[Component] = [Component("uniform")]
    if drops:
        allocations = recipe.allocations if method.allocation is None else [method.allocation]
    return [
        CacheRecipe(
            policy=method.policy,
            codec=method.codec,
            allocation=allocation,
            budget=budget,
            rerotate=method.rerotate,
            calibration=recipe.calibration,
        )
        for allocation in allocations
        for budget in (recipe.budgets if drops else [1.0])
    ]
