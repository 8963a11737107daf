"""What is logged of a model's routers, and the pictures of their load over time."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from pikv_core.telemetry import Telemetry
from pikv_core.training.gates import LayerStatistics

# In metrics.jsonl alone: the choices of every expert [layers, experts], and, where ranks share a layer's experts, the
# rows of every slot [layers, ranks, slots].
TOKENS, RANKS = "router/expert_tokens", "router/rank_tokens"
SCALARS = (
    "load_max_over_mean",
    "load_cv",
    "router_entropy",
    "dropped_tokens",
    "expert_hit_rate",
    "rank_load_max_over_mean",
)


def router_values(layers: list[LayerStatistics]) -> dict[str, Any]:
    """Return the numbers of every layer by tag, and the tokens of every expert; nothing of a dense model."""
    if not layers:
        return {}
    values: dict[str, Any] = {TOKENS: [layer["expert_tokens"] for layer in layers]}
    if "rank_tokens" in layers[0]:
        values[RANKS] = [layer["rank_tokens"] for layer in layers]
    for number, layer in enumerate(layers):
        values |= {f"router/{name}/layer_{number}": layer[name] for name in SCALARS if layer.get(name) is not None}
    return values


def draw_load(telemetry: Telemetry) -> None:
    """Log a picture for each layer: the share of every expert, over what metrics.jsonl has of the run.

    Another one shows that of every rank, where ranks shared the experts.
    """
    steps, tokens = read_load(telemetry.folder / "metrics.jsonl")
    if steps:
        _draw(telemetry, "load", "expert", steps, tokens)
    steps, rows = read_load(telemetry.folder / "metrics.jsonl", RANKS)
    if steps:
        _draw(telemetry, "rank_load", "rank", steps, rows)


def _draw(telemetry: Telemetry, tag: str, of: str, steps: list[int], tokens: np.ndarray) -> None:
    from matplotlib.figure import Figure

    shares_SLE = tokens / np.maximum(tokens.sum(-1, keepdims=True), 1)
    for layer in range(shares_SLE.shape[1]):
        figure = Figure(figsize=(6, 2.5), dpi=100, layout="constrained")
        axes = figure.subplots()
        picture = axes.imshow(shares_SLE[:, layer].T, aspect="auto", interpolation="nearest", vmin=0)
        ticks = np.unique(np.linspace(0, len(steps) - 1, 6).round().astype(int))
        axes.set_xticks(ticks, [str(steps[tick]) for tick in ticks])
        axes.set(xlabel="step", ylabel=of, title=f"layer {layer}: share of the choices")
        figure.colorbar(picture)
        png = io.BytesIO()
        figure.savefig(png, format="png")
        telemetry.image(f"router/{tag}/layer_{layer}", png.getvalue(), 600, 250, steps[-1])


def read_load(file: Path, key: str = TOKENS) -> tuple[list[int], np.ndarray]:
    """Return the steps that metrics.jsonl tells a load of, and the tokens [steps, layers, experts or ranks]."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    lines = [line for line in lines if key in line]
    loads = [[[np.sum(one) for one in layer] for layer in line[key]] for line in lines]  # a rank's slots may change
    return [line["step"] for line in lines], np.array(loads)
