"""Keep every token: the reference that all policies are measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pikv_core.scheduling import POLICIES
from pikv_core.scheduling.base import Policy


@POLICIES.register("full")
@dataclass(frozen=True)
class Full(Policy):
    """Drop nothing, read everything."""

    heads_apart: ClassVar[bool] = True
    takes_budget: ClassVar[bool] = False
