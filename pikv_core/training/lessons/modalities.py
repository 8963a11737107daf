"""Samples of several modalities, some missing, and their classes."""

from __future__ import annotations

from typing import Any

import numpy as np

from pikv_core.training.lessons import LESSONS
from pikv_core.training.lessons.whole_samples import WholeSamples


@LESSONS.register("modalities")
class Modalities(WholeSamples):
    """Classify what is there; in training some more of it may be hidden, one modality at least stays."""

    head = "modality-classification"

    @property
    def tokens_each(self) -> int:
        return self.source.splits["train"]["modalities"].shape[1]

    def sizes(self) -> dict[str, Any]:
        _, num_modalities, size = self.source.splits["train"]["modalities"].shape
        filling = "bank" if self.source.task.missing == "bank" else "zero"
        return {"num_modalities": num_modalities, "modality_size": size, "missing_modalities": filling}

    def training_inputs(self, rng: np.random.Generator, rows: np.ndarray) -> dict[str, np.ndarray]:
        split = self.source.splits["train"]
        present = hide(rng, split["present"][rows], self.source.task.hide_share)
        return {"modalities": split["modalities"][rows], "present": present}

    def test_inputs(self) -> dict[str, np.ndarray]:
        split = self.source.splits["test"]
        return {"modalities": split["modalities"], "present": split["present"]}


def hide(rng: np.random.Generator, present: np.ndarray, share: float) -> np.ndarray:
    """Return present [N, M] with each True made False by the chance `share`; a row that would lose all keeps all."""
    left = present & (rng.random(present.shape) >= share)
    return np.where(left.any(axis=1, keepdims=True), left, present)
