"""Small real classification data out of scikit-learn: digits as patches, or a table as three modalities of features.

`digits` are 1,797 images of 8 x 8 pixels (UCI, optical recognition of handwritten digits). `modalities` are 569
tumours, each told by the mean, the standard error and the worst of ten measures (UCI, breast cancer Wisconsin): three
views of one thing, any of which may be missing, as in Flex-MoE (2410.08245).

Shapes: N samples, P patches, C numbers a patch, M modalities, F features.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pikv_core.data import TASKS, extra, source_options, strata, tensor_files, text_files, vision_source
from pikv_core.data.corpus import DESCRIPTION
from pikv_core.data.opened import opened, refuse_of_training
from pikv_core.data.vision_source import OPTIONS, SPLITS, VisionSource
from pikv_core.errors import UsageError
from pikv_core.files import write_json
from pikv_core.runs import Reporter

PIXELS = 8  # a side
LARGEST = 16.0  # value of a pixel
MODALITIES = ("mean", "error", "worst")

OF_DIGITS = ["patch", "augment"]
OF_MODALITIES = ["missing_share", "missing", "hide_share"]
OF_TRAINING = ["augment", "missing", "hide_share"]
ALL_SAMPLES = 10_000  # more than any source has

Split = tuple[NDArray[np.intp], NDArray[np.intp]]  # training, test
Tensors = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Read:
    """A source as it comes: values [N,...], labels [N], the names of the classes, and what it is called."""

    values: NDArray[np.float64]
    labels: NDArray[np.int64]
    classes: list[str]
    source: str


@TASKS.register("vision")
@dataclass(frozen=True)
class Vision:
    source: Literal["digits", "modalities"] = "digits"
    patch: Literal[1, 2, 4, 8] = 2  # pixels a side, of digits
    missing_share: Annotated[float, Field(ge=0, lt=1)] = 0.0  # chance that a modality of a sample is missing
    test_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    # Of training alone:
    augment: bool = True  # whether digits are turned, stretched and shifted a little, with some noise
    # What stands for a missing modality: a learned vector, or zeros. "drop": zeros, training on complete samples alone.
    missing: Literal["bank", "zero", "drop"] = "bank"
    hide_share: Annotated[float, Field(ge=0, lt=1)] = 0.0  # chance that a modality that is there is hidden for a step

    def __post_init__(self) -> None:
        source_options.refuse(self, OF_MODALITIES if self.source == "digits" else OF_DIGITS)

    def open(
        self, path: str | None, seed: int, text: list[str], column: str | None, reporter: Reporter
    ) -> VisionSource:
        """Return the source: from a folder of gen-data at `path`, or made on the spot of all samples there are."""
        with opened(self, path, seed, text, column, reporter, ALL_SAMPLES, OF_TRAINING) as (folder, task):
            return vision_source.read(folder, task)

    def write(
        self,
        folder: Path,
        num_samples: int,
        seed: int,
        text: list[str],
        column: str | None,
        reporter: Reporter,
    ) -> dict[str, int]:
        """Write one safetensors file a split, num_samples together or all there are, and corpus.json."""
        text_files.refuse("vision", text, column)
        refuse_of_training(self, OF_TRAINING)
        found = read(self.source)
        values, labels = found.values, found.labels
        kept = min(num_samples, len(labels))
        if kept < 2:
            raise UsageError(f"num_samples: a training and a test split need 2 samples or more, got {kept}")
        num_test = strata.num_held_out(self.test_share, kept)
        split = strata.split(labels, kept, num_test, np.random.default_rng([seed, 0]))
        if self.source == "digits":
            tensors: Tensors = {"patches": patches(values, self.patch)}
            described: dict[str, Any] = {}
        else:
            present = draw_present(np.random.default_rng([seed, 1]), values.shape[:2], self.missing_share)
            tensors = modalities(values, present, split[0])
            described = {name: part.tolist() for name, part in zip(("mean", "spread"), moments(values, split[0]))}
        tensors["labels"] = labels
        files = {}
        for name, part in zip(SPLITS, split, strict=True):
            file = vision_source.file_of(name)
            tensor_files.save({key: tensor[part] for key, tensor in tensors.items()}, folder / file)
            files[file] = len(part)
        description = {
            "source": found.source,
            "classes": found.classes,
            "num_available": len(labels),
            "num_train": len(split[0]),
            "num_test": num_test,
            "baselines": baselines(tensors, split),
            **described,
        }
        write_json(folder / OPTIONS, asdict(self))
        write_json(folder / DESCRIPTION, description)
        return files


def patches(images: NDArray[np.float64], side: int) -> NDArray[np.float32]:
    """Cut images [N,8,8] into patches [N,P,C] of side x side pixels, both row by row; values in [0, 1]."""
    rows = PIXELS // side
    cut = images.reshape(-1, rows, side, rows, side).transpose(0, 1, 3, 2, 4)
    return (cut.reshape(-1, rows * rows, side * side) / LARGEST).astype(np.float32)


def draw_present(rng: np.random.Generator, shape: tuple[int, ...], missing_share: float) -> NDArray[np.bool_]:
    """Return which modalities are there [N,M]; where all are drawn missing, one of them stays."""
    num_samples, num_modalities = shape
    present = rng.random(shape) >= missing_share
    stays = rng.integers(num_modalities, size=num_samples)
    empty = np.flatnonzero(~present.any(axis=1))
    present[empty, stays[empty]] = True
    return present


def modalities(values: NDArray[np.float64], present: NDArray[np.bool_], train: NDArray[np.intp]) -> Tensors:
    """Standardise values [N,M,F] by the samples `train`, and empty what is missing.

    `combination` [N] has bit m set where modality m is missing: 0 says that all are there, and 2^M - 1 never comes.
    The mean and the spread are those of the complete training split, so that the values do not depend on what is
    missing.
    """
    mean, spread = moments(values, train)
    standard = (values - mean) / spread
    bits = 2 ** np.arange(present.shape[1])
    return {
        "modalities": np.where(present[:, :, None], standard, 0).astype(np.float32),
        "present": present,
        "combination": (~present) @ bits,
    }


def moments(values: NDArray[np.float64], train: NDArray[np.intp]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the mean and the spread [M,F] of values [N,M,F] over the samples `train`; a spread of 0 is told as 1."""
    spread = values[train].std(axis=0)
    return values[train].mean(axis=0), np.where(spread > 0, spread, 1)


