"""Windows of a time series: a context, and the future to forecast; every test future comes after all of training.

Real series come with statsmodels: `co2` (ppm at Mauna Loa, monthly means of the weekly values), `co2-weekly`,
`sunspots` (yearly), `elnino` (sea surface temperature, °C, monthly). `synthetic` is a trend, a season of three
harmonics and Gaussian noise: no forecaster's expected squared error is below noise**2.

Shapes: N windows, C values of context, H steps ahead, T values of the series.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from pydantic import Field

from pikv_core.data import TASKS, real_series, series_source, source_options, strata, tensor_files, text_files
from pikv_core.data.corpus import DESCRIPTION
from pikv_core.data.naive import errors, naive, seasonal_naive
from pikv_core.data.opened import opened, refuse_of_training
from pikv_core.data.real_series import Record
from pikv_core.data.series_source import OPTIONS, SeriesSource
from pikv_core.errors import UsageError
from pikv_core.files import write_json
from pikv_core.runs import Reporter

Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0)]

OF_TRAINING = ("anchor", "jitter", "stretch", "shortest_context", "validation_share")
ON_THE_SPOT = 2500  # windows at most: more than any real series has


@TASKS.register("series")
@dataclass(frozen=True)
class Series:
    source: Literal["synthetic", "co2", "co2-weekly", "sunspots", "elnino"] = "synthetic"
    context_length: Positive = 128
    horizons: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1, 8, 32, 64)  # the largest is written
    test_share: Annotated[float, Field(gt=0, lt=1)] = 0.2  # of the windows
    # Of the synthetic series alone:
    period: Annotated[int, Field(ge=2)] = 24  # steps of a season
    trend: float = 0.01  # a step
    amplitude: NotNegative = 1.0  # standard deviation of the season
    noise: NotNegative = 0.3  # standard deviation
    # Of training alone:
    anchor: Literal["none", "last", "season"] = "season"  # what predictions are added to; "last" without a whole season
    jitter: NotNegative = 0.0  # standard deviation of noise on the values, in those of their context
    stretch: NotNegative = 0.0  # of time, by a factor from exp(-stretch) to exp(stretch): seasons of other lengths
    shortest_context: Annotated[float, Field(gt=0, le=1)] = 1.0  # share of it, from which up training values are
    # normalised: what comes after them is then told nothing by the mean and the deviation
    validation_share: Annotated[float, Field(ge=0, lt=1)] = 0.0  # of the training windows, the last, to measure on in
    # place of the test split, and to choose settings by

    def __post_init__(self) -> None:
        if self.source != "synthetic":
            source_options.refuse(self, ("period", "trend", "amplitude", "noise"))

    @property
    def num_steps(self) -> int:
        """The H of `future`."""
        return max(self.horizons)

    def open(
        self, path: str | None, seed: int, text: list[str], column: str | None, reporter: Reporter
    ) -> SeriesSource:
        """Return the source: from a folder of gen-data at `path`, or made on the spot."""
        with opened(self, path, seed, text, column, reporter, ON_THE_SPOT, OF_TRAINING) as (folder, task):
            return series_source.read(folder, task)

    def write(
        self,
        folder: Path,
        num_samples: int,
        seed: int,
        text: list[str],
        column: str | None,
        reporter: Reporter,
    ) -> dict[str, int]:
        """Write one safetensors file a split, num_samples windows together or all there are, and corpus.json."""
        text_files.refuse("series", text, column)
        refuse_of_training(self, OF_TRAINING)
        # A training window ends before the first test future: so many of T values begin no window of either split.
        unused = self.context_length + 2 * self.num_steps - 2
        if self.source == "synthetic":
            record, signal = self.synthetic(seed, num_samples + unused)
        else:
            record, signal = real_series.read(self.source), None
        num_windows = max(0, len(record.values) - unused)
        starts = self.split(num_windows, num_samples, np.random.default_rng([seed, 2]))
        files = {}
        for split, start in starts.items():
            file = series_source.file_of(split)
            tensors = {**self.windows(record.values, start), "start": record.days[start].astype(np.int64)}
            tensor_files.save(tensors, folder / file)
            files[file] = len(start)
        description = {
            "source": record.source,
            "num_values": len(record.values),
            "first_day": str(record.days[0]),
            "last_day": str(record.days[-1]),
            "first_test_future": str(record.days[starts["test"][0] + self.context_length]),
            "step": record.step,
            "unit": record.unit,
            "period": record.period,
            "num_windows": num_windows,
            "num_train": len(starts["train"]),
            "num_test": len(starts["test"]),
            "baselines": self.baselines(record, signal, starts["test"]),
        }
        write_json(folder / OPTIONS, asdict(self))
        write_json(folder / DESCRIPTION, description)
        return files

    def split(self, num_windows: int, num_samples: int, rng: np.random.Generator) -> dict[str, NDArray[np.intp]]:
        """Draw the first steps of the windows of each split, sorted; the last test_share of all are for the test."""
        num_drawn = min(num_samples, num_windows)
        if num_drawn < 2:
            raise UsageError(
                f"two splits need 2 windows or more: the source '{self.source}' has {num_windows} with a context of "
                f"{self.context_length} and {self.num_steps} steps ahead, and {num_samples} are asked for",
                hint="give a larger --num-samples, or smaller context_length and horizons",
            )
        num_test = strata.num_held_out(self.test_share, num_drawn)
        num_last = strata.num_held_out(self.test_share, num_windows)
        first_test = num_windows - num_last + self.num_steps - 1
        return {
            "train": np.sort(rng.choice(num_windows - num_last, num_drawn - num_test, replace=False)),
            "test": first_test + np.sort(rng.choice(num_last, num_test, replace=False)),
        }

    def windows(self, values: NDArray[np.float64], start: NDArray[np.intp]) -> dict[str, NDArray[Any]]:
        """Cut `context` [N,C] and `future` [N,H] out of values [T], from the steps start [N] on."""
        whole = sliding_window_view(values, self.context_length + self.num_steps)[start].astype(np.float32)
        return {"context": whole[:, : self.context_length], "future": whole[:, self.context_length :]}

    def synthetic(self, seed: int, num_values: int) -> tuple[Record, NDArray[np.float64]]:
        """Return a series, a value a day, and its signal [T]: all of it but the noise. A longer one begins alike."""
        harmonics = np.arange(1, min(3, self.period // 2) + 1)
        phases = np.random.default_rng([seed, 0]).uniform(0, 2 * np.pi, len(harmonics))
        turns = np.arange(self.period)[:, None] * harmonics / self.period
        season = (np.sin(2 * np.pi * turns + phases) / harmonics).sum(axis=1)
        steps = np.arange(num_values)
        signal = self.trend * steps + self.amplitude * season[steps % self.period] / season.std()
        values = signal + self.noise * np.random.default_rng([seed, 1]).standard_normal(num_values)
        return Record(values, steps.astype("datetime64[D]"), self.period, "day", "1", "synthetic"), signal

    def baselines(
        self, record: Record, signal: NDArray[np.float64] | None, start: NDArray[np.intp]
    ) -> dict[str, list[dict[str, Any]] | None]:
        """Return the errors by horizon of forecasts without a model, and of the signal, from the steps start [N] on.

        The seasonal forecast is None where the context holds no whole season.
        """
        tensors = self.windows(record.values, start)
        context, future = tensors["context"], tensors["future"]
        forecasts: dict[str, NDArray[Any] | None] = {
            "naive": naive(context, self.num_steps),
            "seasonal_naive": None,
        }
        if record.period <= self.context_length:
            forecasts["seasonal_naive"] = seasonal_naive(context, self.num_steps, record.period)
        if signal is not None:
            forecasts["optimum"] = self.windows(signal, start)["future"]
        return {
            name: None if forecast is None else [asdict(row) for row in errors(forecast, future, self.horizons)]
            for name, forecast in forecasts.items()
        }
