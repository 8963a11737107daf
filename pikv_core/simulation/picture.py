"""The picture of the hit curve, with the replayed policies as points on it and around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pikv_core.simulation.curve import Curve


def draw(whole: Curve, rows: list[dict[str, Any]], path: Path) -> None:
    """Draw block hit ratio over capacity (log scale, blocks) into a PNG; rows: those of the replays."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    ratio = whole.block_hits / whole.block_accesses
    capacities = np.unique(np.geomspace(1, ratio.size - 1, 2000).astype(np.int64))
    axes.plot(capacities, ratio[capacities], label=f"lru, {whole.touch} touch, every capacity")
    for policy in dict.fromkeys(row["policy"] for row in rows):
        points = sorted((row["capacity_blocks"], row["block_hit_ratio"]) for row in rows if row["policy"] == policy)
        axes.plot(*zip(*points), "o", markersize=5, label=policy)
    axes.set(xscale="log", xlabel="capacity (blocks)", ylabel="prefix block hit ratio")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png", dpi=120)
