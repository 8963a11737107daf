"""`pikv train`: train a model from a recipe, or go on where a run was interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pikv_cli import options, output


@options.verb
def train(
    shared: options.Shared,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="Go on with this run, exactly.")] = None,
) -> None:
    """Train a model; the result is a folder that AutoModelForCausalLM loads."""
    shared.run("train", {}, _show, resume)


def _show(result: Any, folder: Path) -> None:
    rows = [{"metric": name, "value": value} for name, value in result.metrics.items()]
    output.print_table(
        f"{folder}: {result.num_steps} steps, {result.tokens_per_s:.0f} tokens/s", ["metric", "value"], rows
    )
    typer.echo(f"model: {result.model}")
