"""Low rank, trained: x ≈ x A B in place of keys and values, starting from their singular vectors."""

from __future__ import annotations

from dataclasses import dataclass

from pikv_core.compression import CODECS
from pikv_core.compression.trained_low_rank import TrainedLowRank


@CODECS.register("lora")
@dataclass(frozen=True)
class LoRA(TrainedLowRank):
    """Store the numbers in the model's own type."""
