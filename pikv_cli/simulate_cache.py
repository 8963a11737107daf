"""`pikv simulate-cache`: replay a request log over prefix blocks, or recorded attention over tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pikv_cli import options, output

FOUND = [  # of block policies, of tiers, of token policies: a table leaves out what its rows do not have
    "tier",
    "policy",
    "touch",
    "capacity_blocks",
    "capacity_gib",
    "block_hits",
    "block_hit_ratio",
    "token_hit_ratio",
    "share_of_ceiling",
    "gap_to_optimum",
    "tokens_used",
    "read_gib",
    "written_gib",
    "break_even_tokens",
    "evictions",
    "requests_larger_than_cache",
    "budget",
    "attention_recall",
    "oracle_recall",
    "top_token_hit_ratio",
    "resident_tokens",
    "read_tokens",
    "pages_read",
]
SERVED = [
    "policy",
    "capacity_blocks",
    "ttft_p50_s",
    "ttft_p95_s",
    "ttft_p99_s",
    "slo_share",
    "gpu_s",
    "gpu_s_saved_share",
    "utilisation",
]


@options.verb
def simulate_cache(
    shared: options.Shared,
    trace: Annotated[
        str | None, typer.Argument(help="A request log, plain, .gz or .zst, a folder of sessions, - for stdin.")
    ] = None,
    policy: Annotated[str | None, typer.Option(metavar="A,B", help="Policies to replay; switch:a+b changes.")] = None,
    capacity: Annotated[
        str | None, typer.Option(metavar="N,M", help="Capacities in blocks, or bytes (64GiB) with --kv-model.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="N,M", help="Token budgets: the file is recorded attention.")
    ] = None,
    curve: Annotated[bool | None, typer.Option("--curve", help="Exact hits of every capacity in one pass.")] = None,
    sample: Annotated[float | None, typer.Option(help="Share of blocks to estimate a curve of object hits by.")] = None,
    semantics: Annotated[str | None, typer.Option(metavar="prefix|object", help="What counts as a hit.")] = None,
    touch: Annotated[str | None, typer.Option(metavar="reverse|forward", help="Order of touching blocks.")] = None,
    warm_up: Annotated[float | None, typer.Option(help="Share of requests that is not counted.")] = None,
    full_blocks: Annotated[bool, typer.Option("--full-blocks", help="Leave partly filled blocks out.")] = False,
    interleave: Annotated[
        str | None,
        typer.Option(metavar="absolute|poisson:GAP_S|closed-loop:N", help="How sessions run beside each other."),
    ] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Keep no parsed columns beside the trace.")] = False,
    skip_bad_lines: Annotated[bool | None, typer.Option("--skip-bad-lines", help="Count damaged lines, go on.")] = None,
    diagnostics: Annotated[bool | None, typer.Option("--diagnostics", help="Reuse, and hits by kind and time.")] = None,
    plot: Annotated[bool | None, typer.Option("--plot", help="Draw pictures into the run folder.")] = None,
    per_request: Annotated[str | None, typer.Option(metavar="FILE", help="Parquet or csv, a row a request.")] = None,
    export: Annotated[str | None, typer.Option(metavar="FILE", help="Write the trace as oracleGeneral.")] = None,
    kv_model: Annotated[str | None, typer.Option(help="A config.json, or a known model: bytes and work.")] = None,
    kv_dtype: Annotated[str | None, typer.Option(metavar="bfloat16|float8", help="Of the cached blocks.")] = None,
    hardware: Annotated[str | None, typer.Option(help="A known GPU, or peak_tflops=400,mfu=0.4: times.")] = None,
    servers: Annotated[int | None, typer.Option(help="Prefill servers.")] = None,
    slo: Annotated[float | None, typer.Option(metavar="SECONDS", help="Time to first token to hold.")] = None,
    overlap: Annotated[float | None, typer.Option(help="Share of loading hidden behind computing.")] = None,
    tiers: Annotated[str | None, typer.Option(metavar="FILE", help="Tiers of memory (YAML), top first.")] = None,
) -> None:
    """Replay a log of serving requests under cache policies, or recorded attention under token policies."""
    flags = {
        "trace": trace,
        "policies": options.listed(policy),
        "capacities": options.listed(capacity),
        "budgets": options.listed(budget),
        "curve": curve,
        "sample": sample,
        "semantics": semantics,
        "touch": touch,
        "warm_up": warm_up,
        "partial_blocks": False if full_blocks else None,
        "interleave": interleave,
        "keep_columns": False if no_cache else None,
        "skip_bad_lines": skip_bad_lines,
        "diagnostics": diagnostics,
        "plot": plot,
        "per_request": per_request,
        "export": export,
        "serving.kv_model": kv_model,
        "serving.kv_dtype": kv_dtype,
        "serving.hardware": hardware,
        "serving.servers": servers,
        "serving.slo_s": slo,
        "serving.overlap": overlap,
        "tiers": tiers,
    }
    shared.run("simulate-cache", flags, _show)


def _show(result: Any, folder: Path) -> None:
    if getattr(result, "num_accesses", 1):
        output.print_table(_title(result), FOUND, [_in_gib(row) for row in result.results])
    curve = getattr(result, "curve", None)
    if curve is not None:
        columns = {name: values for name, values in vars(curve).items() if isinstance(values, list)}
        how = "exact" if curve.sampled_blocks is None else f"from {curve.sampled_blocks:,} blocks"
        points = [dict(zip(columns, point)) for point in zip(*columns.values())]
        output.print_table(f"lru at every capacity, {how}", list(columns), points)
        if curve.worthwhile_capacity_blocks is not None:
            typer.echo(f"nine of ten possible hits: {curve.worthwhile_capacity_blocks:,} blocks")
    _show_serving(result)
    for file in sorted([*folder.glob("*.png"), *folder.glob("*.npz"), *folder.glob("diagnostics.json")]):
        typer.echo(str(file), err=True)
    typer.echo(f"details: {folder}", err=True)


def _in_gib(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with its bytes in GiB too, which is what a table has room for."""
    sizes = {"capacity_gib": "capacity_bytes", "read_gib": "bytes_read", "written_gib": "bytes_written"}
    return {**row, **{gib: row[key] / 2**30 for gib, key in sizes.items() if row.get(key) is not None}}


