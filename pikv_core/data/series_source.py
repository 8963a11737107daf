"""The task series, opened: its windows in memory, and the files that a model keeps of them.

Shapes: N windows, C values of context, H steps ahead.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from pikv_core.data import strata, tensor_files
from pikv_core.data.corpus import DESCRIPTION
from pikv_core.data.manifest import read_json
from pikv_core.errors import PiKVError
from pikv_core.files import write_json

if TYPE_CHECKING:
    from pikv_core.data.series import Series

OPTIONS = "series.json"
SPLITS = ("train", "test")
UNITS = {"day": "D", "week": "W", "month": "M", "year": "Y"}  # of a step, as numpy names them


@dataclass(frozen=True)
class Windows:
    """context [N,C] and future [N,H], and when each context starts [N], in steps; in order of time."""

    context: NDArray[np.float32]
    future: NDArray[np.float32]
    start: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, rows: slice | NDArray[Any]) -> Windows:
        return Windows(self.context[rows], self.future[rows], self.start[rows])

    @property
    def values(self) -> NDArray[np.float32]:
        """The windows as a whole [N,C+H]."""
        return np.concatenate([self.context, self.future], axis=1)

    @property
    def context_times(self) -> NDArray[np.int64]:
        """When each value of the contexts is [N,C], in steps."""
        return self.start[:, None] + np.arange(self.context.shape[1])


@dataclass(frozen=True)
class SeriesSource:
    """Windows to train on and held-out ones to measure on; described: what corpus.json says of the series."""

    lesson: ClassVar[str] = "forecast"
    vocab_size: ClassVar[int] = 0

    task: Series
    train: Windows
    held_out: Windows
    described: dict[str, Any]

    @property
    def period(self) -> int | None:
        """The steps of a season, where a context holds a whole one."""
        period = self.described["period"]
        return period if period <= self.task.context_length else None

    @property
    def optimum(self) -> dict[int, float] | None:
        """The least mean squared error of the held-out windows by horizon, where it is known."""
        rows = self.described["baselines"].get("optimum")
        return {row["horizon"]: row["mse"] for row in rows} if rows and not self.task.validation_share else None

    def save(self, folder: Path) -> None:
        """Write the options, what is told of the series, and the held-out windows into a model folder."""
        write_json(folder / OPTIONS, asdict(self.task) | {"data": self.described})
        tensor_files.save(vars(self.held_out), folder / "series.held_out.safetensors")


def file_of(split: str) -> str:
    """Return the name of a split's file."""
    return f"series.{split}.safetensors"


def read(folder: Path, task: Series) -> SeriesSource:
    """Return the source whose files the task wrote into a folder."""
    described = read_json(folder / DESCRIPTION)
    train, test = (_read_windows(folder / file_of(split), described["step"]) for split in SPLITS)
    if task.validation_share:
        return SeriesSource(task, *hold_out(train, task.validation_share), described)
    return SeriesSource(task, train, test, described)


def hold_out(windows: Windows, share: float) -> tuple[Windows, Windows]:
    """Part the last share of windows from those that end before the first of its futures begins."""
    last = windows[len(windows) - strata.num_held_out(share, len(windows)) :] if len(windows) > 1 else windows
    length = windows.values.shape[1]
    before = windows[windows.start + length <= last.start[0] + windows.context.shape[1]]
    if not len(before):
        raise PiKVError(
            f"validation_share: no window of {len(windows)} ends before the future of those held out begins",
            hint="lower validation_share, or write more windows",
        )
    return before, last


def _read_windows(file: Path, step: str) -> Windows:
    tensors = tensor_files.load(file)
    starts = tensors["start"].astype("datetime64[D]").astype(f"datetime64[{UNITS[step]}]").astype(np.int64)
    return Windows(tensors["context"], tensors["future"], starts)
