"""Forecasts of a series at every horizon, as Time-MoE (2409.16040) trains; held-out errors beside those of no model.

Letters: B samples, L values of a sample, C of them context.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pikv_core.data.naive import errors, naive, seasonal_naive
from pikv_core.data.series_source import Windows
from pikv_core.errors import PiKVError
from pikv_core.schema import TrainSettings
from pikv_core.training.gates import Gates, load_statistics
from pikv_core.training.hardware import Hardware
from pikv_core.training.lessons import LESSONS
from pikv_core.training.lessons.base import Lesson, Step, epoch_rows, slices, to_device

WINDOWS_AT_A_TIME = 256


@dataclass(frozen=True)
class SeriesBatch:
    """values [B, L] and when they are [B, L], in steps; the first context_length are what is normalised by."""

    values: np.ndarray
    times: np.ndarray
    context_length: int


@LESSONS.register("forecast")
class Forecast(Lesson):
    """Predict all horizons after every value; of a longer window than asked for, a part that begins anywhere."""

    head = "time-series"

    def __init__(self, source: Any, settings: TrainSettings):
        super().__init__(source, settings)
        self._values_each(settings.curriculum[-1])

    @property
    def model_options(self) -> dict[str, Any]:
        task, period = self.source.task, self.source.period
        anchor = "last" if task.anchor == "season" and period is None else task.anchor
        horizons = sorted(task.horizons)
        return {"vocab_size": 0, "horizons": horizons, "anchor": anchor, "season_length": period}

    def batch(self, seed: int, step: int, length: int) -> SeriesBatch:
        task, windows = self.source.task, self.source.train
        length, whole = self._values_each(length), task.context_length + task.num_steps
        rows = epoch_rows(seed, step, max(1, self.settings.batch_tokens // length), len(windows))
        rng = np.random.default_rng([seed, step])
        places = parts(rng, len(rows), length, whole, task.stretch)
        values = interpolate(windows.values[rows], places)
        context = length - task.num_steps
        noise = rng.standard_normal(values.shape, dtype=np.float32)
        values = values + np.float32(task.jitter) * values[:, :context].std(axis=1, keepdims=True) * noise
        context = int(rng.integers(max(2, round(task.shortest_context * context)), context + 1))
        return SeriesBatch(values, windows.start[rows][:, None] + places, context)

    def step(self, model: Any, batch: SeriesBatch) -> Step:
        context = batch.context_length
        outputs = model(
            past_values=to_device(batch.values[:, :context], model),
            past_time=to_device(batch.times[:, :context], model),
            future_values=to_device(batch.values[:, context:], model),
        )
        return Step({name: loss / len(outputs.losses) for name, loss in outputs.losses.items()}, outputs)

    def num_tokens(self, batch: SeriesBatch) -> int:
        return batch.values.size

    @torch.no_grad()
    def evaluate(self, model: Any, gates: Gates, hardware: Hardware) -> dict[str, float]:
        """Return by horizon, the largest first, mse and mae in units of the series, and those of simpler forecasts.

        rolled_mse is that of the head for the smallest horizon alone, rolled on to the largest.
        """
        windows: Windows = self.source.held_out
        gates.reset()
        predictions: dict[int, list[np.ndarray]] = {steps: [] for steps in model.config.horizons}
        for part in slices(len(windows), WINDOWS_AT_A_TIME):
            with hardware.autocast():
                outputs = model(**self._inputs(model, windows[part]))
                gates.losses(outputs)
            for steps, predicted in outputs.predictions.items():
                predictions[steps].append(predicted[:, -1].cpu().numpy())
        load = load_statistics(gates.statistics())
        rolled = []
        for part in slices(len(windows), WINDOWS_AT_A_TIME):
            with hardware.autocast():
                inputs = self._inputs(model, windows[part])
                horizons = [min(model.config.horizons)]
                rolled.append(model.forecast(**inputs, num_steps=max(predictions), horizons=horizons).cpu().numpy())
        forecasts = {steps: np.concatenate(predicted) for steps, predicted in predictions.items()}
        return self._measure(forecasts, np.concatenate(rolled)) | load

    def _measure(self, forecasts: dict[int, np.ndarray], rolled: np.ndarray) -> dict[str, float]:
        windows, period, optimum = self.source.held_out, self.source.period, self.source.optimum
        metrics: dict[str, float] = {}
        for steps in sorted(forecasts, reverse=True):
            future = windows.future[:, :steps]

            def error(forecast: np.ndarray, future: np.ndarray = future) -> Any:
                return errors(forecast, future, [future.shape[1]])[0]

            own = error(forecasts[steps])
            metrics |= {f"mse_{steps}": own.mse, f"mae_{steps}": own.mae}
            if steps == rolled.shape[1]:
                metrics[f"rolled_mse_{steps}"] = error(rolled).mse
            metrics[f"naive_mse_{steps}"] = error(naive(windows.context, steps)).mse
            if period is not None:
                seasonal = error(seasonal_naive(windows.context, steps, period)).mse
                metrics[f"seasonal_mse_{steps}"] = seasonal
                if seasonal:
                    metrics[f"skill_seasonal_{steps}"] = 1 - own.mse / seasonal
            if optimum is not None:
                metrics[f"optimum_mse_{steps}"] = optimum[steps]
        return metrics

    def _values_each(self, length: int) -> int:
        """Return the values of a sample of at most `length`, or raise PiKVError where they hold no context."""
        task = self.source.task
        whole = task.context_length + task.num_steps
        if length < task.num_steps + 2 or whole < task.num_steps + 2:
            raise PiKVError(
                f"length {min(length, whole)} is too short for {task.num_steps} steps ahead and 2 values before them",
                hint=f"set train.curriculum: [{max(2, task.context_length) + task.num_steps}]",
            )
        return min(length, whole)

    def _inputs(self, model: Any, windows: Windows) -> dict[str, Any]:
        times = to_device(windows.context_times, model)
        return {"past_values": to_device(windows.context, model), "past_time": times}


def parts(rng: np.random.Generator, num_samples: int, length: int, whole: int, stretch: float) -> np.ndarray:
    """Draw places [B, L] in windows of `whole` values, evenly spaced, by exp(-stretch) to exp(stretch) at random."""
    spacing = np.minimum(np.exp(rng.uniform(-stretch, stretch, num_samples)), (whole - 1) / (length - 1))
    room = whole - 1 - spacing * (length - 1)
    first = rng.uniform(size=num_samples) * room if stretch else rng.integers(0, whole - length + 1, num_samples)
    return first[:, None] + spacing[:, None] * np.arange(length)


def interpolate(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Return the values [B, W] at places [B, L] between 0 and W - 1, along straight lines."""
    left = np.clip(places.astype(np.int64), 0, values.shape[1] - 2)
    share = (places - left).astype(np.float32)
    before, after = (np.take_along_axis(values, at, axis=1) for at in (left, left + 1))
    return before + share * (after - before)
