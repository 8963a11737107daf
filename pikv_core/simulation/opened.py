"""A trace as a study takes it, with everything a hit ratio means nothing without."""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from pikv_core.errors import PiKVError, UsageError
from pikv_core.files import make_folder
from pikv_core.runs import Run
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


def open_trace(recipe: SimulateRecipe, run: Run) -> tuple[Trace, Conventions]:
    """Load the recipe's trace and settle what its hits mean; raise UsageError where the log cannot tell them."""
    _check_files(recipe)
    loaded = load(
        recipe.trace,
        interleave=recipe.interleave,
        seed=recipe.seed,
        keep_columns=recipe.keep_columns,
        skip_bad_lines=recipe.skip_bad_lines,
        status=run.reporter.status,
    )
    trace = loaded.trace
    semantics: Semantics = recipe.semantics or ("object" if trace.is_objects else "prefix")
    _check_fits(recipe, trace, loaded.format, semantics)
    if not recipe.partial_blocks and trace.ids.size:
        trace = trace.without_partial_blocks()
        if not trace.ids.size:
            raise PiKVError(
                f"{recipe.trace}: no prompt fills a block of {trace.block_tokens} tokens",
                hint="leave --full-blocks out",
            )
    if recipe.export is not None or recipe.per_request is not None:
        make_folder(run.folder)  # first, as it has to be empty: the files may lie in it
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
        warm_up_requests=math.floor(Decimal(str(recipe.warm_up)) * trace.num_requests),
        num_requests=trace.num_requests,
        num_accesses=trace.ids.size,
        num_unique_blocks=trace.num_blocks,
    )
    run.reporter.status(
        f"{recipe.trace} ({loaded.format}): {trace.num_requests:,} requests, {trace.ids.size:,} block accesses, "
        f"{trace.num_blocks:,} unique blocks of {trace.block_tokens} tokens"
    )
    return trace, conventions


def _check_files(recipe: SimulateRecipe) -> None:
    """Raise UsageError where a file to write would take the place of a folder, of the trace or of another."""
    if recipe.per_request is not None:
        check_name(recipe.per_request)
    taken = {Path(recipe.trace).resolve(): "trace"}
    for key, file in (("per_request", recipe.per_request), ("export", recipe.export)):
        if file is None:
            continue
        path = Path(file).resolve()
        if path.is_dir():
            raise UsageError(f"{key}: '{file}' is a folder", hint="give the file to write")
        if path in taken:
            raise UsageError(f"{key}: '{file}' is the file of {taken[path]} too", hint="give another name")
        taken[path] = key


def _check_fits(recipe: SimulateRecipe, trace: Trace, form: str, semantics: Semantics) -> None:
    """Raise UsageError where the recipe asks of the log what it cannot tell."""
    objects = f"{recipe.trace}: a log of single objects ({form})"
    if trace.is_objects and semantics == "prefix":
        raise UsageError(f"{objects} has no prefixes to hit", hint="leave --semantics out, or use --semantics object")
    if trace.is_objects and recipe.touch == "reverse":
        raise UsageError(f"{objects} is touched forward", hint="leave --touch out")
    if trace.is_objects and recipe.serving.kv_model is not None:
        raise UsageError(
            f"{objects} has no prompts, so neither their bytes nor their times",
            hint="leave --kv-model and --hardware out, and give capacities in blocks",
        )
    if recipe.sample is not None and semantics == "prefix":
        raise UsageError(
            "a sample of the blocks has no prefixes, so that it tells nothing of prefix hits",
            hint="leave --sample out: the exact curve takes one pass for every capacity",
        )
    asked = [name for name in ("curve", "diagnostics", "plot", "per_request") if getattr(recipe, name)]
    if asked and not trace.ids.size:
        raise UsageError(
            f"{recipe.trace}: a log of lengths alone ({form}) names no blocks, so there is no {', '.join(asked)}",
            hint=f"leave --{asked[0].replace('_', '-')} out; --kv-model and --hardware tell times without a cache",
        )
