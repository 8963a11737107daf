"""`pikv compress`: sweep cache methods over budgets on a model, and measure quality, bytes and time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pikv_cli import options, output

COLUMNS = ["policy", "codec", "budget", "resident_bytes", "full_bytes", "share", "perplexity", "recall"]


@options.verb
def compress(
    shared: options.Shared,
    model: Annotated[str | None, typer.Option(metavar="DIR", help="Model or run folder, or a hub id.")] = None,
    method: Annotated[str | None, typer.Option(metavar="A,B+C", help="Policies, codecs, policy+codec.")] = None,
    budget: Annotated[str | None, typer.Option(metavar="0.5,512", help="Shares, tokens or bytes (64MiB).")] = None,
    allocation: Annotated[str | None, typer.Option(help="How the budget is spread over layers.")] = None,
    text: options.TextPaths = (),  # type: ignore[assignment]
    column: Annotated[str | None, typer.Option(help="The text column of jsonl and parquet files.")] = None,
    question: Annotated[str | None, typer.Option(metavar="inside|after", help="Whether policies see it.")] = None,
) -> None:
    """Compare cache methods on a model: perplexity, recall by depth, attention error, bytes, ms per token."""
    flags = {
        "model": model,
        "methods": options.listed(method),
        "budgets": options.listed(budget),
        "allocation": allocation,
        "text": list(text),
        "column": column,
        "question": question,
    }
    shared.run("compress", flags, _show)


def _show(result: Any, folder: Path) -> None:
    rows = [{**row, "share": row["resident_bytes"] / row["full_bytes"]} for row in result.results]
    output.print_table(
        f"{result.model}, question {result.question}", [*COLUMNS, "attention_error", "ms_per_token"], rows
    )
    typer.echo(f"rows: {folder / 'results.jsonl'}\npicture: {folder / 'pareto.png'}", err=True)
