"""`pikv gen-data`: write the data of one task, seeded, with a manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pikv_cli import options, output


@options.verb
def gen_data(
    shared: options.Shared,
    task: Annotated[
        str | None,
        typer.Argument(help="attention, classification, qa, recall, requests, ruler, series, text or vision."),
    ] = None,
    text: options.TextPaths = (),  # type: ignore[assignment]
    column: Annotated[
        str | None, typer.Option(metavar="NAME", help="The text column of jsonl and parquet files.")
    ] = None,
    filler: Annotated[
        str | None,
        typer.Option(metavar="synthetic|text|noise", help="Around needles: recall synthetic|text, ruler text|noise."),
    ] = None,
    num_samples: Annotated[
        int | None, typer.Option(help="Samples, splits together; of text, documents at most.")
    ] = None,
) -> None:
    """Write a task's data: samples in a train and a test split, tokenizer, manifest with sha256."""
    flags = {
        "task": task,
        "task.filler": filler,
        "text": list(text),
        "column": column,
        "num_samples": num_samples,
    }
    shared.run("gen-data", flags, _show)


def _show(result: Any, folder: Path) -> None:
    output.print_table(f"{result.task}: {folder}", ["file", "num_samples", "num_bytes", "sha256"], result.files)
