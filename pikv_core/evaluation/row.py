"""The row of a sweep: what one configuration cost and kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """What one method did at one budget; bytes, of the budget too, are of one sequence: the prompt and 32 tokens.

    key: the cell's. method: policy, codec and allocation as on the command line. agreement: share of the full cache's
    greedy tokens; agreement_kl in nats. attention_error and attention_mass: means over the layers; see AttentionError.
    events: what the cache reported over one sequence, such as switches. read_bytes_per_token, slow_read_share: see
    Cost. Intervals are half of 95 %. What was not to be measured is None.
    """

    key: str
    method: str
    policy: str
    codec: str
    allocation: str
    budget: float | int | str
    resident_bytes: int
    full_bytes: int
    peak_bytes: int
    ms_per_token: float
    prefill_ms: float
    backend: str
    events: list[dict[str, Any]]
    read_bytes_per_token: int | None = None
    slow_read_share: float | None = None
    recall: float | None = None
    recall_interval: float | None = None
    recall_by_depth: list[float | None] | None = None
    recall_by_needles: dict[str, float] | None = None
    perplexity: float | None = None
    agreement: float | None = None
    agreement_kl: float | None = None
    attention_error: float | None = None
    attention_error_by_layer: list[float] | None = None
    attention_mass: float | None = None
    attention_mass_by_layer: list[float] | None = None
    ruler: float | None = None
    ruler_interval: float | None = None
    ruler_by_task: dict[str, float] | None = None

    @property
    def share(self) -> float:
        """Resident bytes as a share of the full cache's."""
        return self.resident_bytes / self.full_bytes


@dataclass(frozen=True)
class Skipped:
    """A configuration that was refused, and why."""

    key: str
    method: str
    budget: float | int | str
    reason: str
    hint: str | None = None
