"""`pikv train`: train a model from a recipe, go on where a run was interrupted, or learn a model's head gates."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pikv_cli import options, output


@options.verb
def train(
    shared: options.Shared,
    start: Annotated[
        str | None, typer.Option(metavar="DIR", help="The trained model, where a recipe learns head gates.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="Go on with this run, exactly.")] = None,
) -> None:
    """Train a model into a folder that AutoModelForCausalLM loads, or learn what duo-attention needs of one."""
    if resume is not None:
        _check(resume, shared, start)
    shared.run("train", {"start": start}, _show, resume)


def _check(resume: Path, shared: options.Shared, start: str | None) -> None:
    from pikv_core.errors import UsageError

    if not (resume / "recipe.yaml").is_file():
        raise UsageError(
            f"{resume}: no run to go on with: it has no recipe.yaml",
            hint="give the run folder, such as runs/train-1",
        )
    if shared.seed is not None or shared.dtype is not None or start is not None:
        raise UsageError("--resume takes the run's own recipe", hint="drop --seed, --dtype and --start")


def _show(result: Any, folder: Path) -> None:
    from pikv_core.jobs.duo_gates import DuoGatesResult

    rows = [{"metric": name, "value": value} for name, value in result.metrics.items()]
    output.print_table(
        f"{folder}: {result.num_steps} steps, {result.tokens_per_s:.0f} tokens/s", ["metric", "value"], rows
    )
    if isinstance(result, DuoGatesResult):
        gates = [
            {"layer": layer, "gate of each key/value head": "  ".join(f"{gate:.3f}" for gate in heads)}
            for layer, heads in enumerate(result.gates)
        ]
        output.print_table(result.model, list(gates[0]), gates)
        typer.echo(f"calibration: {result.calibration}")
    else:
        typer.echo(f"model: {result.model}")
        if result.adapter is not None:
            learned = f"{result.num_trainable:,} of {result.num_weights:,} weights"
            typer.echo(f"adapter: {result.adapter}, {result.adapter_bytes:,} bytes, {learned}")
