"""A target of quality, `recall=0.99`, and the configuration of the fewest bytes that reaches it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic_core import PydanticCustomError

SMALLER_IS_BETTER = {"recall": False, "perplexity": True, "agreement": False, "ruler": False}


@dataclass(frozen=True)
class Target:
    """A measured quality and the value it has to reach: at least for shares, at most for perplexity."""

    quality: str
    value: float

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read `recall=0.99`; raises pydantic's error with what is allowed."""
        match = re.fullmatch(rf"\s*({'|'.join(SMALLER_IS_BETTER)})\s*=\s*(\d+\.?\d*|\.\d+)\s*", text)
        if match is None:
            allowed = f"expected one of {', '.join(SMALLER_IS_BETTER)} and a number, such as recall=0.99, got '{text}'"
            raise PydanticCustomError("component", "{text}", {"text": allowed})
        return cls(match[1], float(match[2]))

    def __str__(self) -> str:
        return f"{self.quality} {'<=' if SMALLER_IS_BETTER[self.quality] else '>='} {self.value:g}"

    def reached_by(self, row: Mapping[str, Any]) -> bool:
        """Return whether the row's measured quality is as good as the target."""
        value = row[self.quality]
        if value is None:
            return False
        return value <= self.value if SMALLER_IS_BETTER[self.quality] else value >= self.value

    def cheapest(self, rows: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
        """Return the row of the fewest resident bytes that reaches the target, None where none does."""
        reached = [row for row in rows if self.reached_by(row)]
        return min(reached, key=lambda row: row["resident_bytes"], default=None)
