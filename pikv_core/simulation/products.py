"""What a sweep of replays leaves beside its rows: single requests, diagnostics, pictures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pikv_core.files import replacing, write_json
from pikv_core.runs import Run, plain
from pikv_core.schema import SimulateRecipe
from pikv_core.simulation import pictures
from pikv_core.simulation.cost.billing import Bill
from pikv_core.simulation.diagnostics import HitsOverTime, hits_by_category, hits_by_turn, hits_over_time, reuse
from pikv_core.simulation.metrics import hit_tokens
from pikv_core.simulation.per_request import Write, per_request
from pikv_core.simulation.replay import Replay
from pikv_core.simulation.trace import Trace


@dataclass
class Products:
    """Takes one replay after the other; what the recipe does not ask for costs nothing."""

    recipe: SimulateRecipe
    trace: Trace
    bill: Bill | None
    warm_up: int  # requests that hits by kind and pictures of times leave out
    drawn_capacity: int  # blocks; pictures of single requests and of time are of the policies at this one
    run: Run
    write: Write | None = None
    diagnostics: list[dict[str, Any]] = field(default_factory=list)
    over_time: dict[str, HitsOverTime] = field(default_factory=dict)
    ttft_s: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    curve: dict[str, NDArray[Any]] = field(default_factory=dict)

    def take(self, label: str, capacity: int, found: Replay) -> None:
        """Note what one policy found at one capacity (blocks)."""
        has_times = self.bill is not None and self.bill.hardware is not None
        tokens = hit_tokens(self.trace, found.hits)
        told: dict[str, NDArray[Any]] = {"hit_blocks": found.hits, "hit_tokens": tokens}
        if has_times and (self.write is not None or self.recipe.plot):
            assert self.bill is not None
            told["ttft_s"] = self.bill.ttft_s(self.trace, tokens)
        if self.write is not None:
            self.write({"policy": label, "capacity_blocks": capacity}, told)
        if self.recipe.diagnostics or self.recipe.plot:
            over_time = hits_over_time(self.trace, found.hits)
            self.diagnostics.append(
                {
                    "policy": label,
                    "capacity_blocks": capacity,
                    "by_category": hits_by_category(self.trace, found.hits, self.warm_up),
                    "by_turn": hits_by_turn(self.trace, found.hits, self.warm_up),
                    "over_time": over_time,
                }
            )
            if capacity == self.drawn_capacity:
                self.over_time[label] = over_time
        if self.recipe.plot and has_times and capacity == self.drawn_capacity:
            self.ttft_s[label] = told["ttft_s"][self.warm_up :]

    def take_curve(self, arrays: dict[str, NDArray[Any]]) -> None:
        """Write lru's curve, by name one entry for each capacity, into the run folder."""
        self.curve = arrays
        with replacing(self.run.folder / "curve.npz") as temporary:
            np.savez_compressed(temporary, **arrays)  # type: ignore[arg-type]

    def finish(self, rows: list[dict[str, Any]], ceiling: float) -> None:
        """Write diagnostics and pictures into the run folder; ceiling: the hit ratio of an infinite cache."""
        folder = self.run.folder
        if self.recipe.plot or self.curve:
            pictures.draw_hit_ratios(rows, self.curve, ceiling, folder / "hit-ratios.png")
        if not (self.recipe.diagnostics or self.recipe.plot):
            return
        distances = reuse(self.trace)
        if self.recipe.diagnostics:
            write_json(folder / "diagnostics.json", plain({"reuse": distances, "replays": self.diagnostics}))
        if not self.recipe.plot:
            return
        pictures.draw_reuse(distances, folder / "reuse.png")
        title = f"capacity {self.drawn_capacity:,} blocks"
        pictures.draw_over_time(self.over_time, title, folder / "over-time.png")
        if self.ttft_s:
            assert self.bill is not None
            none = self.bill.ttft_s(self.trace, np.zeros(self.trace.num_requests, np.int64))[self.warm_up :]
            times = {"no cache": none, **self.ttft_s}
            pictures.draw_ttft(times, self.bill.settings.slo_s, title, folder / "ttft.png")


@contextmanager
def products(
    recipe: SimulateRecipe, trace: Trace, bill: Bill | None, warm_up: int, drawn_capacity: int, run: Run
) -> Iterator[Products]:
    """Yield what takes the replays; at the end the file of single requests is there, if asked for."""
    with ExitStack() as stack:
        write = stack.enter_context(per_request(recipe.per_request, trace)) if recipe.per_request else None
        yield Products(recipe, trace, bill, warm_up, drawn_capacity, run, write)
