"""The picture of a sweep: quality against the share of bytes that stays resident, and the frontier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from pikv_core.evaluation.sweep import Row
from pikv_core.files import replacing


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
    """Draw recall and perplexity over the share of bytes, one mark per row, to a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    panels = [
        ("recall", [row.recall for row in rows], lambda new, old: new > old),
        (f"perplexity of {perplexity_of}", [row.perplexity for row in rows], lambda new, old: new < old),
    ]
    shares = [row.resident_bytes / row.full_bytes for row in rows]
    for axis, (title, quality, better) in zip(axes, panels):
        for name in dict.fromkeys(row.label for row in rows):
            picked = [index for index, row in enumerate(rows) if row.label == name]
            axis.scatter([shares[i] for i in picked], [quality[i] for i in picked], label=name, s=28, zorder=3)
        best = frontier(list(zip(shares, quality)), better)
        axis.plot([shares[i] for i in best], [quality[i] for i in best], color="0.6", lw=1, zorder=1)
        axis.set_xlabel("resident bytes / bytes of the full cache")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    axes[1].set_yscale("log")
    axes[0].legend(fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=140)
    pyplot.close(figure)
