"""What lessons share that classify samples of no text: rows of fixed data, cross-entropy, scores of labels.

Letters: B samples, L labels.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from pikv_core.errors import PiKVError
from pikv_core.evaluation import classification
from pikv_core.training.gates import Gates, load_statistics
from pikv_core.training.hardware import Hardware
from pikv_core.training.lessons.base import Lesson, Step, epoch_rows, slices, to_device

SAMPLES_AT_A_TIME = 512


@dataclass(frozen=True)
class Labelled:
    """inputs: what the model's `decode` takes, by name, a row a sample. labels: int64 [B]."""

    inputs: dict[str, np.ndarray]
    labels: np.ndarray


class WholeSamples(Lesson):
    """Classify samples of as many tokens each, `tokens_each`; the accuracy of the test split counts most."""

    @property
    @abstractmethod
    def tokens_each(self) -> int:
        """Return what the model makes of a sample."""

    @abstractmethod
    def sizes(self) -> dict[str, Any]:
        """Return what the model's configuration is told of a sample."""

    @abstractmethod
    def training_inputs(self, rng: np.random.Generator, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Return samples of the training split, changed as drawn."""

    @abstractmethod
    def test_inputs(self) -> dict[str, np.ndarray]:
        """Return the test split."""

    @property
    def model_options(self) -> dict[str, Any]:
        names = dict(enumerate(self.source.classes))
        labels = {"id2label": names, "label2id": {name: number for number, name in names.items()}}
        return {"vocab_size": 0, **labels, **self.sizes()}

    def batch(self, seed: int, step: int, length: int) -> Labelled:
        if length < self.tokens_each:
            raise PiKVError(
                f"length {length} is too short for a sample of {self.tokens_each} tokens",
                hint=f"set train.curriculum: [{self.tokens_each}]",
            )
        rows = self.source.train_rows
        num_samples = max(1, self.settings.batch_tokens // self.tokens_each)
        chosen = rows[epoch_rows(seed, step, num_samples, len(rows))]
        inputs = self.training_inputs(np.random.default_rng([seed, step, 1]), chosen)
        return Labelled(inputs, self.source.labels("train")[chosen])

    def step(self, model: Any, batch: Labelled) -> Step:
        outputs, logits = _run(model, batch.inputs)
        return Step({"labels": F.cross_entropy(logits, to_device(batch.labels, model))}, outputs, logits)

    def num_tokens(self, batch: Labelled) -> int:
        return len(batch.labels) * self.tokens_each

    @torch.no_grad()
    def evaluate(self, model: Any, gates: Gates, hardware: Hardware) -> dict[str, float]:
        """Return accuracy, macro_f1, log_loss (nats), the load, and the task's baselines."""
        inputs, labels = self.test_inputs(), self.source.labels("test")
        gates.reset()
        parts = []
        for part in slices(len(labels), SAMPLES_AT_A_TIME):
            with hardware.autocast():
                outputs, logits = _run(model, {name: values[part] for name, values in inputs.items()})
                gates.losses(outputs)
            parts.append(logits.cpu())
        metrics = label_metrics(torch.cat(parts), labels, self.source.classes)
        return metrics | load_statistics(gates.statistics()) | self.source.baselines


def label_metrics(logits: torch.Tensor, labels: np.ndarray, classes: list[str]) -> dict[str, float]:
    """Return accuracy, macro_f1 and log_loss (nats) of logits [B, L] for labels [B]."""
    given = [classes[number] for number in logits.argmax(-1).tolist()]
    score = classification.score(given, [classes[number] for number in labels.tolist()])
    log_loss = F.cross_entropy(logits.double(), torch.from_numpy(labels)).item()
    return {"accuracy": score.accuracy, "macro_f1": score.macro_f1, "log_loss": log_loss}


def _run(model: Any, inputs: dict[str, np.ndarray]) -> tuple[Any, torch.Tensor]:
    """Return the decoder's outputs and the logits [B, L] in float32."""
    outputs = model.decode(**{name: to_device(values, model) for name, values in inputs.items()})
    return outputs, model.classify(outputs.last_hidden_state).float()
