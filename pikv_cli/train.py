"""`pikv train`: train a model, go on where a run was interrupted, fit a policy to a model, or export it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pikv_cli import options, output


@options.verb
def train(
    shared: options.Shared,
    start: Annotated[
        str | None, typer.Option(metavar="DIR", help="The trained model, to fit a policy to or to export.")
    ] = None,
    export_only: Annotated[
        bool, typer.Option("--export-only", help="Train nothing: tell the model of --start in the architecture --to.")
    ] = False,
    to: Annotated[
        str | None, typer.Option(metavar="mixtral|qwen3_moe|llama|pikv", help="The architecture of an export.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="Go on with this run, exactly.")] = None,
) -> None:
    """Train a model into a folder that AutoModelForCausalLM loads, fit a policy to one, or export it."""
    from pikv_core.errors import UsageError

    if export_only != (to is not None):
        raise UsageError(
            "--export-only and --to go together", hint="for example `pikv train --export-only --to mixtral --start RUN`"
        )
    if resume is not None:
        _check(resume, shared, start, export_only)
    name = "export" if export_only and shared.recipe is None else None
    shared.run("train", {"start": start, "export.to": to, "name": name}, _show, resume)


def _check(resume: Path, shared: options.Shared, start: str | None, export_only: bool) -> None:
    from pikv_core.errors import UsageError

    if not (resume / "recipe.yaml").is_file():
        raise UsageError(
            f"{resume}: no run to go on with: it has no recipe.yaml",
            hint="give the run folder, such as runs/train-1",
        )
    if shared.seed is not None or shared.dtype is not None or start is not None or export_only:
        raise UsageError("--resume takes the run's own recipe", hint="drop --seed, --dtype, --start and --export-only")


def _show(result: Any, folder: Path) -> None:
    from pikv_core.jobs.duo_gates import DuoGatesResult
    from pikv_core.jobs.export import ExportResult
    from pikv_core.jobs.policy_router import PolicyRouterResult
    from pikv_core.jobs.train import TrainResult

    if isinstance(result, ExportResult):
        typer.echo(
            f"model: {result.model}, {result.architecture}, {result.num_weights:,} weights, {result.dtype}, "
            f"{result.weights_bytes:,} bytes; logits differ by {result.max_logit_difference:.1e} at most"
        )
        return
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
    if isinstance(result, PolicyRouterResult):
        layers = [
            {"layer": layer, **dict(zip(result.strategies, (f"{share:.2f}" for share in shares)))}
            for layer, shares in enumerate(result.usage)
        ]
        output.print_table("how often each layer takes a strategy", list(layers[0]), layers)
    if not isinstance(result, TrainResult):
        typer.echo(f"calibration: {result.calibration}")
    else:
        typer.echo(f"model: {result.model}")
        if result.adapter is not None:
            learned = f"{result.num_trainable:,} of {result.num_weights:,} weights"
            typer.echo(f"adapter: {result.adapter}, {result.adapter_bytes:,} bytes, {learned}")
