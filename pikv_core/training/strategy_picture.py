"""The picture of what routers over strategies choose: layer by prompt, coloured by strategy."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from torch import Tensor

WIDTH, HEIGHT, DPI = 1200, 420, 100  # pixels, and those of an inch


def draw_choices(weights: Tensor, names: Sequence[str], strategies: Sequence[str]) -> bytes:
    """Return a PNG of the strategy that weighs most in each layer for each prompt.

    weights: [L,N,E] of E strategies. names: of the N prompts' kinds; prompts of one kind are put side by side.
    """
    from matplotlib import colormaps
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.figure import Figure

    E = len(strategies)
    order = sorted(range(len(names)), key=lambda prompt: list(dict.fromkeys(names)).index(names[prompt]))
    kinds = list(dict.fromkeys(names[prompt] for prompt in order))
    ends = np.cumsum([names.count(kind) for kind in kinds])
    colours = ListedColormap([colormaps["tab10" if E <= 10 else "tab20"](strategy) for strategy in range(E)])
    figure = Figure(figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(
        weights.argmax(dim=-1)[:, order].numpy(),
        aspect="auto",
        interpolation="nearest",
        cmap=colours,
        norm=BoundaryNorm(np.arange(E + 1) - 0.5, E),
    )
    axes.vlines(ends[:-1] - 0.5, -0.5, len(weights) - 0.5, colors="white", linewidths=2)
    axes.set_xticks(ends - np.diff(ends, prepend=0) / 2 - 0.5, kinds, fontsize=7)
    axes.set_yticks(range(len(weights)))
    axes.set(xlabel="prompts", ylabel="layer")
    figure.colorbar(picture, ticks=range(E)).ax.set_yticklabels(strategies, fontsize=8)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()
