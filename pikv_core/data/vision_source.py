"""The task vision, opened: its samples in memory, and the files that a model keeps of them.

Shapes: N samples, P patches, C numbers a patch, M modalities, F features.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from pikv_core.data import tensor_files
from pikv_core.data.corpus import DESCRIPTION
from pikv_core.data.manifest import read_json
from pikv_core.errors import PiKVError
from pikv_core.files import write_json

if TYPE_CHECKING:
    from pikv_core.data.vision import Vision

OPTIONS = "vision.json"
SPLITS = ("train", "test")


@dataclass(frozen=True)
class VisionSource:
    """Samples by split; described: what corpus.json says of them, the classes and the baselines among it."""

    task: Vision
    splits: dict[str, dict[str, NDArray[Any]]]
    described: dict[str, Any]

    vocab_size: ClassVar[int] = 0

    @property
    def classes(self) -> list[str]:
        """The names of the labels, in order."""
        return self.described["classes"]

    @property
    def baselines(self) -> dict[str, float]:
        """Test accuracies without a model."""
        return self.described["baselines"]

    @property
    def train_rows(self) -> NDArray[np.intp]:
        """The rows of the training split to train on."""
        return np.arange(len(self.splits["train"]["labels"]))

    def labels(self, split: str) -> NDArray[np.int64]:
        """Return the labels [N] of a split."""
        return self.splits[split]["labels"]

    def save(self, folder: Path) -> None:
        """Write the options, what is told of the data, and the held-out samples into a model folder."""
        write_json(folder / OPTIONS, asdict(self.task) | {"data": self.described})
        tensor_files.save(self.splits["test"], folder / file_of("test"))


class DigitSource(VisionSource):
    """Images of one channel, out of their patches."""

    lesson: ClassVar[str] = "images"

    def images(self, split: str) -> NDArray[np.float32]:
        """Return the images [N, 8, 8] of a split, values in [0, 1]."""
        cut = self.splits[split]["patches"]
        side = self.task.patch
        rows = round(cut.shape[1] ** 0.5)
        return cut.reshape(-1, rows, rows, side, side).transpose(0, 1, 3, 2, 4).reshape(-1, rows * side, rows * side)


class ModalitySource(VisionSource):
    """Samples [N, M, F] with the modalities `present` [N, M]."""

    lesson: ClassVar[str] = "modalities"

    @property
    def train_rows(self) -> NDArray[np.intp]:
        """The rows of the training split to train on: with missing "drop", the complete ones."""
        if self.task.missing != "drop":
            return super().train_rows
        complete = np.flatnonzero(self.splits["train"]["present"].all(axis=1))
        if not len(complete):
            raise PiKVError(
                "every sample of the training split lacks a modality, and missing 'drop' leaves such samples out",
                hint="choose missing: bank or zero",
            )
        return complete


def file_of(split: str) -> str:
    """Return the name of a split's file."""
    return f"vision.{split}.safetensors"


def read(folder: Path, task: Vision) -> VisionSource:
    """Return the source whose files the task wrote into a folder."""
    splits = {split: tensor_files.load(folder / file_of(split)) for split in SPLITS}
    kind = DigitSource if task.source == "digits" else ModalitySource
    return kind(task, splits, read_json(folder / DESCRIPTION))
