"""The pictures of a replay: hit ratios over capacity, reuse, hits over time, times to first token, traffic of tiers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pikv_core.files import replacing
from pikv_core.simulation.diagnostics import HitsOverTime, Reuse

LINES = ("-", "--", "-.", ":")  # with matplotlib's ten colours: forty series that differ
SHOWN_BELOW = 10  # how far below the least capacity asked for a curve is drawn, as a factor
LEAST_SHARE = 0.02  # of requests: those served sooner do not stretch the axis of times


@contextmanager
def picture(path: Path, panels: int = 1) -> Iterator[list[Any]]:
    """Yield the axes of so many panels, one above the other, and write them into a PNG, whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1 + 3.5 * panels), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(np.atleast_1d(figure.subplots(panels)))
    yield axes
    for each in axes:
        each.grid(alpha=0.3)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def draw_hit_ratios(
    rows: Sequence[Mapping[str, Any]], curve: Mapping[str, NDArray[Any]], ceiling: float, path: Path
) -> None:
    """Draw block hit ratio over capacity (blocks, log scale), a line for each policy, with the ceiling.

    curve: lru's at every capacity, where it was made: `capacity_blocks` and `block_hit_ratio`. The legend names the
    lines from the top of the picture to its bottom.
    """
    with picture(path) as (axes,):
        if curve and curve["capacity_blocks"].size > 1:
            shown = np.unique(np.geomspace(1, curve["capacity_blocks"].size - 1, 2000).astype(np.int64))
            axes.plot(
                curve["capacity_blocks"][shown],
                curve["block_hit_ratio"][shown],
                color="0.6",
                label="lru, every capacity",
            )
        axes.axhline(ceiling, color="black", linewidth=1, linestyle=":", label="ceiling (infinite cache)")
        points = _points(rows)
        numbers = {policy: number for number, policy in enumerate(points)}
        for policy in sorted(points, key=lambda policy: -np.mean(points[policy][1])):
            axes.plot(*points[policy], marker="o", markersize=4, label=policy, **_style(numbers[policy]))
        axes.set(xscale="log", xlabel="capacity (blocks)", ylabel="block hit ratio")
        axes.set_xlim(left=min(row["capacity_blocks"] for row in rows) / SHOWN_BELOW)
        axes.set_ylim(bottom=0)
        _legend(axes)


def draw_reuse(reuse: Reuse, path: Path) -> None:
    """Draw how far apart accesses to a block are, in distinct blocks and in seconds."""
    with picture(path, panels=2) as axes:
        for panel, histogram, unit, label in (
            (axes[0], reuse.distances_blocks, 1, "reuse distance (distinct blocks)"),
            (axes[1], reuse.times_ms, 1000, "reuse time (s)"),
        ):
            if histogram.counts:
                panel.stairs(histogram.counts, np.array(histogram.edges) / unit, fill=True, alpha=0.6)
                panel.set_xscale("log")
            panel.set(xlabel=label, ylabel="accesses")
            panel.yaxis.set_major_formatter("{x:,.0f}")


def draw_over_time(replays: Mapping[str, HitsOverTime], title: str, path: Path) -> None:
    """Draw hit ratios over the time of the trace, by label; a stretch without accesses is a gap."""
    with picture(path) as (axes,):
        for number, (label, found) in enumerate(replays.items()):
            ratios = [np.nan if ratio is None else ratio for ratio in found.hit_ratios]
            axes.plot(found.begins_s, ratios, label=label, **_style(number))
        axes.set(title=title, xlabel="time of the trace (s)", ylabel="block hit ratio")
        axes.set_ylim(bottom=0)
        _legend(axes)


def draw_ttft(times_s: Mapping[str, NDArray[np.float64]], slo_s: float | None, title: str, path: Path) -> None:
    """Draw the share of requests whose first token came within a time, by label."""
    shares = np.linspace(0, 1, 501)
    with picture(path) as (axes,):
        for number, (label, times) in enumerate(times_s.items()):
            axes.plot(np.quantile(times, shares), shares, label=label, **_style(number))
        if slo_s is not None:
            axes.axvline(slo_s, color="black", linewidth=1, linestyle=":", label="slo")
        if any(times.max() > 0 for times in times_s.values()):
            axes.set_xscale("log")
        axes.set(title=title, xlabel="time to first token (s)", ylabel="share of requests")
        least_s = min(float(np.quantile(times, LEAST_SHARE)) for times in times_s.values())
        if least_s > 0:
            axes.set_xlim(left=least_s / 2)
        _legend(axes)


def draw_tiers(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw what each tier served (blocks) and its traffic (GB)."""
    names = [row["tier"] for row in rows]
    with picture(path, panels=2) as (hits, traffic):
        hits.bar(names, [row["block_hits"] for row in rows])
        hits.set(ylabel="blocks served")
        hits.yaxis.set_major_formatter("{x:,.0f}")
        places = np.arange(len(names))
        for shift, kind in ((-0.2, "read"), (0.2, "written")):
            traffic.bar(places + shift, [row[f"bytes_{kind}"] / 1e9 for row in rows], width=0.4, label=kind)
        traffic.set_xticks(places, names)
        traffic.set(ylabel="traffic (GB)")
        traffic.yaxis.set_major_formatter("{x:,.0f}")
        traffic.legend()


def _points(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[list[int], list[float]]]:
    """Return capacities (blocks) and hit ratios by policy, in the order in which policies come."""
    points: dict[str, tuple[list[int], list[float]]] = {}
    for row in sorted(rows, key=lambda row: row["capacity_blocks"]):
        capacities, ratios = points.setdefault(row["policy"], ([], []))
        capacities.append(row["capacity_blocks"])
        ratios.append(row["block_hit_ratio"])
    return {row["policy"]: points[row["policy"]] for row in rows}


def _legend(axes: Any) -> None:
    """Put the legend beside the panel, where it hides no line."""
    axes.legend(fontsize="small", handlelength=3, loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)


def _style(number: int) -> dict[str, Any]:
    return {"color": f"C{number % 10}", "linestyle": LINES[number // 10 % len(LINES)]}
