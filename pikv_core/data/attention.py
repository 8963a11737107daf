"""Synthetic attention for `pikv simulate-cache`: sinks, locality, heavy hitters and their drift, in known strengths.

A query's logit for a token is `sink_strength` if the token is one of the first, plus `local_strength` that decays with
its distance, plus `heavy_strength` if it is one of the head's heavy hitters then, plus noise of every query head:
a strength of 4 is 55 times the attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pikv_core.data import TASKS, text_files
from pikv_core.errors import UsageError
from pikv_core.files import make_folder
from pikv_core.runs import Reporter
from pikv_core.simulation.attention.trace import Header
from pikv_core.simulation.attention.writer import AttentionWriter

Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0)]
QUERIES = 64  # that are handed over at a time


@TASKS.register("attention")
@dataclass(frozen=True)
class Attention:
    num_layers: Positive = 4
    num_heads: Positive = 8  # query heads
    num_kv_heads: Positive = 2
    head_dim: Positive = 64  # it counts in budgets of bytes alone
    prompt_tokens: Positive = 512
    num_sinks: Annotated[int, Field(ge=0)] = 4  # the first tokens
    sink_strength: NotNegative = 4.0  # in logits
    local_strength: NotNegative = 4.0  # in logits, of the query's own token
    local_tokens: Positive = 16  # the distance at which the strength has fallen to 1/e
    num_heavy: Annotated[int, Field(ge=0)] = 24  # heavy hitters at a time, of each key/value head
    heavy_strength: NotNegative = 4.0  # in logits
    drift: Annotated[float, Field(ge=0, le=1)] = 0.002  # share of the heavy hitters that change at each query
    noise: NotNegative = 1.0  # in logits, standard deviation
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.999  # share of each row's mass that is written
    dtype: Literal["float16", "float32"] = "float16"

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise UsageError(
                f"task 'attention' got {self.num_heads} query heads for {self.num_kv_heads} key/value heads",
                hint="num_heads has to be a multiple of num_kv_heads",
            )

    def write(
        self,
        folder: Path,
        num_samples: int,
        seed: int,
        text: list[str],
        column: str | None,
        reporter: Reporter,
    ) -> dict[str, int]:
        """Write `attention.safetensors` with num_samples decode steps after the prompt."""
        text_files.refuse("attention", text, column)
        num_tokens = self.prompt_tokens + num_samples
        writer = AttentionWriter(self.top_p, self.dtype)
        for layer in range(self.num_layers):
            for rows in self.rows(np.random.default_rng([seed, layer]), num_tokens):
                writer.add_rows(layer, rows)
                reporter.progress("attention", layer + (rows.shape[2] / num_tokens) ** 2, self.num_layers)
        header = Header(
            model="synthetic",
            dtype="bfloat16",
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            windows=(None,) * self.num_layers,
            num_prompt_tokens=self.prompt_tokens,
            num_tokens=num_tokens,
            first_query=0,
            top_p=self.top_p,
        )
        writer.write(make_folder(folder) / "attention.safetensors", header)
        return {"attention.safetensors": num_samples}

    def rows(self, random: np.random.Generator, num_tokens: int) -> Iterator[NDArray[np.float32]]:
        """Yield a layer's softmax rows [H,N,P], N queries at a time, over the P tokens up to the last of them."""
        G, R = self.num_kv_heads, self.num_heads // self.num_kv_heads
        heavy = random.integers(0, self.prompt_tokens, (G, self.num_heavy))
        for first in range(0, num_tokens, QUERIES):
            end = min(num_tokens, first + QUERIES)
            logits = np.full((G, R, end - first, end), -np.inf)
            for query in range(first, end):
                changes = random.random(heavy.shape) < self.drift
                heavy = np.where(changes, random.integers(0, query + 1, heavy.shape), heavy)
                logits[:, :, query - first, : query + 1] = self._logits(random, query, heavy)
            weights = np.exp(logits - logits.max(axis=3, keepdims=True))
            probs = weights / weights.sum(axis=3, keepdims=True)
            yield probs.reshape(G * R, end - first, end).astype(np.float32)

    def _logits(self, random: np.random.Generator, query: int, heavy: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return a query's logits [G,R,query+1]; heavy [G,·]: the heavy hitters' positions, some perhaps to come."""
        G, R = self.num_kv_heads, self.num_heads // self.num_kv_heads
        position = np.arange(query + 1)
        shared = self.sink_strength * (position < self.num_sinks)
        shared = shared + self.local_strength * np.exp((position - query) / self.local_tokens)
        is_heavy = np.zeros((G, max(query + 1, self.prompt_tokens)), bool)
        is_heavy[np.arange(G)[:, None], heavy] = True
        by_head = shared + self.heavy_strength * is_heavy[:, : query + 1]
        return by_head[:, None] + self.noise * random.standard_normal((G, R, query + 1))
