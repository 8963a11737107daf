"""`pikv compress`: sweep cache methods over budgets on a model, and measure quality, bytes and time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pikv_cli import options, output

COLUMNS = ["method", "budget", "resident_bytes", "share", "recall", "±", "perplexity", "agreement", "agreement_kl"]
COLUMNS += ["ruler", "attention_error", "attention_mass", "read_bytes_per_token", "ms_per_token"]


@options.verb
def compress(
    shared: options.Shared,
    model: Annotated[str | None, typer.Option(metavar="DIR", help="Model or run folder, or a hub id.")] = None,
    method: Annotated[
        str | None, typer.Option(metavar="A,B+C@D", help="Policy, codec, both; switch:a+b; @ allocation.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="0.5,512", help="Shares of the tokens, tokens per head, bytes (64MiB).")
    ] = None,
    allocation: Annotated[
        str | None, typer.Option(metavar="A,B", help="How budgets spread, where no @ says it.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(metavar="A,B", help="recall, perplexity, agreement, ruler.")] = None,
    target: Annotated[
        str | None, typer.Option(metavar="recall=0.99", help="Report the fewest bytes that reach it.")
    ] = None,
    calibration: Annotated[
        list[str], typer.Option(metavar="DIR", help="What --calibrate or `pikv train` fitted; repeatable.")
    ] = (),  # type: ignore[assignment]
    backend: options.Backend = None,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Fit the methods' codecs, measure nothing.")] = False,
    save: Annotated[str | None, typer.Option(metavar="DIR", help="Where --calibrate writes.")] = None,
    text: options.TextPaths = (),  # type: ignore[assignment]
    column: Annotated[str | None, typer.Option(help="The text column of jsonl and parquet files.")] = None,
    question: Annotated[
        str | None, typer.Option(metavar="inside|after", help="Compress with the question in sight, or before it.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="Go on with this sweep.")] = None,
) -> None:
    """Compare cache methods on a model: recall, perplexity, agreement, RULER, attention error, bytes, ms per token."""
    conditions = {
        "model": model,
        "methods": options.listed(method),
        "budgets": options.listed(budget),
        "allocations": options.listed(allocation),
        "tasks": options.listed(tasks),
        "calibration": list(calibration),
        "backend": backend,
        "calibrate": calibrate or None,
        "save": save,
        "text": list(text),
        "column": column,
        "question": question,
    }
    if resume is not None:
        _check(resume, shared, conditions)
    shared.run("compress", {**conditions, "target": target}, _show, resume)


def _check(resume: Path, shared: options.Shared, conditions: dict[str, Any]) -> None:
    from pikv_core.errors import UsageError

    if not (resume / "recipe.yaml").is_file():
        raise UsageError(
            f"{resume}: no sweep to go on with: it has no recipe.yaml",
            hint="give the run folder, such as runs/compress-1",
        )
    conditions = {**conditions, "seed": shared.seed, "dtype": shared.dtype, "device": shared.device}
    flags = {"methods": "method", "budgets": "budget", "allocations": "allocation"}
    given = [f"--{flags.get(name, name)}" for name, value in conditions.items() if value not in (None, [])]
    if given:
        raise UsageError(
            f"--resume takes the run's own recipe, so {', '.join(given)} cannot change it",
            hint="start a sweep of its own, or give --resume alone; --target may change",
        )


def _show(result: Any, folder: Path) -> None:
    if hasattr(result, "saved"):
        output.print_table(
            f"{result.saved}: fitted to {result.model} on {result.num_tokens:,} tokens of {result.corpus}",
            ["codec", "bytes_share", "output_error"],
            result.results,
        )
        return
    rows = [
        {**row, "share": row["resident_bytes"] / row["full_bytes"], "±": row["recall_interval"]}
        for row in result.results
    ]
    output.print_table(f"{result.model}, question {result.question}", COLUMNS, rows)
    for entry in result.skipped:
        typer.echo(f"skipped: {entry['method']} at {entry['budget']}: {entry['reason']}")
    if result.target is not None:
        typer.echo(_told(result.target, result.cheapest))
    typer.echo(f"rows: {folder / 'results.jsonl'}\npictures: {folder / 'pareto.png'}, layers.png", err=True)


def _told(target: str, row: dict[str, Any] | None) -> str:
    from pikv_core.evaluation.target import Target

    asked = Target.parse(target)
    if row is None:
        return f"{asked}: no configuration reaches it"
    share = row["resident_bytes"] / row["full_bytes"]
    return (
        f"{asked} at the least bytes: {row['method']} at {row['budget']}, {row['resident_bytes']:,} bytes "
        f"({share:.3f} of the full cache), {asked.quality} {output.cell(row[asked.quality])}"
    )