def baselines(tensors: Tensors, split: Split) -> dict[str, float]:
    """Return the test accuracy of the training split's most frequent class and of its nearest class mean."""
    train, test = split
    labels = tensors["labels"]
    inputs = tensors["patches" if "patches" in tensors else "modalities"].reshape(len(labels), -1)
    known, counts = np.unique(labels[train], return_counts=True)
    means = np.stack([inputs[train][labels[train] == label].mean(axis=0) for label in known])
    distance = ((inputs[test][:, None] - means) ** 2).sum(axis=2)
    return {
        "majority_accuracy": float(np.mean(labels[test] == known[counts.argmax()])),
        "nearest_mean_accuracy": float(np.mean(labels[test] == known[distance.argmin(axis=1)])),
    }


def read(source: str) -> Read:
    """Read a source: images [N,8,8], or values [N,M,F] with the features of a modality in one order."""
    datasets = extra.module("sklearn.datasets", "scikit-learn", source)
    if source == "digits":
        bunch, function = datasets.load_digits(), "load_digits"
        values = bunch.images
    else:
        bunch, function = datasets.load_breast_cancer(), "load_breast_cancer"
        columns = [np.flatnonzero([kind in name.split() for name in bunch.feature_names]) for kind in MODALITIES]
        values = bunch.data[:, np.stack(columns)]
    version = importlib.metadata.version("scikit-learn")
    return Read(
        values,
        bunch.target.astype(np.int64),
        [str(name) for name in bunch.target_names],
        f"{function} of scikit-learn {version}",
    )
