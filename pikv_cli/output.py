"""How results and progress look: tables and JSON on stdout, progress on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from pikv_core.runs import Reporter, plain


def print_json(result: Any) -> None:
    """Print a result as one JSON object on stdout."""
    print(json.dumps(plain(result), indent=2, ensure_ascii=False, allow_nan=False), flush=True)


def print_table(title: str, columns: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Print rows as a table, numbers to the right; columns that no row fills are left out."""
    from rich.console import Console
    from rich.table import Table

    rows = list(rows)
    table = Table(show_edge=False)
    shown = [column for column in columns if any(row.get(column) is not None for row in rows)]
    for column in shown:
        numeric = all(isinstance(row.get(column), int | float | None) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(cell(row.get(column)) for column in shown))
    console = Console()
    if not console.is_terminal:
        console.width = 200
    console.print(title, style="bold", highlight=False, soft_wrap=True)
    console.print(table)


def cell(value: Any) -> str:
    """Return a value as a table cell."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) >= 1000 or 0 < abs(value) < 1e-3 else f"{value:.4f}".rstrip("0").rstrip(".")
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


class Progress(Reporter):
    """Report on stderr: a bar on a terminal, plain lines elsewhere."""

    def __init__(self, quiet: bool = False):
        self._quiet = quiet

    def __enter__(self) -> Progress:
        self._bar: Any = None
        self._task: Any = None
        self._label = ""
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bars

            self._bar = Bars(
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                TimeElapsedColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def status(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def progress(self, text: str, done: float, total: float) -> None:
        if self._bar is None:
            return
        if self._task is None or text.split(":")[0] != self._label:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(text, total=total)
            self._label = text.split(":")[0]
        self._bar.update(self._task, description=text, completed=done, total=total)

    def text(self, piece: str) -> None:
        if not self._quiet:
            print(piece, end="", flush=True)
