"""`pikv simulate-cache`: replay a request log over prefix blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pikv_cli import options, output


@options.verb
def simulate_cache(
    shared: options.Shared,
    trace: Annotated[str | None, typer.Argument(help="A request log (mooncake jsonl), or - for stdin.")] = None,
    policy: Annotated[str | None, typer.Option(metavar="A,B", help="Policies to replay.")] = None,
    capacity: Annotated[str | None, typer.Option(metavar="N,M", help="Capacities in blocks.")] = None,
    curve: Annotated[bool | None, typer.Option("--curve", help="Exact hits of every capacity in one pass.")] = None,
    semantics: Annotated[str | None, typer.Option(metavar="prefix|object", help="What counts as a hit.")] = None,
    touch: Annotated[str | None, typer.Option(metavar="reverse|forward", help="Order of touching blocks.")] = None,
) -> None:
    """Replay a log of serving requests: block hits by policy and capacity, or the whole curve at once."""
    flags = {
        "trace": trace,
        "policies": options.listed(policy),
        "capacities": options.listed(capacity),
        "curve": curve,
        "semantics": semantics,
        "touch": touch,
    }
    shared.run("simulate-cache", flags, _show)


def _show(result: Any, folder: Path) -> None:
    columns = [
        "policy",
        "touch",
        "capacity_blocks",
        "block_hits",
        "block_accesses",
        "block_hit_ratio",
        "token_hit_ratio",
        "evictions",
        "requests_larger_than_cache",
    ]
    title = (
        f"{result.trace}: {result.semantics} hits, blocks of {result.block_tokens} tokens, "
        f"ceiling {result.ceiling_hits:,} ({result.ceiling_hit_ratio:.4f})"
    )
    output.print_table(title, columns, result.results)
    if result.curve is not None:
        points = [dict(zip(result.curve, point)) for point in zip(*result.curve.values())]
        output.print_table(f"curve: lru, {result.touch} touch", list(result.curve), points)
        typer.echo(f"every capacity: {folder / 'curve.npz'}\npicture: {folder / 'curve.png'}", err=True)
    typer.echo(f"details: {folder}", err=True)