def _title(result: Any) -> str:
    if not hasattr(result, "semantics"):
        recorded = f"{result.recorded_mass:.4f} of the attention recorded, allocation {result.allocation}"
        return f"{result.trace}: {result.num_steps:,} steps after {result.num_prompt_tokens:,} tokens, {recorded}"
    parts = [
        f"{result.semantics} hits",
        f"blocks of {result.block_tokens} tokens",
        f"interleaving {result.interleaving}" if result.interleaving else "",
        f"first {result.warm_up_requests:,} requests not counted" if result.warm_up_requests else "",
        "" if result.partial_block_counts else "full blocks alone",
        f"ceiling {result.ceiling_hits:,} ({result.ceiling_hit_ratio:.4f})",
    ]
    return f"{result.trace}: {', '.join(part for part in parts if part)}"


def _show_serving(result: Any) -> None:
    """Print times and GPU seconds, those without a cache as the first row."""
    rows = [result.serving] if hasattr(result, "serving") else result.results
    if not rows or "gpu_s" not in rows[0]:
        return
    mark = "_without_cache"
    without = {name.replace(mark, ""): value for name, value in rows[0].items() if mark in name}
    shown = [{"policy": "tiers", **row} for row in rows if row.get("policy") != "none"]
    title = f"{result.bill['kv_model']} on {result.bill['servers']} prefill server(s)"
    output.print_table(title, SERVED, [{"policy": "no cache", **without}, *shown])
