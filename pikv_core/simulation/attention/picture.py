"""The picture of a replay: the attention that each policy keeps, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pikv_core.simulation.attention.measure import Measures

LINES = ("-", "--", "-.", ":")


def draw(rows: Sequence[tuple[str, str]], found: Sequence[Measures], path: Path) -> None:
    """Draw the mean attention recall of each row (policy, budget) over the layers into a PNG.

    A policy has a colour, a budget a line and its bound: the best that its number of tokens could recall.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    policies, budgets = (list(dict.fromkeys(names)) for names in zip(*rows))
    bounded = set()
    for (policy, budget), measures in zip(rows, found):
        recall, bound = (x.mean(axis=(0, 2)) for x in (measures.attention_recall, measures.oracle_recall))
        layers = np.arange(len(recall))
        line = LINES[budgets.index(budget) % len(LINES)]
        color = f"C{policies.index(policy) % 10}"
        axes.plot(layers, recall, line, marker="o", markersize=4, color=color, label=f"{policy}, {budget}")
        if budget not in bounded:
            bounded.add(budget)
            axes.plot(layers, bound, line, color="black", linewidth=1, label=f"bound, {budget}")
    axes.set(xlabel="layer", ylabel="attention recall", ylim=(0, 1.02))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, format="png", dpi=120)
