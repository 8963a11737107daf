"""What a task is while a model trains on it: batches of token ids, and the files a model keeps of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np


@dataclass(frozen=True)
class Batch:
    """Token ids and where the losses are taken; a mask at t speaks of predicting token t+1."""

    ids: np.ndarray  # int64 [B, T]
    answer_mask: np.ndarray  # bool [B, T]; token t+1 is an answer value
    text_mask: np.ndarray  # bool [B, T]; tokens t and t+1 are both natural text


class Source(Protocol):
    """A task, opened: its tokenizer is fixed and its splits are apart. `lesson` names how a model trains on it."""

    lesson: ClassVar[str]

    @property
    def vocab_size(self) -> int: ...

    def batch(self, rng: np.random.Generator, num_samples: int, length: int, split: str = "train") -> Batch: ...

    def save(self, folder: Path) -> None:
        """Write the tokenizer into a model folder, and what rebuilds this source for held-out data."""
