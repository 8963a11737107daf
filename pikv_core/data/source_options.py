"""Options that only some sources of a task have."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from pikv_core.errors import UsageError


def refuse(task: Any, names: Iterable[str]) -> None:
    """Raise UsageError where one of these fields is not at its default: `task.source` makes nothing of it."""
    defaults = {field.name: field.default for field in dataclasses.fields(task)}
    for name in names:
        if getattr(task, name) != defaults[name]:
            raise UsageError(f"source '{task.source}' has no option '{name}'", hint=f"drop {name}")
