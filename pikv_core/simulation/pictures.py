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


@contextmanager
def picture(path: Path, panels: int = 1) -> Iterator[list[Any]]:
    """Yield the axes of so many panels, one above the other, and write them into a PNG, whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1 + 4 * panels), layout="constrained")
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

    curve: lru's at every capacity, where it was made: `capacity_blocks` and `block_hit_ratio`.
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
        for number, policy in enumerate(dict.fromkeys(row["policy"] for row in rows)):
            points = sorted((row["capacity_blocks"], row["block_hit_ratio"]) for row in rows if row["policy"] == policy)
            axes.plot(*zip(*points), marker="o", markersize=4, label=policy, **_style(number))
        axes.axhline(ceiling, color="black", linewidth=1, linestyle=":", label="ceiling (infinite cache)")
        axes.set(xscale="log", xlabel="capacity (blocks)", ylabel="block hit ratio")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize="small", ncols=2)


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


def draw_over_time(replays: Mapping[str, HitsOverTime], title: str, path: Path) -> None:
    """Draw hit ratios over the time of the trace, by label; a stretch without accesses is a gap."""
    with picture(path) as (axes,):
        for number, (label, found) in enumerate(replays.items()):
            ratios = [np.nan if ratio is None else ratio for ratio in found.hit_ratios]
            axes.plot(found.begins_s, ratios, label=label, **_style(number))
        axes.set(title=title, xlabel="time of the trace (s)", ylabel="block hit ratio")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize="small", ncols=2)


def draw_ttft(times_s: Mapping[str, NDArray[np.float64]], slo_s: float | None, title: str, path: Path) -> None:
    """Draw the share of requests whose first token came within a time, by label."""
    with picture(path) as (axes,):
        for number, (label, times) in enumerate(times_s.items()):
            points = np.quantile(times, np.linspace(0, 1, 501))
            axes.plot(np.maximum(points, 1e-6), np.linspace(0, 1, 501), label=label, **_style(number))
        if slo_s is not None:
            axes.axvline(slo_s, color="black", linewidth=1, linestyle=":", label="slo")
        axes.set(title=title, xscale="log", xlabel="time to first token (s)", ylabel="share of requests")
        axes.legend(fontsize="small", ncols=2)


def draw_tiers(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw what each tier served (blocks) and its traffic (GB)."""
    names = [row["tier"] for row in rows]
    with picture(path, panels=2) as (hits, traffic):
        hits.bar(names, [row["block_hits"] for row in rows])
        hits.set(ylabel="blocks served")
        places = np.arange(len(names))
        for shift, kind in ((-0.2, "read"), (0.2, "written")):
            traffic.bar(places + shift, [row[f"bytes_{kind}"] / 1e9 for row in rows], width=0.4, label=kind)
        traffic.set_xticks(places, names)
        traffic.set(ylabel="traffic (GB)")
        traffic.legend()


def _style(number: int) -> dict[str, Any]:
    return {"color": f"C{number % 10}", "linestyle": LINES[number // 10 % len(LINES)]}
