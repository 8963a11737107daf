"""TensorBoard event files, written without torch, and metrics.jsonl beside them."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Telemetry:
    """Log scalars under `folder/tb`; files appear with the first value."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._events: Any = None

    def scalar(self, tag: str, value: float, step: int = 0) -> None:
        """Log one value; tags carry their unit ("bytes/resident", "ms/token")."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._add(Summary(value=[Summary.Value(tag=tag, simple_value=float(value))]), step)

    def _add(self, summary: Any, step: int = 0) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        if self._events is None:
            from tensorboard.summary.writer.event_file_writer import EventFileWriter

            self._events = EventFileWriter(str(self.folder / "tb"))
        self._events.add_event(Event(wall_time=time.time(), step=step, summary=summary))

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl and log its numbers to TensorBoard."""
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": step, **values}) + "\n")
        for tag, value in values.items():
            if isinstance(value, int | float):
                self.scalar(tag, value, step)

    def image(self, tag: str, png: bytes, width: int, height: int, step: int = 0) -> None:
        """Log a picture."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        picture = Summary.Image(encoded_image_string=png, width=width, height=height, colorspace=4)
        self._add(Summary(value=[Summary.Value(tag=tag, image=picture)]), step)

    def hyperparameters(self, recipe: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Log the settings of a run beside its final metrics, for TensorBoard's table of runs."""
        from tensorboard.plugins.hparams import summary_v2

        settings = _by_dotted_key(recipe)
        names, told = map(summary_v2.HParam, settings), map(summary_v2.Metric, metrics)
        self._add(summary_v2.hparams_config_pb(list(names), list(told)))
        self._add(summary_v2.hparams_pb(settings))
        for tag, value in metrics.items():
            self.scalar(tag, value)

    def close(self) -> None:
        if self._events is not None:
            self._events.close()
            self._events = None


def _by_dotted_key(tree: Mapping[str, Any], above: str = "") -> dict[str, str | float | bool]:
    """Return the settings of a tree; what is neither number nor text is told as text, and nothing of what is None."""
    found: dict[str, str | float | bool] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            found |= _by_dotted_key(value, f"{above}{name}.")
        elif value is not None:
            found[above + name] = value if isinstance(value, int | float | str) else str(value)
    return found
