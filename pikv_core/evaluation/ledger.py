"""The finished cells of a sweep on disk: a line of JSON each, appended when it is finished, one file a rank."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from pikv_core.errors import PiKVError
from pikv_core.evaluation.row import Row, Skipped
from pikv_core.files import write_text
from pikv_core.runs import plain

RESULTS = "results.jsonl"


class Ledger:
    """results.jsonl of rank 0, results.1.jsonl and so on of the others."""

    def __init__(self, folder: Path, rank: int = 0):
        self.folder = folder
        self._own = folder / (RESULTS if rank == 0 else f"results.{rank}.jsonl")

    def append(self, entry: Row | Skipped) -> None:
        """Write down one cell."""
        with self._own.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(plain(entry), allow_nan=False) + "\n")

    def read(self) -> dict[str, Row | Skipped]:
        """Return what all ranks wrote, by key; a last line that was cut off while it was written counts for nothing."""
        entries: dict[str, Row | Skipped] = {}
        for file in self._files():
            lines = file.read_text(encoding="utf-8").split("\n")
            for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is cut off, or nothing
                entry = _entry(line, f"{file}:{number}")
                entries[entry.key] = entry
        return entries

    def rewrite(self, entries: Iterable[Row | Skipped]) -> None:
        """Replace all files by one results.jsonl."""
        write_text(self.folder / RESULTS, "".join(json.dumps(plain(entry)) + "\n" for entry in entries))
        for file in self._files():
            if file.name != RESULTS:
                file.unlink()

    def _files(self) -> list[Path]:
        return sorted([*self.folder.glob("results.*.jsonl"), *self.folder.glob(RESULTS)])


def _entry(line: str, where: str) -> Row | Skipped:
    try:
        values = json.loads(line)
        return Skipped(**values) if "reason" in values else Row(**values)
    except (ValueError, TypeError) as error:
        raise PiKVError(
            f"{where}: not a row of this sweep: {error}", hint="delete the line: its cell is then measured again"
        ) from error
