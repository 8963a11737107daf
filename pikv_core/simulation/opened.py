"""A trace as a study takes it, with everything a hit ratio means nothing without."""

from __future__ import annotations

from dataclasses import dataclass

from pikv_core.errors import UsageError
from pikv_core.runs import Reporter
from pikv_core.schema import SimulateRecipe
from pikv_core.simulation.export import export_oracle_general
from pikv_core.simulation.load import load
from pikv_core.simulation.per_request import check_name
from pikv_core.simulation.replay import Semantics, Touch
from pikv_core.simulation.trace import Trace


@dataclass(frozen=True)
class Conventions:
    """What was counted, and how."""

    trace: str
    format: str
    skipped_lines: int
    interleaving: str | None  # of sessions with clocks of their own
    seed: int
    semantics: Semantics
    touch: Touch  # a row's own `touch` tells the order where a policy needs another
    block_tokens: int
    partial_block_counts: bool  # the last, partial block of a prompt has an id and can be hit
    outputs_inserted: bool
    warm_up_share: float  # of the requests, replayed and not counted
    warm_up_requests: int
    num_requests: int
    num_accesses: int
    num_unique_blocks: int


def open_trace(recipe: SimulateRecipe, reporter: Reporter) -> tuple[Trace, Conventions]:
    """Load the recipe's trace and settle what its hits mean; raise UsageError where the log cannot tell them."""
    if recipe.per_request is not None:
        check_name(recipe.per_request)
    loaded = load(
        recipe.trace,
        interleave=recipe.interleave,
        seed=recipe.seed,
        keep_columns=recipe.keep_columns,
        skip_bad_lines=recipe.skip_bad_lines,
        status=reporter.status,
    )
    trace = loaded.trace
    semantics: Semantics = recipe.semantics or ("object" if trace.is_objects else "prefix")
    if trace.is_objects and semantics == "prefix":
        raise UsageError(
            f"{recipe.trace}: a log of single objects ({loaded.format}) has no prefixes to hit",
            hint="leave --semantics out, or use --semantics object",
        )
    if not recipe.partial_blocks:
        trace = trace.without_partial_blocks()
    if recipe.export is not None:
        export_oracle_general(trace, recipe.export)
    conventions = Conventions(
        trace=recipe.trace,
        format=loaded.format,
        skipped_lines=loaded.skipped_lines,
        interleaving=loaded.interleaving,
        seed=recipe.seed,
        semantics=semantics,
        touch="forward" if semantics == "object" else recipe.touch or "reverse",
        block_tokens=trace.block_tokens,
        partial_block_counts=recipe.partial_blocks,
        outputs_inserted=False,
        warm_up_share=recipe.warm_up,
        warm_up_requests=int(recipe.warm_up * trace.num_requests),
        num_requests=trace.num_requests,
        num_accesses=trace.ids.size,
        num_unique_blocks=trace.num_blocks,
    )
    reporter.status(
        f"{recipe.trace} ({loaded.format}): {trace.num_requests:,} requests, {trace.ids.size:,} block accesses, "
        f"{trace.num_blocks:,} unique blocks of {trace.block_tokens} tokens"
    )
    return trace, conventions
