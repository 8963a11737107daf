"""A synthetic log of serving requests in the mooncake shape, for `pikv simulate-cache`.

Sessions arrive as a Poisson process and open with one of a few shared system prompts, of Zipf's popularity.
A turn's prompt is the earlier prompt, its answer and new text; lengths are log-normal. Full blocks keep their
id as a prompt grows; the last, partial block has an id of its own that no later prompt repeats.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from pikv_core.data import TASKS, text_files
from pikv_core.files import replacing
from pikv_core.runs import Reporter

Positive = Annotated[int, Field(ge=1)]
AboveZero = Annotated[float, Field(gt=0)]
MOONCAKE_BLOCK_TOKENS = 512


@dataclass
class Session:
    prefix: int
    num_tokens: int  # of the prompt so far
    turns_left: int
    own_blocks: list[int] = field(default_factory=list)  # full blocks after the shared ones


@TASKS.register("requests")
@dataclass(frozen=True)
class Requests:
    num_prefixes: Positive = 32  # shared system prompts
    prefix_zipf: AboveZero = 1.1  # a prompt of popularity rank r is drawn with weight r**-prefix_zipf
    prefix_tokens: Positive = 2048  # median length of a system prompt
    turn_tokens: Positive = 512  # median length of what a user adds
    output_tokens: Positive = 256  # median length of an answer
    length_sigma: AboveZero = 1.0  # spread of the logarithm of lengths
    turns_mean: Annotated[float, Field(ge=1)] = 4.0  # turns of a session, geometric
    sessions_per_s: AboveZero = 1.0
    think_s: AboveZero = 30.0  # mean pause before the next turn
    max_input_tokens: Positive = 131072  # the prompt that reaches it is cut there and ends its session
    block_tokens: Positive = MOONCAKE_BLOCK_TOKENS  # another value is written in every record as block_size

    def write(
        self,
        folder: Path,
        num_samples: int,
        seed: int,
        text: list[str],
        column: str | None,
        reporter: Reporter,
    ) -> dict[str, int]:
        """Write `requests.jsonl` with num_samples requests in order of arrival."""
        text_files.refuse("requests", text, column)
        requests = self.requests(np.random.default_rng(seed))
        with (
            replacing(folder / "requests.jsonl") as temporary,
            temporary.open("w", encoding="utf-8") as stream,
        ):
            for done, request in zip(range(num_samples), requests):
                stream.write(json.dumps(request) + "\n")
                if done % 1000 == 0:
                    reporter.progress("requests", done, num_samples)
        return {"requests.jsonl": num_samples}

    def requests(self, random: np.random.Generator) -> Iterator[dict[str, Any]]:
        """Yield requests in order of arrival, without end."""
        new_block, order = count(), count()
        prefixes = [self._length(random, self.prefix_tokens) for _ in range(self.num_prefixes)]
        shared: list[list[int]] = [[] for _ in prefixes]
        weights = np.arange(1, self.num_prefixes + 1) ** -self.prefix_zipf
        cumulative = np.cumsum(weights / weights.sum())
        arrivals: list[tuple[float, int, Session | None]] = [(0.0, next(order), None)]
        while True:
            time_s, _, session = heapq.heappop(arrivals)
            if session is None:
                gap_s = random.exponential(1 / self.sessions_per_s)
                heapq.heappush(arrivals, (time_s + gap_s, next(order), None))
                rank = int(np.searchsorted(cumulative, random.random() * cumulative[-1], side="right"))
                session = Session(rank, prefixes[rank], int(random.geometric(1 / self.turns_mean)))
            session.num_tokens += self._length(random, self.turn_tokens)
            if session.num_tokens >= self.max_input_tokens:
                session.num_tokens = self.max_input_tokens
                session.turns_left = 1
            output_tokens = self._length(random, self.output_tokens)
            num_shared = prefixes[session.prefix] // self.block_tokens
            yield {
                "timestamp": round(time_s * 1000),
                "input_length": session.num_tokens,
                "output_length": output_tokens,
                "hash_ids": self._blocks(session, shared[session.prefix], num_shared, new_block),
                **({} if self.block_tokens == MOONCAKE_BLOCK_TOKENS else {"block_size": self.block_tokens}),
            }
            session.num_tokens += output_tokens
            session.turns_left -= 1
            if session.turns_left:
                pause_s = random.exponential(self.think_s)
                heapq.heappush(arrivals, (time_s + pause_s, next(order), session))

    def _length(self, random: np.random.Generator, median_tokens: int) -> int:
        tokens = random.lognormal(np.log(median_tokens), self.length_sigma)
        return max(1, round(min(tokens, self.max_input_tokens)))

    def _blocks(self, session: Session, shared: list[int], num_shared: int, new_block: Iterator[int]) -> list[int]:
        """Return the ids of the prompt's blocks; ids are numbered in order of first appearance."""
        shared.extend(next(new_block) for _ in range(num_shared - len(shared)))
        num_own = session.num_tokens // self.block_tokens - num_shared
        session.own_blocks.extend(next(new_block) for _ in range(num_own - len(session.own_blocks)))
        partial = [next(new_block)] if session.num_tokens % self.block_tokens else []
        return [*shared, *session.own_blocks, *partial]
