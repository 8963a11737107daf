"""What every lesson answers: the model it needs, a step's batch and losses, the held-out measurement.

Letters: B samples, T tokens, N scored places, C classes or words.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from pikv_core.errors import UsageError
from pikv_core.schema import TrainSettings
from pikv_core.training.gates import Gates
from pikv_core.training.hardware import Hardware

EVALUATION_SEED = 20_260


@dataclass(frozen=True)
class Step:
    """What a forward pass gave.

    losses: weighted, by name; their sum is minimised. outputs: the decoder's. logits: [N, C] of what is scored, for a
    teacher to be compared with; None where nothing is classified. accuracy: of the answers, None where there are none.
    mask: [B, T], True for real tokens; None where all are.
    """

    losses: dict[str, Tensor]
    outputs: Any
    logits: Tensor | None = None
    accuracy: float | None = None
    mask: Tensor | None = None


class Lesson(ABC):
    """A task as the trainer sees it; source: the task's data, opened.

    head: a key of pikv_core.training.architectures.HEADS. metric: the name of what counts most in `evaluate`.
    """

    name: ClassVar[str]
    head: ClassVar[str] = "causal-lm"

    def __init__(self, source: Any, settings: TrainSettings):
        self.source = source
        self.settings = settings

    @property
    def has_answers(self) -> bool:
        """Whether steps have an accuracy that ends the stages of the curriculum."""
        return False

    @property
    def model_options(self) -> dict[str, Any]:
        """Return what the model's configuration needs to know of the task, vocab_size first of all."""
        return {"vocab_size": self.source.vocab_size}

    @abstractmethod
    def batch(self, seed: int, step: int, length: int) -> Any:
        """Return the batch of a step, a function of the arguments alone; raise PiKVError where there can be none."""

    @abstractmethod
    def step(self, model: Any, batch: Any) -> Step:
        """Run a batch."""

    @abstractmethod
    def evaluate(self, model: Any, gates: Gates, hardware: Hardware) -> dict[str, float]:
        """Return the metrics of held-out data, the same for every seed of training; model is in evaluation mode."""

    def context(self, model: Any, batch: Any) -> Tensor:
        """Return the first tokens of a batch, ids [B, C], of which a cache may keep a part when the rest is read."""
        raise UsageError(
            f"train.cache: the lesson '{self.name}' has no context that a cache would hold",
            hint="drop it, or train on recall or text",
        )

    def num_tokens(self, batch: Any) -> int:
        """Return the tokens of a batch, padding and all, which speed is told by."""
        return batch.ids.size

    def save(self, folder: Path) -> None:
        """Write beside the model what it takes to use it and to measure it again."""
        self.source.save(folder)


def epoch_rows(seed: int, step: int, num_rows: int, total: int) -> np.ndarray:
    """Return the rows of a step: `total` rows are gone through in an order of each epoch's own, again and again."""
    places = np.arange(step * num_rows, (step + 1) * num_rows)
    order = {one: np.random.default_rng([seed, one]).permutation(total) for one in set((places // total).tolist())}
    return np.array([order[place // total][place % total] for place in places.tolist()])


def slices(total: int, at_a_time: int) -> Iterator[slice]:
    """Yield the slices that go through `total` rows in order."""
    for start in range(0, total, at_a_time):
        yield slice(start, min(total, start + at_a_time))


def to_device(array: np.ndarray, model: Any) -> Tensor:
    """Return an array as a tensor where the model is."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(model.device)
