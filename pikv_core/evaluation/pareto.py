"""The picture of a sweep: each quality against the share of bytes that stays resident, and the frontier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pikv_core.evaluation.row import Row
from pikv_core.evaluation.target import SMALLER_IS_BETTER
from pikv_core.files import replacing

MARKS = "os^vDP<>X"
LEGEND_WIDTH = 2.4  # inches a column


def frontier(points: Sequence[tuple[float, float]], better: Callable[[float, float], bool]) -> list[int]:
    """Return the indices of points (bytes, quality) that no point with at most their bytes betters, by bytes."""
    kept: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: points[i][0]):
        if kept and not better(points[index][1], points[kept[-1]][1]):
            continue
        if kept and points[index][0] == points[kept[-1]][0]:
            kept.pop()
        kept.append(index)
    return kept


def draw(rows: Sequence[Row], perplexity_of: str, path: Path) -> None:
    """Draw every measured quality over the share of bytes, one line a method, to a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    qualities = [name for name in SMALLER_IS_BETTER if any(getattr(row, name) is not None for row in rows)]
    panels, columns = max(1, len(qualities)), legend_columns(len({row.method for row in rows}), 22)
    size = (5 * panels + LEGEND_WIDTH * columns, 4.4)
    figure, axes = pyplot.subplots(1, panels, figsize=size, layout="constrained", squeeze=False)
    for axis, name in zip(axes[0], qualities):
        _panel(axis, rows, name)
        axis.set_title(f"perplexity of {perplexity_of}" if name == "perplexity" else name, fontsize=10)
    lines, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside right upper", fontsize=8, ncols=columns)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=140, format="png")
    pyplot.close(figure)


def style(index: int) -> dict[str, Any]:
    """Return colour and mark of the method of that number; they repeat after 90."""
    return {"color": f"C{index % 10}", "marker": MARKS[index % len(MARKS)], "markersize": 4.5}


def legend_columns(num_methods: int, num_lines: int) -> int:
    """Return how many columns a legend takes in a picture as high as `num_lines` of it."""
    return 1 + num_methods // num_lines


def _panel(axis: Any, rows: Sequence[Row], name: str) -> None:
    measured = [row for row in rows if getattr(row, name) is not None]
    for index, method in enumerate(dict.fromkeys(row.method for row in rows)):
        own = sorted((row for row in measured if row.method == method), key=lambda row: row.share)
        axis.plot([r.share for r in own], [getattr(r, name) for r in own], lw=1, label=method, **style(index))
    points = [(row.share, getattr(row, name)) for row in measured]
    best = frontier(points, (lambda new, old: new < old) if SMALLER_IS_BETTER[name] else (lambda new, old: new > old))
    axis.plot([points[i][0] for i in best], [points[i][1] for i in best], color="0.8", lw=4, zorder=0, label="frontier")
    axis.set_xlabel("resident bytes / bytes of the full cache")
    axis.grid(alpha=0.3)
    if name == "perplexity":
        axis.set_yscale("log")
