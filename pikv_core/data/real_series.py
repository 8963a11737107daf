"""Time series that come inside statsmodels, as plain arrays."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pikv_core.data import extra


@dataclass(frozen=True)
class Record:
    """A whole series: values [T] and the day of each [T], the steps of a season, and what it is."""

    values: NDArray[np.float64]
    days: NDArray[np.datetime64]
    period: int
    step: str
    unit: str
    source: str


def read(name: str) -> Record:
    """Read the series `name` of READERS, or raise PiKVError where statsmodels is not installed."""
    datasets = extra.module("statsmodels.datasets", "statsmodels", name)
    return READERS[name](datasets)


def _co2_weekly(datasets: Any) -> Record:
    """Return the weekly values; the gaps, 59 weeks of which the last is in 1985, are filled along straight lines."""
    table = datasets.co2.load_pandas().data
    days, values = table.index.to_numpy().astype("datetime64[D]"), table["co2"].to_numpy()
    known = ~np.isnan(values)
    filled = np.interp(days.astype(int), days[known].astype(int), values[known])
    return Record(filled, days, 52, "week", "ppm", _told("co2"))


def _co2(datasets: Any) -> Record:
    weekly = _co2_weekly(datasets)
    months, month = np.unique(weekly.days.astype("datetime64[M]"), return_inverse=True)
    means = np.bincount(month, weekly.values) / np.bincount(month)
    return Record(means, months.astype("datetime64[D]"), 12, "month", "ppm", _told("co2"))


def _sunspots(datasets: Any) -> Record:
    """Return the yearly numbers; the Sun's cycle is 11 years on average, and varies from 9 to 14."""
    table = datasets.sunspots.load_pandas().data
    years = (table["YEAR"].to_numpy().astype(int) - 1970).astype("datetime64[Y]")
    return Record(
        table["SUNACTIVITY"].to_numpy(), years.astype("datetime64[D]"), 11, "year", "sunspots", _told("sunspots")
    )


def _elnino(datasets: Any) -> Record:
    table = datasets.elnino.load_pandas().data
    first = int(table["YEAR"].iloc[0])
    values = table.drop(columns="YEAR").to_numpy().ravel()
    months = np.datetime64(f"{first}-01", "M") + np.arange(len(values))
    return Record(values, months.astype("datetime64[D]"), 12, "month", "°C", _told("elnino"))


def _told(name: str) -> str:
    return f"{name} of statsmodels {importlib.metadata.version('statsmodels')}"


READERS: dict[str, Callable[[Any], Record]] = {
    "co2": _co2,
    "co2-weekly": _co2_weekly,
    "sunspots": _sunspots,
    "elnino": _elnino,
}
