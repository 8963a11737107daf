"""TensorBoard event files, written without torch, and metrics.jsonl beside them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any


class Telemetry:
    """Log scalars under `folder/tb`; files appear with the first value."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._events: Any = None

    def scalar(self, tag: str, value: float, step: int = 0) -> None:
        """Log one value; tags carry their unit ("bytes/resident", "ms/token")."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        if self._events is None:
            from tensorboard.summary.writer.event_file_writer import EventFileWriter

            self._events = EventFileWriter(str(self.folder / "tb"))
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=float(value))])
        self._events.add_event(Event(wall_time=time.time(), step=step, summary=summary))

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Append a line to metrics.jsonl and log the same values to TensorBoard."""
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": step, **values}) + "\n")
        for tag, value in values.items():
            self.scalar(tag, value, step)

    def close(self) -> None:
        if self._events is not None:
            self._events.close()
            self._events = None
