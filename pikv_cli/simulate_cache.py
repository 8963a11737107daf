"""`pikv simulate-cache`: replay a request log over prefix blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pikv_cli import options, output


@options.verb
def simulate_cache(
    shared: options.Shared,
    trace: Annotated[
        str | None, typer.Argument(help="A request log (mooncake jsonl), or - for stdin.")
    ] = None,
    policy: Annotated[str | None, typer.Option(metavar="A,B", help="Policies to replay.")] = None,
    capacity: Annotated[str | None, typer.Option(metavar="N,M", help="Capacities in blocks.")] = None,
    curve: Annotated[
        bool | None, typer.Option("--curve", help="Exact hits of every capacity in one pass.")
    ] = None,
    semantics: Annotated[
        str | None, typer.Option(metavar="prefix|object", help="What counts as a hit.")
    ] = None,
    touch: Annotated[
        str | None, typer.Option(metavar="reverse|forward", help="Order of touching blocks.")
    ] = None,
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
        "capacity_blocks",
        "block_hits",
        "block_accesses",
        "block_hit_ratio",
        "token_hit_ratio",
    ]
    output.print_table(f"{result.trace} ({result.semantics} semantics)", columns, result.results)
    typer.echo(f"details: {folder}", err=True)
