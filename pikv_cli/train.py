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
    if resume is not None:
        _check(resume, shared)
    shared.run("train", {}, _show, resume)


def _check(resume: Path, shared: options.Shared) -> None:
    from pikv_core.errors import UsageError

    if not (resume / "recipe.yaml").is_file():
        raise UsageError(
            f"{resume}: no run to go on with: it has no recipe.yaml",
            hint="give the run folder, such as runs/train-1",
        )
    if shared.seed is not None or shared.dtype is not None:
        raise UsageError("--resume takes the run's own recipe", hint="drop --seed and --dtype")


def _show(result: Any, folder: Path) -> None:
    rows = [{"metric": name, "value": value} for name, value in result.metrics.items()]
    output.print_table(
        f"{folder}: {result.num_steps} steps, {result.tokens_per_s:.0f} tokens/s", ["metric", "value"], rows
    )
    typer.echo(f"model: {result.model}")
