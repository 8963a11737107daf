"""The picture of a sweep by layer: what each method loses of the attention output and of the attention mass."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pikv_core.evaluation.pareto import LEGEND_WIDTH, legend_columns, style
from pikv_core.evaluation.row import Row
from pikv_core.files import replacing

PANELS = {
    "attention_error_by_layer": "error of the attention output",
    "attention_mass_by_layer": "share of the attention mass held",
}


def drawn(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that lost something which was measured by layer."""
    return [row for row in rows if row.attention_error_by_layer is not None and row.method != "full"]


def draw_layers(rows: Sequence[Row], path: Path) -> None:
    """Draw both over the layers, one column a budget, one line a method but the full cache, to a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    methods = list(dict.fromkeys(row.method for row in rows))  # with the full cache, so that colours are the frontier's
    rows = drawn(rows)
    budgets = list(dict.fromkeys(row.budget for row in rows))
    columns = legend_columns(len(methods), 33)
    size = (4 * len(budgets) + LEGEND_WIDTH * columns, 6.4)
    figure, axes = pyplot.subplots(2, len(budgets), figsize=size, layout="constrained", squeeze=False)
    for line, (name, title) in enumerate(PANELS.items()):
        for axis, budget in zip(axes[line], budgets):
            for row in rows:
                if row.budget == budget:
                    axis.plot(getattr(row, name), lw=1, label=row.method, **style(methods.index(row.method)))
            axis.set_title(f"{title}, budget {budget}", fontsize=9)
            axis.set_ylim(*((0, None) if name == "attention_error_by_layer" else (None, 1.02)))
            axis.set_xlabel("layer")
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.grid(alpha=0.3)
    handles = {name: line for axis in axes[0] for line, name in zip(*axis.get_legend_handles_labels())}
    figure.legend(list(handles.values()), list(handles), loc="outside right upper", fontsize=8, ncols=columns)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=140, format="png")
    pyplot.close(figure)
