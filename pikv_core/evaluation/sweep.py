"""The sweep: cell by cell, written down as each is finished, with the time that is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from pikv_core.errors import PiKVError
from pikv_core.evaluation.cells import Cell
from pikv_core.evaluation.ledger import Ledger
from pikv_core.evaluation.ranks import Ranks
from pikv_core.evaluation.row import Row, Skipped
from pikv_core.runs import Reporter


def sweep(
    cells: Sequence[Cell], measure: Callable[[Cell], Row], ledger: Ledger, ranks: Ranks, reporter: Reporter
) -> Iterator[Row | Skipped]:
    """Measure the cells that fall to this rank, write each into the ledger and yield it.

    A method that refuses a cell is skipped, with its reason; what fails with the full cache fails.
    """
    spent: list[float] = []
    for index in ranks.take(len(cells)):
        cell = cells[index]
        left = _time_left(spent, len(cells) - index, ranks.count)
        reporter.progress(f"sweep: {cell}{left}", index, len(cells))
        start = time.perf_counter()
        entry = _attempt(cell, measure)
        spent.append(time.perf_counter() - start)
        ledger.append(entry)
        left = _time_left(spent, len(cells) - index - 1, ranks.count)
        reporter.status(f"{_told(entry)} ({index + 1} of {len(cells)}{left})")
        yield entry


def _attempt(cell: Cell, measure: Callable[[Cell], Row]) -> Row | Skipped:
    try:
        return measure(cell)
    except PiKVError as error:
        if cell.is_full:
            raise
        return Skipped(cell.key, cell.label, cell.cache.budget, error.message, error.hint)


def _told(entry: Row | Skipped) -> str:
    if isinstance(entry, Skipped):
        return f"{entry.method} at {entry.budget}: skipped: {entry.reason}"
    parts = [f"{entry.share:.3f} of the bytes"]
    for name in ("recall", "perplexity", "agreement", "ruler"):
        if (value := getattr(entry, name)) is not None:
            parts.append(f"{name} {value:.4g}" if name == "perplexity" else f"{name} {value:.3f}")
    return f"{entry.method} at {entry.budget}: {', '.join(parts)}, {entry.ms_per_token:.2f} ms/token"


def _time_left(spent: Sequence[float], num_cells: int, num_ranks: int) -> str:
    """Tell the time that `num_cells` more cells take, as long as those before, or nothing."""
    if not spent or num_cells < 1:
        return ""
    seconds = sum(spent) / len(spent) * num_cells / num_ranks
    return f", about {seconds / 60:.0f} min left" if seconds >= 90 else f", about {seconds:.0f} s left"
